"""When a diagnosis of the records is worth its time: somebody has become slow, or incidents have come together."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from megatron_flashrecovery.core.ids import NodeId, Rank

SETTLED_AFTER = 10.0
"""Seconds for which the job must have trained: others that are slow as well are named in this time, and the machines
are not busy with a recovery."""
SETTLED_WITHIN = 60.0
"""Seconds from the first that was named slow: a cascade that goes on shall not be waited for."""
EVERY = 120.0
"""Seconds from the end of one to the beginning of the next."""
LEAST_INCIDENTS = 3
"""Two in the same place may be chance, whatever the place is."""
GROWTH = 1.5
"""At 3, 5, 8, 12, 18 incidents, and so on: each look finds somebody in some healthy jobs, so there must be few."""
SAME_INCIDENT = 10.0
"""Seconds: one fault takes several workers of a host, one after the other."""


def share_of_look(incidents: int) -> float:
    """The part of the level that a look at so many incidents may spend: 1/2 at the first one, then 1/3, 1/4, ... All
    looks of a job see the same incidents and some more, so they are wrong together, and the parts may add up to more
    than 1: measured, all looks at up to 93 incidents are wrong in less than ``level`` of healthy jobs
    (tests/diagnose/test_calibration.py). Shares that add up to 1 were wrong in none of 600 jobs, and need more
    incidents."""
    number, due = 1, LEAST_INCIDENTS
    while incidents > due:
        number, due = number + 1, _next_due(due)
    return 1 / (number + 1)


def _next_due(due: int) -> int:
    return math.ceil(GROWTH * due)


@dataclass
class Occasions:
    """One writer owns it: the controller."""

    slow: frozenset[Rank] = frozenset()
    slow_since: float | None = None
    incidents: int = 0
    due_at: int = LEAST_INCIDENTS
    counted: dict[NodeId, float] = field(default_factory=dict)
    due: str = ""
    training_since: float | None = None
    not_before: float = 0.0

    def note_slow(self, slow: Collection[Rank], now: float) -> None:
        """All who are at the moment."""
        if more := sorted(frozenset(slow) - self.slow):
            ranks = ", ".join(map(str, more[:8])) + (", ..." if len(more) > 8 else "")
            self.due = f"rank {ranks} {'is' if len(more) == 1 else 'are'} slow"
            self.slow_since = now if self.slow_since is None else self.slow_since
            self.not_before = max(self.not_before, min(now + SETTLED_AFTER, self.slow_since + SETTLED_WITHIN))
        self.slow = frozenset(slow)

    def note_incident(self, node: NodeId, now: float) -> None:
        """Something was lost there, whatever it was: which of them count is for the diagnosis to say."""
        if now <= self.counted.get(node, -math.inf) + SAME_INCIDENT:
            return
        self.counted[node] = now
        self.incidents += 1
        if self.incidents >= self.due_at:
            self.due_at = _next_due(self.due_at)
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
        due, self.due, self.slow_since = self.due, "", None
        return due

    def end(self, now: float) -> None:
        self.not_before = now + EVERY
