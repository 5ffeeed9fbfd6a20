"""Which nodes are heard late, though not so late that they are lost: by the gaps between their messages.

An agent says something in every interval. A gap of more than two of them is a message that was lost and sent again, a
network that stood still, or a machine that was starved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_flashrecovery.core.ids import NodeId

EVERY = 10.0
_LATE = 2.0
"""Intervals."""


@dataclass(frozen=True)
class Gaps:
    """``late`` gaps of one node, of which the ``worst`` took so many seconds."""

    late: int
    worst: float


@dataclass
class Punctuality:
    """One writer owns it: the controller."""

    interval: float
    heard: dict[NodeId, float] = field(default_factory=dict)
    gaps: dict[NodeId, Gaps] = field(default_factory=dict)
    told_at: float = 0.0

    def hear(self, node: NodeId, now: float) -> None:
        gap = now - self.heard.get(node, now)
        self.heard[node] = now
        if gap > _LATE * self.interval:
            before = self.gaps.get(node, Gaps(0, 0.0))
            self.gaps[node] = Gaps(before.late + 1, round(max(before.worst, gap), 3))

    def excuse(self, seconds: float) -> None:
        """For so long nobody could be heard."""
        self.heard = {node: heard + seconds for node, heard in self.heard.items()}

    def forget(self, node: NodeId) -> None:
        self.heard.pop(node, None)

    def look(self, now: float) -> dict[NodeId, Gaps]:
        """What has come together since it was told last; at most once in ten seconds."""
        if not self.gaps or now < self.told_at + EVERY:
            return {}
        told, self.gaps, self.told_at = self.gaps, {}, now
        # If most were late it was the controller that did not listen: that says nothing of them, and a line for each
        # would keep it from listening again.
        return told if len(told) <= max(1, len(self.heard) // 2) else {}
