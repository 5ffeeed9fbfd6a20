"""The seats of a job: what never changes about a rank, and on which node it sits now.

A seat outlives its workers and even its node. Groups, data-parallel peers and the placement of mirrors belong to seats,
so a replacement changes none of them. They are told once per start, per node, and cost what they hold: the members of a
group are told by the node of its first member, and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_flashrecovery.core.ids import GroupKey, NodeId, Rank
from megatron_flashrecovery.core.messages import SeatsDescribed


class Seats:
    """One writer owns it: the job."""

    def __init__(self, seats: Mapping[NodeId, tuple[Rank, ...]]) -> None:
        self.ranks_on: dict[NodeId, set[Rank]] = {node: set(ranks) for node, ranks in seats.items()}
        self.node_of: dict[Rank, NodeId] = {rank: node for node, ranks in seats.items() for rank in ranks}
        self.homeless: set[Rank] = set()
        self.forget()

    def __len__(self) -> int:
        return len(self.node_of) + len(self.homeless)

    def __contains__(self, rank: Rank) -> bool:
        return rank in self.node_of or rank in self.homeless

    def forget(self) -> None:
        """A new start of the whole job describes its seats anew."""
        self.described: set[Rank] = set()
        self.sharded: bool | None = None
        self.members_of: dict[GroupKey, tuple[Rank, ...]] = {}
        self.groups_of: dict[Rank, list[GroupKey]] = {}
        self.host_of: dict[Rank, Rank] = {}
        self.guests_of: dict[Rank, list[Rank]] = {}
        self.peers_of: dict[Rank, tuple[Rank, ...]] = {}

    def describe(self, event: SeatsDescribed) -> None:
        """Repeating a description changes nothing."""
        self.sharded = event.sharded
        self.described.update(event.peers)
        self.peers_of.update(event.peers)
        for guest, host in event.hosts.items():
            if guest not in self.host_of:
                self.host_of[guest] = host
                self.guests_of.setdefault(host, []).append(guest)
        for key, members in event.groups.items():
            if key not in self.members_of:
                self.members_of[key] = members
                for rank in members:
                    self.groups_of.setdefault(rank, []).append(key)

    def groups_with(self, ranks: Iterable[Rank]) -> dict[GroupKey, Rank]:
        """The groups that have one of these members, with the smallest of these members."""
        found: dict[GroupKey, Rank] = {}
        for rank in sorted(ranks):
            for key in self.groups_of.get(rank, ()):
                found.setdefault(key, rank)
        return found

    def evict(self, node: NodeId) -> tuple[Rank, ...]:
        """The node is gone; its seats wait for another one."""
        ranks = tuple(sorted(self.ranks_on.pop(node, ())))
        for rank in ranks:
            del self.node_of[rank]
        self.homeless.update(ranks)
        return ranks

    def house(self, node: NodeId, room: int) -> tuple[Rank, ...]:
        """Seat as many of the homeless as there is room for, and say which."""
        ranks = tuple(sorted(self.homeless)[:room])
        self.homeless.difference_update(ranks)
        self.ranks_on.setdefault(node, set()).update(ranks)
        self.node_of.update(dict.fromkeys(ranks, node))
        return ranks

    def by_node(self, ranks: Iterable[Rank]) -> dict[NodeId, tuple[Rank, ...]]:
        """Housed ranks by node, both in order."""
        found: dict[NodeId, list[Rank]] = {}
        for rank in sorted(ranks):
            if rank in self.node_of:
                found.setdefault(self.node_of[rank], []).append(rank)
        return {node: tuple(found[node]) for node in sorted(found)}
