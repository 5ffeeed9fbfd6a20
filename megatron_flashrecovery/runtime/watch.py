"""What an agent sees of the trainers of its node without their help: who hangs, and what a dead one did last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import psutil

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import ExecutePlan, Park, RanksHung, Resume, StepsTimed
from megatron_flashrecovery.core.pace import STEP, Pace, Reading, judge
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.timing import Timing
from megatron_flashrecovery.detect import stacks
from megatron_flashrecovery.detect.pulse import PulseReader, make_page
from megatron_flashrecovery.runtime.dialogue import Raised
from megatron_flashrecovery.runtime.node_messages import LastWords
from megatron_flashrecovery.runtime.workers import Worker

_EVERY = 0.25
_AGAIN = 10.0
"""Seconds: whoever could make nothing of it the first time hears it again."""
_NOBODY: tuple[frozenset[Rank], ...] = (frozenset(),) * 5
_QUIET = 1.0
"""Seconds without a beat: only then the operating system is asked what became of a process."""
_ASLEEP = 1.0
"""Seconds between two looks: who was asleep for as long has seen nobody hang."""


@dataclass
class _Watched:
    pulse: PulseReader
    stacks: int
    page: int
    raised: Raised | None = None

    @classmethod
    def new(cls) -> Self:
        page = make_page()
        return cls(PulseReader(page), stacks.make_file(), page)

    def close(self) -> None:
        self.pulse.close()
        os.close(self.stacks)


class Watch:
    """Looks while its ranks train, and while they stop; ``clock`` is the one that the trainers have, too."""

    def __init__(self, node: NodeId, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._pace = pace
        self._clock = clock
        self._watched: dict[WorkerId, _Watched] = {}
        self._not_before = self._looked = clock()
        self._told: tuple[frozenset[Rank], ...] = _NOBODY
        self._told_at = 0.0
        self._is_on, self._is_stopping = True, False
        self._timing = Timing()

    def take(self, worker: WorkerId) -> tuple[int, int]:
        """The descriptors of its page and of the file for its stacks, to be passed on."""
        watched = self._watched[worker] = _Watched.new()
        return watched.page, watched.stacks

    def go_on(self) -> None:
        """From now on ranks train; what was seen before counts no more."""
        self._is_on, self._is_stopping = True, False
        self._not_before = self._looked = self._clock()
        self._told = _NOBODY
        self._timing = Timing()

    def heed(self, order: object) -> None:
        """What the trainers of this node are told to do."""
        match order:
            case Park():  # who does not is busy, or hangs
                self._is_on = self._is_stopping = True
                self._told = _NOBODY
            case ExecutePlan():  # nobody knows how long that takes
                self._is_on = False
            case Resume():
                self.go_on()

    def look(self, epoch: Epoch, seated: Iterable[tuple[Rank, Worker]]) -> list[RanksHung | StepsTimed]:
        """What there is to tell."""
        now = self._clock()
        if not self._is_on or now < self._looked + _EVERY:
            return []
        if now > self._looked + _ASLEEP:
            self._not_before = now
        self._looked = now
        found = {rank: self._reading(worker, now) for rank, worker in seated}
        readings = {rank: reading for rank, reading in found.items() if reading is not None}
        told = self._hung(epoch, readings, now), None if self._is_stopping else self._timed(epoch, readings, now)
        return [event for event in told if event is not None]

    def _timed(self, epoch: Epoch, readings: Mapping[Rank, Reading], now: float) -> StepsTimed | None:
        training = {rank: reading for rank, reading in readings.items() if reading.doing}
        window = self._timing.look({rank: reading.spent for rank, reading in training.items()}, now)
        if window is None:
            return None
        newest = max(reading.spent.upto for reading in training.values())
        return StepsTimed(self._node, epoch, newest, window.computed, window.waited)

    def _hung(self, epoch: Epoch, readings: Mapping[Rank, Reading], now: float) -> RanksHung | None:
        """Nothing, if it is what was told a moment ago."""
        verdict = judge(readings, now, self._pace, self._not_before)
        # Of those that stop it only matters why they have not; of those that train, that most of them compute does not.
        verdict = replace(verdict, waiting={}, slow=()) if self._is_stopping else replace(verdict, busy=())
        seen = tuple(map(frozenset, (verdict.hung, verdict.waiting, verdict.silent, verdict.slow, verdict.busy)))
        if seen == self._told and (seen == _NOBODY or now < self._told_at + _AGAIN):
            return None
        self._told, self._told_at = seen, now
        newest = max((readings[rank].step for rank in (*verdict.hung, *verdict.waiting)), default=Step(0))
        others = verdict.silent, verdict.slow, verdict.busy
        return RanksHung(self._node, epoch, verdict.hung, verdict.waiting, newest, *others)

    def note_raised(self, worker: WorkerId, raised: Raised) -> None:
        if worker in self._watched:
            self._watched[worker].raised = raised

    def ask_for_stacks(self, workers: Iterable[Worker]) -> None:
        """Before they are ended for being in the way."""
        known = [worker for worker in workers if worker.pid is not None and worker.id in self._watched]
        stacks.ask_for({worker.pid: self._watched[worker.id].stacks for worker in known if worker.pid is not None})

    def last_words(self, rank: Rank, worker: WorkerId) -> LastWords:
        """Of a process that is gone, and forgotten with this."""
        watched = self._watched.pop(worker, None)
        if watched is None:
            return LastWords(rank, worker)
        reading, raised = watched.pulse.read(), watched.raised
        words = LastWords(
            rank,
            worker,
            step=reading.step if reading and reading.doing else None,
            doing=reading.doing if reading else "",
            where=_where(reading) if reading else "",
            raised=raised.what if raised else None,
            traceback=raised.traceback if raised else "",
            stacks=stacks.read_from(watched.stacks),
            fault=raised.fault if raised else Fault.PROCESS_ENDED,
        )
        watched.close()
        return words

    def keep_only(self, workers: Collection[WorkerId]) -> None:
        """Of the others nobody wants to know anything any more."""
        for worker in [each for each in self._watched if each not in workers]:
            self._watched.pop(worker).close()

    def _reading(self, worker: Worker, now: float) -> Reading | None:
        watched = self._watched.get(worker.id)
        reading = None if watched is None else watched.pulse.read()
        if reading is None or worker.pid is None or now < reading.beat + _QUIET:
            return reading
        return replace(reading, is_stopped=_is_stopped(worker.pid))


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP and the like; whom a debugger has stopped goes on soon, or is wanted so."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _where(reading: Reading) -> str:
    """The operation of its host, or of its device."""
    return reading.where or (reading.device.operation if reading.device is not None else "")


def in_words(words: LastWords) -> str:
    """What it did last, in half a sentence; empty if it had not begun to train."""
    if words.step is None or not words.doing:
        return ""
    waited = f", in {words.where}" if words.where else ""
    what = f" in {words.doing}" if words.doing != STEP else ""
    return f" at step {words.step}{what}{waited}"
