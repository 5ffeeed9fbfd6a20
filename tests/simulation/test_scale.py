"""One recovery of thousands of ranks: what an event costs does not grow with the job."""

import sys
import time

import pytest

from megatron_flashrecovery.core.coordinator import Job, JobConfig, handle
from megatron_flashrecovery.core.ids import Epoch, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import (
    ExecutePlan,
    Loss,
    PlanExecuted,
    RanksReady,
    RanksStood,
    Resume,
    SeatsDescribed,
    WorkersLost,
)
from megatron_flashrecovery.core.reports import GroupCount, Report, Spot, Standing, Update
from tests.simulation.settings import Model

PER_NODE = 8
VICTIM = Rank(5)


class Cluster:
    """TP 4, PP 4, the rest data parallel; eight ranks a node."""

    def __init__(self, size):
        self.model = Model(4, 4, size // 16, 1, 1, 0, True, "world", False, False)
        self.size = size
        self.seats = {
            NodeId(f"n{index:05}"): tuple(Rank(rank) for rank in range(index * PER_NODE, (index + 1) * PER_NODE))
            for index in range(size // PER_NODE)
        }
        self.job = Job.start(JobConfig(), self.seats, sharded=True)
        self.keys = {
            Rank(rank): [key for kind in ("tp", "pp", "dp", "mp", "world") if (key := self.model.key(rank, kind))]
            for rank in range(size)
        }

    def host_of(self, rank):
        return Rank((rank + PER_NODE) % self.size)

    def described(self, node):
        ranks = self.seats[node]
        groups = {key: members for key, members in self.model.groups.items() if members[0] in ranks}
        peers = {rank: self.model.groups[self.model.key(rank, "dp")] for rank in ranks}
        return SeatsDescribed(node, Epoch(0), True, {rank: self.host_of(rank) for rank in ranks}, peers, groups)

    def report(self, rank, standing=Standing.PARKED, spot=None, done=9):
        is_hit = VICTIM in self.model.groups[self.model.key(rank, "dp")]
        counts = {key: GroupCount(9, 9 if key[:2] != "tp" else done, 123) for key in self.keys[rank]}
        if is_hit:
            standing, spot = Standing.CAUGHT, Spot(self.model.key(rank, "dp"), "grads", 10)
            counts[spot.group] = GroupCount(10, 9, 456, broken="a member was lost")
        guest = Rank((rank - PER_NODE) % self.size)
        steps = (Step(4), Step(5))
        return Report(rank, standing, Step(5), Update.BEFORE, spot, counts, own=steps, guests={guest: steps})

    def start(self):
        for node, ranks in self.seats.items():
            handle(self.job, self.described(node), 0.0)
            handle(self.job, RanksReady(node, Epoch(0), ranks), 0.0)

    def lose(self):
        loss = Loss(VICTIM, WorkerId("5.1"), "killed by SIGKILL")
        return handle(self.job, WorkersLost(NodeId("n00000"), (loss,)), 1.0)

    def stood(self, node, **more):
        reports = tuple(self.report(rank, **more) for rank in self.seats[node] if rank != VICTIM)
        return RanksStood(node, Epoch(1), OrderNumber(1), reports)


def calls_of(function, *arguments):
    """How many functions it calls: a cost that does not depend on the machine."""
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return number


def recover(size):
    """The costliest loss, report, and execution of one recovery; and how many orders it took to go on."""
    cluster = Cluster(size)
    cluster.start()
    costs = {"loss": calls_of(cluster.lose)}
    *nodes, last = cluster.seats
    reports = [cluster.stood(node) for node in nodes]
    costs["report"] = max(calls_of(handle, cluster.job, report, 1.1) for report in reports)
    handle(cluster.job, cluster.stood(last), 1.2)
    plans = handle(cluster.job, RanksReady(NodeId("n00000"), Epoch(1), (VICTIM,)), 2.0)
    assert all(isinstance(plan, ExecutePlan) for plan in plans)
    assert len(plans) == len(cluster.seats)
    done = [PlanExecuted(node, Epoch(1), ranks) for node, ranks in cluster.seats.items()]
    costs["executed"] = max(calls_of(handle, cluster.job, event, 3.0) for event in done[:-1])
    (order,) = handle(cluster.job, done[-1], 3.0)
    assert isinstance(order, Resume)
    (recovery,) = cluster.job.recoveries
    assert recovery.source_of == {VICTIM: f"mirror at rank {VICTIM + PER_NODE}"}
    assert len(recovery.rebuilt) == 6
    return costs


def test_an_event_costs_no_more_in_a_job_four_times_as_large():
    small, large = recover(1024), recover(4096)
    # A dictionary that grows may be one call, a group with more members more entries: a few calls are forgiven.
    assert all(large[what] <= small[what] + 10 for what in small), (small, large)


@pytest.mark.parametrize("size", [2048])
def test_ranks_that_all_wait_for_operations_under_way_are_not_counted_again_for_each_report(size):
    cluster = Cluster(size)
    cluster.start()
    cluster.lose()
    began = time.perf_counter()
    for node in cluster.seats:
        spots = {rank: Spot(cluster.model.key(rank, "tp"), "forward", 9) for rank in cluster.seats[node]}
        reports = [
            cluster.report(rank, Standing.BLOCKED, spots[rank], done=8)
            for rank in cluster.seats[node]
            if rank != VICTIM
        ]
        handle(cluster.job, RanksStood(node, Epoch(1), OrderNumber(1), tuple(reports)), 1.1)
    for node in cluster.seats:
        handle(cluster.job, cluster.stood(node), 1.2)
    assert time.perf_counter() - began < 5.0
    plans = handle(cluster.job, RanksReady(NodeId("n00000"), Epoch(1), (VICTIM,)), 2.0)
    assert len(plans) == len(cluster.seats)
