"""Who starts when its predecessor has ended: a process that was killed holds memory, of the host and of a device, until
the kernel is done with it, which takes seconds when it has a large device context. Its successor would find no room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.runtime.saying import say
from megatron_flashrecovery.runtime.workers import Worker

_LONGEST = 20.0
"""Seconds. A process that is stuck in a driver may never end; its successor is let loose then, and may have luck."""
_SILENT_FOR = 2.0


@dataclass
class _Turn:
    joining: bool
    since: float
    is_told: bool = False


class Succession:
    """Of the seats of one node. ``patience`` and ``clock`` in seconds."""

    def __init__(
        self, living: Callable[[], Iterable[Worker]], patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._living = living
        self._patience = min(patience, _LONGEST)
        self._clock = clock
        self._turns: dict[Rank, _Turn] = {}

    def enter(self, ranks: Sequence[Rank], *, joining: bool) -> None:
        """Instead of what was to start there before, and no later."""
        for rank in ranks:
            before = self._turns.get(rank)
            self._turns[rank] = _Turn(joining, self._clock() if before is None else before.since)

    def __bool__(self) -> bool:
        return bool(self._turns)

    def drop(self, ranks: Iterable[Rank]) -> None:
        for rank in ranks:
            self._turns.pop(rank, None)

    def due(self) -> list[tuple[Rank, bool]]:
        """Ranks that may start now, each once, and whether they join."""
        if not self._turns:
            return []
        now = self._clock()
        in_the_way = {worker.rank: worker for worker in self._living() if worker.rank in self._turns}
        for rank, turn in self._turns.items():
            waited = now - turn.since
            if (before := in_the_way.get(rank)) is None or waited < _SILENT_FOR:
                continue
            if waited >= self._patience:
                say(
                    f"process {before.pid} of rank {rank} has not ended for {waited:.0f} s; its successor starts anyway"
                )
                del in_the_way[rank]
            elif not turn.is_told:
                turn.is_told = True
                say(f"rank {rank} starts when process {before.pid} has ended, or in {self._patience - waited:.0f} s")
        due = [(rank, turn.joining) for rank, turn in self._turns.items() if rank not in in_the_way]
        self.drop(rank for rank, _ in due)
        return due
