"""Which losses a job survives without a checkpoint.

A worker that is lost alone leaves what its agent holds: its own copies, and the mirrors that it kept. A node that is
lost takes all of that along. Pairs are counted only among what is survived alone: a pair that contains a fatal loss is
no news.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import Placement

Peers: TypeAlias = Mapping[Rank, tuple[Rank, ...]]


@dataclass(frozen=True)
class FatalPairs:
    """Pairs that are not survived when both are lost in the same step, out of ``total``; the first few by name."""

    count: int
    total: int
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Survival:
    """What a job does *not* survive."""

    fatal_nodes: tuple[NodeId, ...]
    rank_pairs: FatalPairs
    node_pairs: FatalPairs


def survivable(placement: Placement, peers: Peers, node_of: Mapping[Rank, NodeId], sharded: bool) -> Survival:
    """One lost rank is survived by every job that has a placement, so it is not listed.

    With ``sharded`` optimizers (and for a rank without peers) the mirror is the second copy. Else the big state is only
    in the live memory of data-parallel peers, and one of them has to be left.
    """
    groups = sorted({tuple(sorted(group)) for group in peers.values()})
    copied_live = [] if sharded else [group for group in groups if len(group) > 1]
    crossings = _crossings(placement, copied_live, node_of)
    fatal = tuple(sorted(nodes[0] for nodes in crossings if len(nodes) == 1))
    sizes = Counter(node_of.values())
    sound = len(sizes) - len(fatal)
    node_pairs = sorted(nodes for nodes in crossings if len(nodes) == 2 and not set(nodes) & set(fatal))
    rank_pairs = [group for group in copied_live if len(group) == 2]
    return Survival(
        fatal_nodes=fatal,
        rank_pairs=_fatal_pairs(rank_pairs, len(node_of), label="rank "),
        node_pairs=_fatal_pairs(node_pairs, sound, label=""),
    )


def _crossings(
    placement: Placement, copied_live: Iterable[tuple[Rank, ...]], node_of: Mapping[Rank, NodeId]
) -> set[tuple[NodeId, ...]]:
    """Sets of at most two nodes that hold all copies of something."""
    found = {tuple(sorted({node_of[guest], node_of[host]})) for guest, host in placement.host_of.items()}
    for group in copied_live:
        nodes = tuple(sorted({node_of[rank] for rank in group}))
        if len(nodes) <= 2:
            found.add(nodes)
    return found


def _fatal_pairs(pairs: Iterable[tuple[object, object]], among: int, label: str) -> FatalPairs:
    named = [(f"{label}{one}", f"{label}{other}") for one, other in pairs]
    return FatalPairs(len(named), among * (among - 1) // 2, tuple(named[:3]))
