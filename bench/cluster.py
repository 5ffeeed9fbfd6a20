"""Nodes that exist only by what they tell the coordinator: one recovery of a job of any size, message by message.

The coordinator is the real one, and it is told what it would be told. Simulated are the nodes: nothing is sent, no
process starts, and every node answers an order at once.

The scene: a rank is lost in a backward pass. Its neighbours are caught in operations with it; ranks of the same replica
that wait for those are blocked in communicators that are whole, and freed in a second round; all others park.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from megatron_flashrecovery.core.coordinator import Job, JobConfig
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.layout import megatron_layout
from megatron_flashrecovery.core.messages import (
    Command,
    Drain,
    Event,
    ExecutePlan,
    Loss,
    PlanExecuted,
    RanksReady,
    RanksStood,
    Resume,
    SeatsDescribed,
    StartWorkers,
    WorkersLost,
)
from megatron_flashrecovery.core.mirroring import NoHost, place_mirrors
from megatron_flashrecovery.core.reports import GroupCount, PairCount, Report, Spot, Standing, Update

RANKS_PER_NODE = 8
_TENSOR, _PIPELINE = 4, 4
_AXES = (("tp",), ("pp",), ("dp",), ("tp", "pp"), ("tp", "dp"), ("tp", "dp", "pp"))
_STEP = Step(5)
_USED = GroupCount(issued=9, completed=9, digest=123)
_UNDER_WAY = GroupCount(issued=10, completed=9, digest=456)

Told = Callable[[Event], Sequence[Command]]
"""Applies one event, and returns the orders that follow."""


class Cluster:
    """TP 4, PP 4, the rest data parallel; eight ranks on a node; the groups that Megatron makes along these axes."""

    def __init__(self, size: int) -> None:
        self.layout = megatron_layout(size, tensor=_TENSOR, pipeline=_PIPELINE)
        first_ranks = range(0, size, RANKS_PER_NODE)
        self.seats = {
            NodeId(f"node{first // RANKS_PER_NODE}"): tuple(Rank(first + i) for i in range(RANKS_PER_NODE))
            for first in first_ranks
        }
        self.node_of = {rank: node for node, ranks in self.seats.items() for rank in ranks}
        self.groups = {
            GroupKey(f"{'-'.join(axes)}#{index}"): members
            for axes in _AXES
            for index, members in enumerate(self.layout.groups(*axes))
        }
        self.groups_of: dict[Rank, dict[str, GroupKey]] = {rank: {} for rank in self.node_of}
        for key, members in self.groups.items():
            for rank in members:
                self.groups_of[rank][key.partition("#")[0]] = key
        peers = {rank: members for members in self.layout.groups("dp") for rank in members}
        placement = place_mirrors(peers, self.node_of)
        assert not isinstance(placement, NoHost), placement.reason
        self._peers, self._host_of, self._guests_of = peers, placement.host_of, placement.guests_of()
        self._lives = 0

    def job(self) -> Job:
        return Job.start(JobConfig(), self.seats, sharded=True)

    def start(self, tell: Told) -> None:
        """Until everybody trains."""
        groups_at: dict[NodeId, dict[GroupKey, tuple[Rank, ...]]] = {node: {} for node in self.seats}
        for key, members in self.groups.items():
            groups_at[self.node_of[members[0]]][key] = members
        for node, ranks in self.seats.items():
            hosts = {rank: self._host_of[rank] for rank in ranks}
            peers = {rank: self._peers[rank] for rank in ranks}
            tell(SeatsDescribed(node, Epoch(0), True, hosts, peers, groups_at[node]))
            tell(RanksReady(node, Epoch(0), ranks))

    def lose(self, lost: Rank, tell: Told) -> Resume:
        """One rank, and everything up to the order to train again."""
        self._lives += 1
        node = self.node_of[lost]
        kept = {lost: (Step(_STEP - 1), _STEP)}
        loss = WorkersLost(node, (Loss(lost, WorkerId(f"rank{lost}.{self._lives}"), "killed by SIGKILL"),), kept)
        pending = deque(tell(loss))
        epoch = next(order.epoch for order in pending if isinstance(order, StartWorkers))
        survivors = {node: [rank for rank in ranks if rank != lost] for node, ranks in self.seats.items()}
        for node, ranks in survivors.items():
            pending += tell(self._stood(node, epoch, pending[0].number, ranks, lost))  # type: ignore[union-attr]
        pending += tell(RanksReady(self.node_of[lost], epoch, (lost,)))
        while pending:
            match pending.popleft():
                case Drain(node=node, number=number, sever=severed):
                    concerned = [rank for rank in survivors[node] if not severed.keys().isdisjoint(self._keys(rank))]
                    pending += tell(self._stood(node, epoch, number, concerned, lost, severed))
                case ExecutePlan(node=node):
                    pending += tell(PlanExecuted(node, epoch, self.seats[node]))
                case Resume() as resume:
                    return resume
        raise AssertionError("the recovery came to a halt")

    def _stood(
        self,
        node: NodeId,
        epoch: Epoch,
        number: OrderNumber,
        ranks: Iterable[Rank],
        lost: Rank,
        severed: Mapping[GroupKey, str] | None = None,
    ) -> RanksStood:
        reports = tuple(self._report(rank, lost, severed or {}) for rank in ranks)
        return RanksStood(node, epoch, number, reports)

    def _report(self, rank: Rank, lost: Rank, severed: Mapping[GroupKey, str]) -> Report:
        here, there = self.layout.coords(rank), self.layout.coords(lost)
        counts = dict.fromkeys(self._keys(rank), _USED)
        standing, spot = Standing.PARKED, Spot(self.groups_of[rank]["tp"], "allreduce", 10)
        # Along the pipeline there are sends and receives, and as many of the ones as of the others.
        counts[self.groups_of[rank]["pp"]] = GroupCount(pairs=self._neighbours(rank))
        if here["dp"] == there["dp"]:
            is_beside = here["pp"] == there["pp"] or here["tp"] == there["tp"]
            key = self.groups_of[rank]["pp" if here["tp"] == there["tp"] else "tp"]
            if is_beside or key in severed:
                reason = severed.get(key, "a member was lost")
                standing, spot = Standing.CAUGHT, Spot(key, "allreduce", 10)
                counts[key] = replace(_UNDER_WAY, broken=reason)
            else:
                standing, counts[key] = Standing.BLOCKED, _UNDER_WAY
        for key in severed:
            if key in counts:
                counts[key] = replace(counts[key], broken=severed[key])
        guests = {guest: (Step(_STEP - 1), _STEP) for guest in self._guests_of.get(rank, ())}
        own = (Step(_STEP - 1), _STEP)
        return Report(rank, standing, _STEP, Update.BEFORE, spot, counts, own=own, guests=guests)

    def _neighbours(self, rank: Rank) -> dict[Rank, PairCount]:
        stage = self.layout.coords(rank)["pp"]
        members = self.groups[self.groups_of[rank]["pp"]]
        return {members[other]: PairCount(4, 4) for other in (stage - 1, stage + 1) if 0 <= other < len(members)}

    def _keys(self, rank: Rank) -> Iterable[GroupKey]:
        return self.groups_of[rank].values()
