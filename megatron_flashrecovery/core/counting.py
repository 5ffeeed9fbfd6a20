"""Counters of one node that only grow: by how much they have grown, told only as often as that is news.

What is told covers all the time since the last telling, so rates can be had exactly, and silence means that nothing
has grown, or that it grows as it did. The names of counters say whose they are: ``tcp.sent``, ``nic.eth0.rx_errors``,
``device.0000:3b:00.pcie_replays``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EVERY = 10.0
"""Seconds between two looks. The operating system keeps count, so nothing is missed in between."""
SELDOM = 600.0
_OTHER = 2.0
"""Twice or half the rate that was told last is news; so is what had not grown before."""
TRAFFIC = frozenset({"tcp.sent"})
"""What grows because the job works: others are compared with it, and it is no news by itself."""


@dataclass(frozen=True)
class Growth:
    """In so many seconds; counters that have not grown are left out."""

    seconds: float
    grown: Mapping[str, int]


@dataclass
class Counting:
    """One writer owns it: whoever watches the node."""

    next_look: float = 0.0
    told_at: float | None = None
    told: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def is_due(self, now: float) -> bool:
        return now >= self.next_look

    def look(self, counters: Mapping[str, int], now: float) -> Growth | None:
        """What is worth telling."""
        self.next_look = now + EVERY
        if self.told_at is None:
            self.told_at, self.told = now, dict(counters)
            return None
        grown: dict[str, int] = {}
        for name, value in counters.items():
            before = self.told.setdefault(name, value)  # it has just come
            if value < before:
                self.told[name] = value  # it has begun anew, with its driver
            elif value > before:
                grown[name] = value - before
        seconds = now - self.told_at
        if seconds <= 0 or not self._is_news(grown, seconds):
            return None
        self.told_at, self.told = now, dict(counters)
        self.rates = {name: number / seconds for name, number in grown.items()}
        return Growth(round(seconds, 3), grown)

    def _is_news(self, grown: Mapping[str, int], seconds: float) -> bool:
        for name in grown.keys() - TRAFFIC:
            usual = self.rates.get(name, 0.0) * seconds
            if seconds >= SELDOM or grown[name] > _OTHER * usual:
                return True
        # What has ended is news once: the rate until then is not the one of the time that follows.
        return any(grown.get(name, 0) * _OTHER < rate * seconds for name, rate in self.rates.items())
