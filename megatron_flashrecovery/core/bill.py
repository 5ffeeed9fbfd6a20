"""What the second copies cost: host memory for each node, and bytes over the network for each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import Placement

SLOTS = 2
"""Owner and host keep two steps, s and s + 1 (DESIGN, invariant 1)."""


@dataclass(frozen=True)
class NodeBill:
    """Bytes. ``sent`` and ``received`` are per step, and count only what crosses the border of the node."""

    node: NodeId
    ranks: int
    own: int
    guests: int
    sent: int
    received: int

    @property
    def memory(self) -> int:
        return self.own + self.guests


@dataclass(frozen=True)
class Bill:
    """``mirrored`` is what one rank (the largest) hands to its host in each step."""

    mirrored: int
    nodes: tuple[NodeBill, ...]

    @property
    def memory(self) -> int:
        return sum(node.memory for node in self.nodes)

    def shortage(self, available: Mapping[NodeId, int]) -> str | None:
        """The first node whose memory does not hold its copies, in words; None if all do. Unknown nodes pass."""
        for node in self.nodes:
            if node.memory > available.get(node.node, node.memory):
                return (
                    f"node {node.node} has {readable(available[node.node])} of free memory and needs "
                    f"{readable(node.memory)} for the copies of its {node.ranks} ranks and their guests: "
                    f"use more data-parallel ranks or larger nodes"
                )
        return None


def bill(placement: Placement, node_of: Mapping[Rank, NodeId], unique_nbytes: Mapping[Rank, int]) -> Bill:
    """``unique_nbytes[rank]`` is what only this rank has: the size of one of its snapshots."""
    own: dict[NodeId, int] = defaultdict(int)
    kept: dict[NodeId, int] = defaultdict(int)
    sent: dict[NodeId, int] = defaultdict(int)
    received: dict[NodeId, int] = defaultdict(int)
    ranks: dict[NodeId, int] = defaultdict(int)
    for guest, host in placement.host_of.items():
        here, there, nbytes = node_of[guest], node_of[host], unique_nbytes[guest]
        ranks[here] += 1
        own[here] += SLOTS * nbytes
        kept[there] += SLOTS * nbytes
        if here != there:
            sent[here] += nbytes
            received[there] += nbytes
    nodes = (NodeBill(node, ranks[node], own[node], kept[node], sent[node], received[node]) for node in sorted(ranks))
    return Bill(max(unique_nbytes.values()), tuple(nodes))


def readable(nbytes: float) -> str:
    """For people: three digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError("the last unit always returns")
