"""The own time of the ranks of one node, step by step: cut into windows, and told only as often as it has news.

Ranks keep sums (seconds computed and waited in how many steps), so a window can be of any length, and one that was
missed is only a longer one. All windows are told at the beginning, and for a while after a rank took another time than
usual; else one in a minute, for what all nodes of a large job say in a day fills a disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.pace import Spent

EVERY = 1.0
"""Seconds that a window has at least; a whole step is the other limit."""
_SELDOM = 60.0
_SOON = 10
"""So many windows are told after the beginning, or after one that was not usual."""
_USUAL = 0.1
"""A tenth more or less is."""
_KEPT = 32
_DIGITS = 7


@dataclass(frozen=True)
class Window:
    """Mean seconds of a step, by rank."""

    computed: Mapping[Rank, float]
    waited: Mapping[Rank, float]


@dataclass
class Timing:
    """One writer owns it: whoever watches the node. Begin with a new one in every epoch."""

    ended: float | None = None
    told: float = 0.0
    soon: int = _SOON
    sums: dict[Rank, Spent] = field(default_factory=dict)
    past: dict[Rank, deque[float]] = field(default_factory=dict)

    def look(self, spent_of: Mapping[Rank, Spent], now: float) -> Window | None:
        """What is worth telling. A window ends when every rank of the node has completed a step in it."""
        if self.ended is None:
            self.ended, self.sums = now, dict(spent_of)
        for rank, spent in spent_of.items():
            before = self.sums.get(rank)
            if before is None or spent.steps < before.steps:  # another process sits there now
                self.sums[rank] = spent
        if now < self.ended + EVERY or any(spent.steps == self.sums[rank].steps for rank, spent in spent_of.items()):
            return None
        means = {rank: _mean(self.sums[rank], spent) for rank, spent in spent_of.items()}
        window = Window(*({rank: mean[which] for rank, mean in means.items()} for which in (0, 1)))
        self.ended, self.sums = now, dict(spent_of)
        return window if window.computed and self._is_news(window, now) else None

    def _is_news(self, window: Window, now: float) -> bool:
        unusual = [rank for rank, seconds in window.computed.items() if not self._is_usual(rank, seconds)]
        self.soon = _SOON if unusual else self.soon - 1
        if self.soon < 0 and now < self.told + _SELDOM:
            return False
        self.told = now
        return True

    def _is_usual(self, rank: Rank, seconds: float) -> bool:
        past = self.past.setdefault(rank, deque(maxlen=_KEPT))
        past.append(seconds)
        usual = median(past)
        return abs(seconds - usual) <= _USUAL * usual


def _mean(before: Spent, spent: Spent) -> tuple[float, float]:
    steps = spent.steps - before.steps
    computed, waited = spent.computed - before.computed, spent.waited - before.waited
    return round(computed / steps, _DIGITS), round(waited / steps, _DIGITS)
