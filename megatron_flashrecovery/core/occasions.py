"""When a diagnosis of the records is worth its time: somebody has become slow, or incidents have come together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_flashrecovery.core.ids import Rank

SETTLED_AFTER = 10.0
"""Seconds for which the job must have trained: others that are slow as well are named in this time, and the machines
are not busy with a recovery."""
EVERY = 120.0
"""Seconds from the end of one to the beginning of the next."""
LEAST_INCIDENTS = 3
"""Two in the same place may be chance, whatever the place is."""


@dataclass
class Occasions:
    """One writer owns it: the controller."""

    slow: frozenset[Rank] = frozenset()
    incidents: int = 0
    due: str = ""
    training_since: float | None = None
    not_before: float = 0.0

    def note_slow(self, slow: Collection[Rank], now: float) -> None:
        """All who are at the moment."""
        if more := sorted(frozenset(slow) - self.slow):
            ranks = ", ".join(map(str, more[:8])) + (", ..." if len(more) > 8 else "")
            self.due = f"rank {ranks} {'is' if len(more) == 1 else 'are'} slow"
            self.not_before = max(self.not_before, now + SETTLED_AFTER)
        self.slow = frozenset(slow)

    def note_incidents(self, number: int, now: float) -> None:
        """So many more, whatever they were: which of them count is for the diagnosis to say."""
        self.incidents += number
        if number and self.incidents >= LEAST_INCIDENTS:
            self.due = f"{self.incidents} incidents so far"

    def look(self, is_training: bool, now: float) -> str | None:
        """What to diagnose now; asked for again once that has ended."""
        if not is_training:
            self.training_since = None
            return None
        if self.training_since is None:
            self.training_since = now
        if not self.due or now < max(self.not_before, self.training_since + SETTLED_AFTER):
            return None
        due, self.due = self.due, ""
        return due

    def end(self, now: float) -> None:
        self.not_before = now + EVERY
