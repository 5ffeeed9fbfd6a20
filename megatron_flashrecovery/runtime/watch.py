"""What an agent sees of the trainers of its node without their help: who hangs, and what a dead one did last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Self

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import RanksHung
from megatron_flashrecovery.core.pace import STEP, Pace, Reading, judge
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect import stacks
from megatron_flashrecovery.detect.pulse import PulseReader, make_page
from megatron_flashrecovery.runtime.dialogue import Raised
from megatron_flashrecovery.runtime.node_messages import LastWords
from megatron_flashrecovery.runtime.workers import Worker

_EVERY = 0.25
_AGAIN = 10.0
"""Seconds: whoever could make nothing of it the first time hears it again."""
_NOBODY: tuple[frozenset[Rank], ...] = (frozenset(),) * 4
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
    """Looks only while its ranks train; ``clock`` is the one that the trainers have, too."""

    def __init__(self, node: NodeId, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._pace = pace
        self._clock = clock
        self._watched: dict[WorkerId, _Watched] = {}
        self._not_before = self._looked = clock()
        self._told: tuple[frozenset[Rank], ...] = _NOBODY
        self._told_at = 0.0
        self._is_on = True

    def take(self, worker: WorkerId) -> tuple[int, int]:
        """The descriptors of its page and of the file for its stacks, to be passed on."""
        watched = self._watched[worker] = _Watched.new()
        return watched.page, watched.stacks

    def go_on(self) -> None:
        """From now on ranks train; what was seen before counts no more."""
        self._is_on = True
        self._not_before = self._looked = self._clock()
        self._told = _NOBODY

    def pause(self) -> None:
        self._is_on = False

    def look(self, epoch: Epoch, seated: Iterable[tuple[Rank, Worker]]) -> RanksHung | None:
        """What there is to tell: nothing, if it is what was told a moment ago."""
        now = self._clock()
        if not self._is_on or now < self._looked + _EVERY:
            return None
        if now > self._looked + _ASLEEP:
            self._not_before = now
        self._looked = now
        found = {rank: self._reading(worker.id) for rank, worker in seated}
        readings = {rank: reading for rank, reading in found.items() if reading is not None}
        verdict = judge(readings, now, self._pace, self._not_before)
        seen = tuple(map(frozenset, (verdict.hung, verdict.waiting, verdict.silent, verdict.slow)))
        if seen == self._told and (seen == _NOBODY or now < self._told_at + _AGAIN):
            return None
        self._told, self._told_at = seen, now
        newest = max((readings[rank].step for rank in (*verdict.hung, *verdict.waiting)), default=Step(0))
        return RanksHung(self._node, epoch, verdict.hung, verdict.waiting, newest, verdict.silent, verdict.slow)

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
            where=reading.where if reading else "",
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

    def _reading(self, worker: WorkerId) -> Reading | None:
        watched = self._watched.get(worker)
        return None if watched is None else watched.pulse.read()


def in_words(words: LastWords) -> str:
    """What it did last, in half a sentence; empty if it had not begun to train."""
    if words.step is None or not words.doing:
        return ""
    waited = f", in {words.where}" if words.where else ""
    what = f" in {words.doing}" if words.doing != STEP else ""
    return f" at step {words.step}{what}{waited}"
