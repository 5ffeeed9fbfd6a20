"""From a region, ranks that are conspicuous together for whatever reason, to the elements that explain it.

An element explains the ranks of the region that it reaches, and the less so the more others it reaches whose scores
are usual; the measure is S of the scan, of elements that have ranks in the region. The best is taken, what it reaches
is taken out of the region, and so on. That an element is named adds no claim to the one that there is a region, so p
is the region's, and as exact or conservative as that. Where none explains half of it, the cause is not in the topology
(or the topology is wrong), and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose.diagnosis import Diagnosis, Suspect
from megatron_flashrecovery.diagnose.elements import Element
from megatron_flashrecovery.diagnose.evidence import Evidence
from megatron_flashrecovery.diagnose.localization import not_told_apart
from megatron_flashrecovery.diagnose.scan import contrast
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.standardization import Standardized
from megatron_flashrecovery.diagnose.topology import Indices, Topology
from megatron_flashrecovery.diagnose.trial import Trial

METHOD = "gbgp"
_MOST = 5
_PART = 0.5
"""Of what is left of the region, and of what an element reaches."""


def attribute(
    topology: Topology,
    scores: Scores,
    region: Sequence[Rank],
    p: float,
    trial: Trial | None = None,
    measured: Standardized | None = None,
) -> Diagnosis:
    """``region``: ranks that are conspicuous with this ``p``. Its suspects explain one part of it after the other; if
    the first leaves more than half of the region unexplained, or is not told from others, it is undetermined.

    Milliseconds. Raises ``ValueError`` if the region is empty, or scores are not those of these ranks."""
    if not len(region):
        raise ValueError("a region without ranks: there is nothing to explain")
    trial = trial or Trial()
    evidence = Evidence(topology, contrast(topology, scores, trial), trial, measured)
    left = np.unique(np.asarray(region, dtype=np.int64))
    explained: list[tuple[int, ...]] = []
    shares: list[float] = []
    while left.size and len(explained) < _MOST:
        best = _best(topology, evidence, left)
        if best is None:
            break
        explained.append(not_told_apart(topology, best, evidence))
        inside = np.isin(left, topology.ranks_of(best))
        shares.append(float(inside.mean()))
        left = left[~inside]
    faults = tuple(tuple(evidence.suspect(k, p) for k in each) for each in explained)
    why = _undetermined(faults, shares, len(set(region)))
    suspects = (*(each[0] for each in faults), *(rest for each in faults for rest in each[1:]))
    return Diagnosis(suspects, why, METHOD, faults if why is None or (shares and shares[0] >= _PART) else ())


def _best(topology: Topology, evidence: Evidence, left: Indices) -> int | None:
    """Of the elements that reach mostly what is left: the one with the highest score; None if there is none."""
    in_left = np.zeros(topology.world)
    in_left[left] = 1
    inside = np.add.reduceat(np.append(in_left[topology.ranks], 0), topology.start[:-1])
    size = np.maximum(np.diff(topology.start), 1)
    score = np.where((inside >= _PART * size) & (inside > 0), evidence.scanned.score, -np.inf)
    best = int(np.argmax(score)) if score.size else 0
    return best if score.size and score[best] > 0 else None


def _undetermined(faults: Sequence[Sequence[Suspect]], shares: Sequence[float], size: int) -> str | None:
    if not faults:
        return f"no known element reaches mostly ranks of this region of {size}: its cause is not in the topology"
    best: Element = faults[0][0].element
    if shares[0] < _PART:
        return (
            f"no known element explains this region of {size} ranks: {best}, the best, reaches {shares[0]:.0%} of it; "
            "its cause may be missing from the topology"
        )
    if len(faults[0]) > 1:
        names = ", ".join(str(each.element) for each in faults[0])
        return f"{names} explain the same ranks about equally well: one of them is to blame"
    return None
