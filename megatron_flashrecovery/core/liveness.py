"""Who has been silent for too long. Heartbeats are kept by whoever hears them; the rule is here.

Silence is the last resort of detection: the operating system tells of a dead process, a closed connection tells of a
dead agent. What is left are nodes that vanish without a word and workers that hang.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def overdue(last_seen: Mapping[Name, float], now: float, timeout: float) -> frozenset[Name]:
    """Whoever was last seen ``timeout`` seconds ago or longer."""
    return frozenset(name for name, seen in last_seen.items() if now - seen >= timeout)


def next_check(last_seen: Mapping[Name, float], timeout: float) -> float | None:
    """The earliest moment at which somebody can become overdue; ``None`` if nobody is watched."""
    return min(last_seen.values()) + timeout if last_seen else None
