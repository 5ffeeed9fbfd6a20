"""Which element is to blame: the scan, what else explains the same, and what it does not explain.

The most conspicuous of all significant elements is a fault. What it reaches is taken out, and the rest is scanned
again, for a second and third one: their p is at least that of the fault before, so the first says whether anything is
wrong. If the first is the true one, the rest is that of a job with one fault less, and p holds; if it is not, what is
reported next may be a part of the same fault.

A suspect is told from another one that shares ranks with it if the scores are e^3 = 20 times as likely under it,
S^2 / 2 being the logarithm of the likelihood ratio; whatever is made of faults that are found (a switch over two hosts)
is compared with all of them together. Elements that reach the same measured ranks are never told apart by scores. Then
the metric may decide (``telemetry.can_cause``), and hardware comes before communicators, which have no parts that
break.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_flashrecovery.diagnose.diagnosis import Diagnosis, Suspect
from megatron_flashrecovery.diagnose.evidence import Evidence
from megatron_flashrecovery.diagnose.scan import Scanned, scan
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.standardization import Standardized
from megatron_flashrecovery.diagnose.telemetry import can_cause
from megatron_flashrecovery.diagnose.topology import Topology
from megatron_flashrecovery.diagnose.trial import Trial

METHOD = "scan"
MOST_FAULTS = 3
_MOST_SUSPECTS = 5
_NATS = 3.0
_NAMED = 4
_FEW = 8


@dataclass(frozen=True, eq=False)
class _Fault:
    """``elements``: not told apart, the likeliest first."""

    elements: tuple[int, ...]
    evidence: Evidence
    p: float

    @property
    def score(self) -> float:
        return float(self.evidence.scanned.score[self.elements[0]])

    def suspects(self) -> tuple[Suspect, ...]:
        return tuple(
            self.evidence.suspect(each, max(self.p, float(self.evidence.scanned.p[each]))) for each in self.elements
        )


def localize(
    topology: Topology, scores: Scores, trial: Trial | None = None, measured: Standardized | None = None
) -> Diagnosis:
    """``measured``: what the scores are made of, for the evidence and for elements that only a metric tells apart.

    Costs one scan, and one more for each fault. Raises ``ValueError`` if scores are not those of these ranks."""
    trial = trial or Trial()
    first = scan(topology, scores, trial)
    faults: list[_Fault] = []
    scanned = first
    while len(faults) < MOST_FAULTS:
        significant = np.flatnonzero(scanned.p <= trial.level)
        if not significant.size:
            break
        best = int(significant[np.argmax(scanned.score[significant])])
        p = max([float(scanned.p[best]), *(fault.p for fault in faults)])
        evidence = Evidence(topology, scanned, trial, measured)
        faults.append(_Fault(not_told_apart(topology, best, evidence), evidence, p))
        values = scores.values.copy()
        for fault in faults:
            values[:, topology.ranks_of(fault.elements[0])] = np.nan
        scanned = scan(topology, Scores(values, scores.strata), trial)
    told = tuple(_with_what_holds_several(topology, fault, faults, first) for fault in faults)
    found = tuple(fault.suspects() for fault in told)
    others = _others(Evidence(topology, first, trial, measured), {each for fault in told for each in fault.elements})
    suspects = (*(each[0] for each in found), *(rest for each in found for rest in each[1:]), *others)
    return Diagnosis(suspects[: max(_MOST_SUSPECTS, len(found))], _undetermined(found, others, first), METHOD, found)


def not_told_apart(topology: Topology, best: int, evidence: Evidence) -> tuple[int, ...]:
    """This element and all that explain about the same ranks about as well, the likeliest first."""
    scanned = evidence.scanned
    same = np.flatnonzero(scanned.reach.of_element == scanned.reach.of_element[best])
    gain = np.where(scanned.score > 0, scanned.score**2 / 2, 0.0)
    # Of what is hardly unusual itself, everything would be within three nats.
    close = np.flatnonzero(gain > max(gain[best] - _NATS, gain[best] / 2))
    near = [int(k) for k in close if k not in same and _share(topology, int(k), best)]
    near.sort(key=lambda k: -scanned.score[k])
    candidates = [*same.tolist(), *near]
    metric = evidence.leading_metric(best)
    if metric is not None:
        can = [k for k in candidates if can_cause(topology.elements[k].kind, metric)]
        candidates = can or candidates
    return tuple(_without_doubles(topology, scanned, candidates))


def _without_doubles(topology: Topology, scanned: Scanned, candidates: Sequence[int]) -> list[int]:
    """Of those that reach the same ranks, communicators only if there is no hardware."""
    which = scanned.reach.of_element
    hardware = {int(which[k]) for k in candidates if topology.elements[k].kind.is_hardware}
    return [k for k in candidates if topology.elements[k].kind.is_hardware or int(which[k]) not in hardware]


def _with_what_holds_several(topology: Topology, fault: _Fault, faults: Sequence[_Fault], first: Scanned) -> _Fault:
    """What reaches most of several faults may be the one behind all of them."""
    gain = np.where(first.score > 0, first.score**2 / 2, 0.0)
    own = set(topology.ranks_of(fault.elements[0]).tolist())
    larger = []
    for k in np.flatnonzero(gain > fault.score**2 / 2 - _NATS):
        reach = set(topology.ranks_of(int(k)).tolist())
        held = [each for each in faults if _is_mostly_in(topology, each.elements[0], reach)]
        together = sum(each.score**2 / 2 for each in held)
        if len(held) > 1 and own & reach and k not in fault.elements and gain[k] > together - _NATS:
            larger.append(int(k))
    if not larger:
        return fault
    return _Fault((*fault.elements, *larger), fault.evidence, fault.p)


def _is_mostly_in(topology: Topology, element: int, ranks: set[int]) -> bool:
    own = topology.ranks_of(element).tolist()
    return 2 * sum(rank in ranks for rank in own) >= len(own)


def _share(topology: Topology, one: int, other: int) -> bool:
    return bool(np.isin(topology.ranks_of(one), topology.ranks_of(other)).any())


def _others(evidence: Evidence, named: set[int]) -> tuple[Suspect, ...]:
    """The most conspicuous of the rest; of those with the same measured ranks one."""
    score, which = evidence.scanned.score, evidence.scanned.reach.of_element
    seen = {int(which[k]) for k in named}
    found: list[int] = []
    for k in np.argsort(-score, kind="stable").tolist():
        if len(found) == _MOST_SUSPECTS or not score[k] > 0:
            break
        if int(which[k]) not in seen:
            seen.add(int(which[k]))
            found.append(k)
    return tuple(evidence.suspect(k) for k in found)


def _undetermined(faults: Sequence[Sequence[Suspect]], others: Sequence[Suspect], scanned: Scanned) -> str | None:
    if faults and len(faults[0]) == 1:
        return None
    if faults:
        names = [str(each.element) for each in faults[0]]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{', '.join(names[:_NAMED])}{more} explain the same ranks about equally well: one of them is to blame"
    counted = int(scanned.counted.sum())
    if not others:
        return f"nothing is unusual in the {counted} ranks that were measured"
    few = f"; {counted} ranks are too few to say more" if counted < _FEW else ""
    likeliest = min(each.p for each in others)
    return (
        f"nothing stands out: most conspicuous is {others[0].element}, and a healthy job has something like it with "
        f"probability {likeliest:.2g}{few}"
    )
