"""A diagnosis of one run: each line of evidence by itself, and who is to blame by all of them.

Lines are the tables of measurements (``measured``) and the incidents that came again. Each may be right by chance, so
each has to be surer the more there are (Bonferroni): nothing is assumed of how they depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.occasions import share_of_look
from megatron_flashrecovery.diagnose.communicators import stages_of
from megatron_flashrecovery.diagnose.diagnosis import Diagnosis, Suspect
from megatron_flashrecovery.diagnose.hosts import of_hosts
from megatron_flashrecovery.diagnose.repetition import Throws, find_repeated
from megatron_flashrecovery.diagnose.standardization import FEWEST_PEERS, Standardized, standardize
from megatron_flashrecovery.diagnose.telemetry import NATURE, Telemetry
from megatron_flashrecovery.diagnose.topology import Indices, Topology
from megatron_flashrecovery.diagnose.trial import Trial
from megatron_flashrecovery.runtime.dossier import OWN_TIME, Dossier, Incident, Sample
from megatron_flashrecovery.runtime.measured import Measured, Period, tables_of

Values = npt.NDArray[np.float64]
Locate = Callable[[Topology, Standardized, Trial], Diagnosis]
_PAST = 600.0
_SAME_INCIDENT = 10.0
"""Seconds: one fault is told by the driver, by the process that ends of it, and by those beside it."""
INCIDENTS = "incidents"
_FEW = 32
"""Ranks: the tail of fewer is too short to tell how rare the highest is, however far away it is (``standing_out``)."""
_HOSTS = FEWEST_PEERS


@dataclass(frozen=True, eq=False)
class Line:
    """Of evidence. ``shown``: (windows, ranks) what a picture shows of it, and ``measure`` what that is."""

    label: str
    diagnosis: Diagnosis
    shown: Values
    measure: str


@dataclass(frozen=True)
class Accused:
    """``line``: by what. ``suspects``: the one, or those that are not told apart but all are of one host. ``p`` counts
    all lines. ``hosts`` and ``nodes``: where the ranks sit that show it; none of a communicator, for its hosts may all
    be well. By own times ``nodes`` are only those with a rank that was named slow: that a rack is a percent warmer is
    significant in a large job, and no reason to do without its nodes."""

    suspects: tuple[Suspect, ...]
    line: str
    p: float
    hosts: tuple[str, ...]
    nodes: tuple[NodeId, ...]

    @property
    def name(self) -> str:
        return " or ".join(str(suspect.element) for suspect in self.suspects)

    @property
    def evidence(self) -> str:
        return f"{self.line}: {self.suspects[0].evidence}"


@dataclass(frozen=True, eq=False)
class Case:
    """``undetermined`` says why nobody is accused."""

    dossier: Dossier
    topology: Topology
    period: Period
    lines: tuple[Line, ...]
    accused: tuple[Accused, ...]
    undetermined: str | None


def diagnose(
    dossier: Dossier,
    topology: Topology,
    period: Period,
    locate: Locate,
    more: Sequence[Sample] = (),
    level: float = 0.01,
) -> Case:
    """``more``: measurements from elsewhere. ``level``: in this share of healthy jobs somebody may be accused. Takes as
    long as ``locate`` does for each line."""
    hosts = tuple(dict.fromkeys(dossier.host_of.values()))
    samples = (*dossier.samples, *more)
    tables = [each for each in tables_of(dossier, samples, period, hosts) if not each.of_hosts or len(hosts) >= _HOSTS]
    past = {each.label: each for each in tables_of(dossier, samples, _before(dossier, period), hosts)}
    struck = strikes_of(dossier)
    number = len(tables) + bool(struck)
    each_level = level / max(1, number)
    number_of = {host: number for number, host in enumerate(hosts)}
    place = np.array([number_of[dossier.host_of[Rank(rank)]] for rank in range(dossier.world)], dtype=np.int64)
    groups: Mapping[str, Sequence[int]] = {str(key): ranks for key, ranks in dossier.groups.items()}
    roles = np.array(stages_of(dossier.world, groups), dtype=np.int64)
    trial = Trial(each_level, max(2000, math.ceil(4 / each_level)))
    lines = [_of_table(each, past.get(each.label), topology, place, roles, trial, locate) for each in tables]
    if struck:
        found = repeated(topology, place, struck, each_level)
        lines.append(Line(INCIDENTS, found, _numbers(struck, dossier.world), "incidents"))
    accused = sorted(_accused(dossier, lines, number), key=lambda each: each.p)
    if not accused and dossier.world < _FEW:
        accused = _by_alarm(dossier, topology, lines, period, number)
    return Case(dossier, topology, period, tuple(lines), tuple(accused), None if accused else _why_not(lines))


def strikes_of(dossier: Dossier) -> list[tuple[Rank, ...]]:
    """The ranks that each incident has hit, of those that speak against a place: one for each host and moment."""
    found: list[list[Rank]] = []
    newest: dict[str, tuple[float, list[Rank]]] = {}
    for incident in sorted(_own(dossier.incidents), key=lambda each: each.time):
        for rank in incident.ranks:
            host = dossier.host_of.get(rank)
            if host is None:
                continue
            when, ranks = newest.get(host, (-math.inf, []))
            if incident.time > when + _SAME_INCIDENT:
                ranks = []
                found.append(ranks)
                newest[host] = incident.time, ranks
            if rank not in ranks:
                ranks.append(rank)
    return [tuple(sorted(ranks)) for ranks in found]


def repeated(topology: Topology, place: Indices, struck: Sequence[Sequence[Rank]], level: float) -> Diagnosis:
    """What comes again is looked at again, so this look has its share of the level only."""
    share = share_of_look(len(struck))
    throws = Throws(max(999, math.ceil(2 / (level * share))), level * share)
    return find_repeated(topology, place, struck, throws).counted(share)


def _own(incidents: Iterable[Incident]) -> Iterable[Incident]:
    return (each for each in incidents if each.is_own)


def _before(dossier: Dossier, period: Period) -> Period:
    return Period(max(dossier.start, period.start - _PAST), period.start)


def _of_table(
    table: Measured,
    past: Measured | None,
    topology: Topology,
    place: Indices,
    roles: Indices,
    trial: Trial,
    locate: Locate,
) -> Line:
    if table.of_hosts:
        topology, roles = of_hosts(topology, place), np.zeros(table.values.shape[1], dtype=np.int64)
    before = None if past is None else Telemetry({past.metric: past.values}, roles)
    is_whole = NATURE[table.metric].is_count  # in the period: one window
    found = standardize(Telemetry({table.metric: table.values}, roles), before, is_whole)
    diagnosis = locate(topology, found, replace(trial, fewest=1) if is_whole else trial)
    values = found.scores.values
    if table.of_hosts:
        on = [np.flatnonzero(place == host) for host in range(values.shape[1])]
        suspects = tuple(_of_ranks(suspect, on) for suspect in diagnosis.suspects)
        faults = tuple(tuple(_of_ranks(suspect, on) for suspect in fault) for fault in diagnosis.faults)
        diagnosis = replace(diagnosis, suspects=suspects, faults=faults)
        values = values[:, place]
    return Line(table.label, diagnosis, values, "robust deviations from peers")


def _of_ranks(suspect: Suspect, on: Sequence[Indices]) -> Suspect:
    """What was said of hosts, said of their ranks."""
    ranks = sorted(int(rank) for host in suspect.ranks for rank in on[host])
    return replace(suspect, ranks=tuple(map(Rank, ranks)))


def _numbers(struck: Sequence[Sequence[Rank]], world: int) -> Values:
    counted = np.zeros((1, world))
    for ranks in struck:
        counted[0, list(ranks)] += 1
    return counted


def _accused(dossier: Dossier, lines: Sequence[Line], number: int) -> Iterable[Accused]:
    named = {rank for _, rank, began in dossier.slow if began}
    for line in lines:
        for suspects in line.diagnosis.faults:
            is_hardware = all(suspect.element.kind.is_hardware for suspect in suspects)
            ranks = sorted({rank for suspect in suspects for rank in suspect.ranks}) if is_hardware else []
            hosts = tuple(dict.fromkeys(dossier.host_of[rank] for rank in ranks))
            counted = [rank for rank in ranks if line.label != OWN_TIME or rank in named]
            nodes = tuple(dict.fromkeys(dossier.node_of[rank] for rank in counted))
            if len(suspects) == 1 or len(hosts) == 1:
                p = min(1.0, max(suspect.p for suspect in suspects) * number)
                yield Accused(suspects, line.label, p, hosts, nodes)


def _by_alarm(
    dossier: Dossier, topology: Topology, lines: Sequence[Line], period: Period, number: int
) -> list[Accused]:
    """In a small job peers cannot exclude chance, but limits that have been exceeded all the time can: whoever is said
    to be slow at the end of the period is (``core.slowness``). If these are just the ranks of one piece of hardware,
    the most conspicuous one, it is the one."""
    slow = {rank: began for time, rank, began in dossier.slow if time <= period.end}
    ranks = sorted(rank for rank, is_slow in slow.items() if is_slow)
    line = next((each for each in lines if each.label == OWN_TIME), None)
    if line is None or not ranks:
        return []
    for suspect in line.diagnosis.suspects[:1]:
        reach = topology.ranks_of(topology.elements.index(suspect.element))
        if suspect.element.kind.is_hardware and reach.tolist() == ranks:
            told = replace(suspect, evidence=f"{suspect.evidence}; {_FEWER_THAN_NEEDED.format(dossier.world)}")
            hosts = tuple(dict.fromkeys(dossier.host_of[rank] for rank in ranks))
            nodes = tuple(dict.fromkeys(dossier.node_of[rank] for rank in ranks))
            return [Accused((told,), line.label, min(1.0, suspect.p * number), hosts, nodes)]
    return []


_FEWER_THAN_NEEDED = "{} ranks are too few for a smaller p, so the alarm for slow ranks counts"


def _why_not(lines: Sequence[Line]) -> str:
    if not lines:
        return "nothing was measured in this time, and nothing happened that speaks against a place"
    return "; ".join(f"{line.label}: {line.diagnosis.undetermined}" for line in lines)


def places_of(case: Case) -> Mapping[str, tuple[str, ...]]:
    """The hosts of all accused, each with what speaks against it."""
    found: dict[str, tuple[str, ...]] = {}
    for each in case.accused:
        for host in each.hosts:
            found[host] = (*found.get(host, ()), f"{each.name}, by {each.line}")
    return found
