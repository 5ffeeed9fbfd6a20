"""What the end of a worker means: that its rank was lost, or that it is done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.runtime.workers import WorkerEnded

_LEAVE_TOGETHER = 2.0


class Departures:
    """Of the ranks that sit on one node at the time. ``released``: the controller has said that the job is finished.
    ``passed_on``: the signal that the launcher was told to end by, and has passed on to every worker."""

    def __init__(self, ranks: Collection[Rank]) -> None:
        self.ranks = frozenset(ranks)
        self.released = False
        self.passed_on: signal.Signals | None = None
        self._done: set[Rank] = set()
        self._is_told = False
        self._late_failures: list[str] = []
        self._leaving: dict[Rank, tuple[WorkerEnded, float]] = {}

    def is_loss(self, end: WorkerEnded, takes_part: bool) -> bool:
        """``takes_part``: the script has asked for recovery. One that has not runs as under torchrun: its end is its
        own affair."""
        seat = end.worker.seat
        assert seat is not None
        if self._was_told_to(end):
            self._done.add(seat.rank)
            return False
        if self.released or (end.status == 0 and not takes_part):
            if end.status:
                self._late_failures.append(f"rank {seat.rank} failed after its last step: {end.cause}")
            self._done.add(seat.rank)
            return False
        if end.status == 0:
            # Frameworks leave in the middle (a time limit, a signal), all ranks at once: then nothing was lost. Those
            # of other nodes, too: else this one is not dismissed in time.
            self._leaving[seat.rank] = (end, time.monotonic() + _LEAVE_TOGETHER)
            return False
        return True

    def stayed_alone(self) -> list[WorkerEnded]:
        """Ranks that left although others stay, here or on other nodes: to these they are lost."""
        now = time.monotonic()
        alone = [end for end, due in self._leaving.values() if now >= due]
        for end in alone:
            assert end.worker.rank is not None
            del self._leaving[end.worker.rank]
            self._is_told = False
        return alone

    def result(self) -> str | None:
        """Told once, as soon as every rank is done or has left: what was wrong all the same, or nothing."""
        if self._is_told or not self.ranks or not self.ranks <= self._done | self._leaving.keys():
            return None
        self._is_told = True
        if self.passed_on is not None:
            return f"told to end by {self.passed_on.name}"
        return "; ".join(self._late_failures)

    def still_here(self) -> list[Rank]:
        return sorted(self.ranks - self._done - self._leaving.keys())

    def begin_anew(self) -> None:
        """All workers are started again."""
        self._done.clear()
        self._leaving.clear()
        self._is_told = False

    def _was_told_to(self, end: WorkerEnded) -> bool:
        number = self.passed_on
        if number is None:
            return False
        return end.status == 0 or end.exit_code == 128 + number or os.WTERMSIG(end.status) == number
