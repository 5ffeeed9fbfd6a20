"""What the journal of a run knows that a diagnosis can use: where ranks sit, what was measured, and what happened."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.core.findings import NumbersBad, PeersDiffered
from megatron_flashrecovery.core.ids import GroupKey, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import (
    Loss,
    NodeLost,
    OperationsFailed,
    RanksHung,
    SeatsDescribed,
    StartWorkers,
    StepsTimed,
    WorkersLost,
)
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.punctuality import EVERY
from megatron_flashrecovery.diagnose.telemetry import Metric
from megatron_flashrecovery.runtime.chronicle import SlowNoted
from megatron_flashrecovery.runtime.journal import FILE_NAME, JobStarted, Line, decode_as, read_journal
from megatron_flashrecovery.runtime.node_messages import DeviceNoted, HeartbeatsLate, NodeMeasured, NodePlaced

_OF_THE_SCRIPT = frozenset({Fault.EXCEPTION, Fault.DEVICE_MEMORY})
"""Where a bug or a model too large comes up says nothing about the place."""
_MAYBE_OF_OTHERS = frozenset({Fault.DEADLINE, Fault.PLAN_FAILED})
"""Whoever is named for it may have waited for somebody who is not."""
_MAYBE_OF_THE_DATA = frozenset({Fault.PROCESS_ENDED, Fault.OUT_OF_MEMORY})
"""A rank that ends so again in the same step got the same data again."""
LONGEST = 3600.0
"""Seconds of a time in which somebody was slow: the newest say as much as days."""
_AROUND = 3600.0
"""Seconds: what came before is compared with, and counts are told ten minutes late."""
OWN_TIME = "own time of a step"


@dataclass(frozen=True)
class Incident:
    """``time``: Unix time. ``is_own``: it speaks against the place where it happened; a rank that waits for somebody,
    or whose script is wrong, does not."""

    time: float
    kind: str
    ranks: tuple[Rank, ...]
    evidence: str
    is_own: bool = True


@dataclass(frozen=True)
class Sample:
    """What was said at ``time`` (Unix time) of these ranks, or of a host if there are none. ``label`` says in words
    what it is, ``metric`` how it is compared. A count is one of the ``seconds`` before; what is none has 0."""

    time: float
    label: str
    metric: Metric
    values: Mapping[Rank, float]
    host: str = ""
    value: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Dossier:
    """``host_of`` and ``local`` say where each rank sits: the name of a machine, and its number there. ``slow`` are all
    alarms: when, which rank, and whether it began. What was seen of a rank on a node that it has left since is of a
    place that has no part in the job any more, and is left out."""

    start: float
    end: float
    node_of: Mapping[Rank, NodeId]
    host_of: Mapping[Rank, str]
    local: Mapping[Rank, int]
    switches: Mapping[str, tuple[str, str]]
    devices: Mapping[Rank, str]
    groups: Mapping[GroupKey, tuple[Rank, ...]]
    peers: Mapping[Rank, tuple[Rank, ...]]
    samples: tuple[Sample, ...]
    incidents: tuple[Incident, ...]
    slow: tuple[tuple[float, Rank, bool], ...]

    @property
    def world(self) -> int:
        return len(self.node_of)


@dataclass(frozen=True)
class Alarm:
    """The newest. ``over``: when this rank was no longer slow; None if it is slow at the end."""

    time: float
    rank: Rank
    over: float | None


def alarm_of(slow: Sequence[tuple[float, Rank, bool]]) -> Alarm | None:
    """Of several that became slow one after the other the newest one: then all of them are."""
    for time, rank, began in reversed(slow):
        if began:
            over = (when for when, whose, again in slow if whose == rank and not again and when > time)
            return Alarm(time, rank, min(over, default=None))
    return None


def read_dossier(directory: Path, last: float | None = None) -> Dossier:
    """With the measurements of the ``last`` seconds, else around the newest alarm or the end, and an hour more: those
    of all the days that a large job takes would cost minutes, and gigabytes.

    Raises ``RecordDamaged`` if there is no journal of a job that has come to its first step."""
    reader = _Reader()

    def is_told_seldom(name: str, time: float) -> bool:
        reader.end = max(reader.end, time)
        return name not in _Reader.OFTEN

    for line in read_journal(directory / FILE_NAME, _Reader.NAMES, is_told_seldom):
        reader.hear(line)
    if not reader.node_of:
        raise RecordDamaged(f"{directory / FILE_NAME} does not begin with the start of a job: name a --log-dir")
    if not reader.peers:
        raise RecordDamaged(
            f"{directory / FILE_NAME} has no layout: the job has not come to its first step, or asked for no recovery"
        )
    start, end = reader.span(last)
    for line in read_journal(directory / FILE_NAME, _Reader.OFTEN, lambda name, time: start <= time <= end):
        reader.hear(line)
    return reader.dossier()


@dataclass
class _Reader:
    OFTEN = frozenset(kind.__name__ for kind in (StepsTimed, NodeMeasured, HeartbeatsLate))
    NAMES = frozenset(
        OFTEN
        | {kind.__name__ for kind in (JobStarted, SeatsDescribed, NodePlaced, StartWorkers)}
        | {kind.__name__ for kind in (WorkersLost, NodeLost, RanksHung, OperationsFailed, NumbersBad, PeersDiffered)}
        | {DeviceNoted.__name__, SlowNoted.__name__, "RestartAll", "Park", "_Ended"}
    )

    start: float = 0.0
    end: float = 0.0
    node_of: dict[Rank, NodeId] = field(default_factory=dict)
    moved: dict[Rank, float] = field(default_factory=dict)
    placed: dict[NodeId, NodePlaced] = field(default_factory=dict)
    groups: dict[GroupKey, tuple[Rank, ...]] = field(default_factory=dict)
    peers: dict[Rank, tuple[Rank, ...]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    measured: list[tuple[float, NodeMeasured]] = field(default_factory=list)
    late: list[tuple[float, HeartbeatsLate]] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    slow: list[tuple[float, Rank, bool]] = field(default_factory=list)
    ended: set[WorkerId] = field(default_factory=set)
    hung: set[tuple[int, Rank]] = field(default_factory=set)
    retried: set[tuple[Rank, Step]] = field(default_factory=set)

    def span(self, last: float | None) -> tuple[float, float]:
        """Unix times between which measurements may count."""
        if last is not None:
            return self.end - last - _AROUND, self.end
        alarm = alarm_of(self._slow())
        if alarm is None or alarm.over is None:
            return (self.end if alarm is None else max(alarm.time, self.end - LONGEST)) - _AROUND, self.end
        return max(alarm.time, alarm.over - LONGEST) - _AROUND, alarm.over + _AROUND

    def hear(self, line: Line) -> None:
        self.start, self.end = self.start or line.time, max(self.end, line.time)
        match line.name:
            case "JobStarted":
                seats_of = decode_as(JobStarted, line).seats
                self.node_of = {rank: node for node, ranks in sorted(seats_of.items()) for rank in ranks}
            case "StartWorkers":
                started = decode_as(StartWorkers, line)
                moved = [rank for rank in started.ranks if self.node_of.get(rank) != started.node]
                self.node_of.update(dict.fromkeys(moved, started.node))
                self.moved.update(dict.fromkeys(moved, line.time))
            case "SeatsDescribed":
                seats = decode_as(SeatsDescribed, line)
                self.groups.update(seats.groups)
                self.peers.update(seats.peers)
            case "NodePlaced":
                placed = decode_as(NodePlaced, line)
                self.placed[placed.node] = placed
            case "StepsTimed":
                self.samples.append(Sample(line.time, OWN_TIME, Metric.COMPUTE, decode_as(StepsTimed, line).computed))
            case "NodeMeasured":
                self.measured.append((line.time, decode_as(NodeMeasured, line)))
            case "HeartbeatsLate":
                self.late.append((line.time, decode_as(HeartbeatsLate, line)))
            case "SlowNoted":
                noted = decode_as(SlowNoted, line)
                self.slow.append((line.time, noted.rank, noted.evidence is not None))
            case "Park" | "RestartAll":
                # A new epoch knows of nobody (``SlowNoted``); who is slow still is named again.
                began = {rank: is_slow for _, rank, is_slow in self.slow}
                self.slow += [(line.time, rank, False) for rank, is_slow in began.items() if is_slow]
            case _:
                self.incidents += self._incidents(line)

    def _incidents(self, line: Line) -> Iterator[Incident]:
        time = line.time
        match line.name:
            case "WorkersLost":
                lost = decode_as(WorkersLost, line)
                for loss in lost.losses:
                    if loss.worker not in self.ended and self.node_of.get(loss.rank) == lost.node:
                        self.ended.add(loss.worker)
                        is_own = loss.fault not in _OF_THE_SCRIPT | _MAYBE_OF_OTHERS and not self._is_again(loss)
                        yield Incident(time, loss.fault.value, (loss.rank,), loss.cause, is_own)
            case "NodeLost":
                node = decode_as(NodeLost, line)
                ranks = tuple(rank for rank, where in sorted(self.node_of.items()) if where == node.node)
                yield Incident(time, Fault.NODE_LOST.value, ranks, node.cause)
            case "RanksHung":
                for rank, why in decode_as(RanksHung, line).hung.items():
                    if (line.epoch, rank) not in self.hung:
                        self.hung.add((line.epoch, rank))
                        # Whoever is ended for it is lost, and counts then; of many that hang nobody knows who began.
                        yield Incident(time, Fault.HANG.value, (rank,), why, is_own=False)
            case "OperationsFailed":
                failed = decode_as(OperationsFailed, line).failed
                words = next(iter(failed.values()), "")
                yield Incident(time, Fault.COMMUNICATOR_ERROR.value, tuple(failed), words, is_own=False)
            case "DeviceNoted":
                device = decode_as(DeviceNoted, line)
                if device.ranks:
                    kind = device.fault or "note of a device"
                    yield Incident(time, kind, device.ranks, device.evidence, bool(device.fault))
            case "NumbersBad":
                numbers = decode_as(NumbersBad, line)
                if numbers.own:
                    yield Incident(
                        time, Fault.BAD_NUMBERS.value, tuple(numbers.own), numbers.what, len(numbers.own) == 1
                    )
            case "PeersDiffered":
                differed = decode_as(PeersDiffered, line)
                both = differed.rank, differed.guest
                yield Incident(time, Fault.CORRUPTION.value, both, f"they differ in {differed.part}", is_own=False)

    def _is_again(self, loss: Loss) -> bool:
        if loss.step is None or loss.fault not in _MAYBE_OF_THE_DATA:
            return False
        is_again = (loss.rank, loss.step) in self.retried
        self.retried.add((loss.rank, loss.step))
        return is_again

    def dossier(self) -> Dossier:
        node_of = dict(sorted(self.node_of.items()))
        used = set(node_of.values())
        self.placed = {node: placed for node, placed in self.placed.items() if node in used}
        machine = {node: placed.machine for node, placed in self.placed.items()}
        host_of = {rank: machine.get(node, node) for rank, node in node_of.items()}
        samples = (*self._of_ranks(), *self._of_counters(used), *self._of_heartbeats(machine, used))
        return Dossier(
            self.start,
            self.end,
            node_of,
            host_of,
            _numbers_on_hosts(host_of),
            {placed.machine: placed.switches for placed in self.placed.values() if placed.switches[0]},
            {rank: place for placed in self.placed.values() for rank, place in placed.devices.items()},
            self.groups,
            self.peers,
            tuple(sorted(samples, key=lambda sample: sample.time)),
            tuple(self._incidents_here()),
            tuple(self._slow()),
        )

    def _is_here(self, rank: Rank, time: float) -> bool:
        """Whether the rank sat then where it sits now."""
        return rank not in self.moved or time > self.moved[rank]

    def _slow(self) -> list[tuple[float, Rank, bool]]:
        return [(time, rank, began) for time, rank, began in self.slow if self._is_here(rank, time)]

    def _incidents_here(self) -> Iterator[Incident]:
        for each in self.incidents:
            if ranks := tuple(rank for rank in each.ranks if self._is_here(rank, each.time)):
                yield replace(each, ranks=ranks)

    def _of_ranks(self) -> Iterator[Sample]:
        for each in self.samples:
            if values := {rank: value for rank, value in each.values.items() if self._is_here(rank, each.time)}:
                yield replace(each, values=values)

    def _of_counters(self, used: Collection[NodeId]) -> Iterator[Sample]:
        for time, told in self.measured:
            if told.node not in used:
                continue
            placed = self.placed.get(told.node)
            machine = placed.machine if placed else str(told.node)
            at = {place: rank for rank, place in placed.devices.items()} if placed else {}
            by_label: dict[str, dict[Rank, float]] = {}
            for name, number in told.grown.items():
                kind, _, rest = name.partition(".")
                if kind == "device":
                    place, _, counter = rest.rpartition(".")
                    if place in at:
                        by_label.setdefault(f"{counter.replace('_', ' ')} of devices", {})[at[place]] = number
            for label, values in by_label.items():
                yield Sample(time, label, Metric.ERRORS, values, seconds=told.seconds)
            for (label, metric), number in _of_links(told).items():
                yield Sample(time, label, metric, {}, machine, number, told.seconds)

    def _of_heartbeats(self, machine: Mapping[NodeId, str], used: Collection[NodeId]) -> Iterator[Sample]:
        for time, told in self.late:
            host = machine.get(told.node, told.node)
            if told.node in used:
                yield Sample(time, "late heartbeats", Metric.ERRORS, {}, host, told.late, EVERY)


def _of_links(told: NodeMeasured) -> dict[tuple[str, Metric], int]:
    """Ports of a host are one thing here: which of its ranks uses which is not known."""
    found: dict[tuple[str, Metric], int] = {}
    for name, number in told.grown.items():
        kind = name.partition(".")[0]
        if kind in ("nic", "ib"):
            key = "errors of InfiniBand ports" if kind == "ib" else "errors of network interfaces", Metric.ERRORS
            found[key] = found.get(key, 0) + number
    if sent_again := told.grown.get("tcp.retransmitted"):
        found["TCP segments sent again", Metric.RETRANSMITS] = sent_again
    return found


def _numbers_on_hosts(host_of: Mapping[Rank, str]) -> dict[Rank, int]:
    counted: dict[str, int] = {}
    found = {}
    for rank in _in_order(host_of):
        found[rank] = counted.setdefault(host_of[rank], 0)
        counted[host_of[rank]] += 1
    return found


def _in_order(ranks: Iterable[Rank]) -> list[Rank]:
    return sorted(ranks)
