"""Whom a job waits for, in words."""

from __future__ import annotations

from megatron_flashrecovery.core.coordinator import Job, JobConfig, handle
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, WorkerId
from megatron_flashrecovery.core.messages import Loss, NodeJoined, NodeLost, RanksReady, SeatsDescribed, WorkersLost
from megatron_flashrecovery.core.waiting import whom_for

NODE = NodeId("node0")
RANKS = tuple(Rank(rank) for rank in range(4))


def job_in_training() -> Job:
    job = Job.start(JobConfig(), {NODE: RANKS}, sharded=True)
    peers = dict.fromkeys(RANKS, RANKS)
    handle(job, SeatsDescribed(NODE, Epoch(0), True, {}, peers, {}), 0.0)
    handle(job, RanksReady(NODE, Epoch(0), RANKS), 0.0)
    return job


def test_at_the_start_for_whoever_is_not_ready() -> None:
    job = Job.start(JobConfig(), {NODE: RANKS}, sharded=True)
    handle(job, RanksReady(NODE, Epoch(0), RANKS[1:]), 0.0)
    assert whom_for(job) == "rank 0 to come to the first step"


def test_everybody_is_said_in_one_word() -> None:
    assert whom_for(Job.start(JobConfig(), {NODE: RANKS}, sharded=True)) == "all 4 ranks to come to the first step"


def test_in_training_for_nobody() -> None:
    assert whom_for(job_in_training()) is None


def test_after_a_loss_for_whoever_has_not_stopped() -> None:
    job = job_in_training()
    handle(job, WorkersLost(NODE, (Loss(Rank(2), WorkerId("rank2.1"), "killed", Epoch(0)),)), 1.0)
    assert whom_for(job) == "rank 0, 1, 3 to stop at the next operation"


def test_seats_whose_node_is_lost_wait_for_another_one() -> None:
    other = NodeId("node1")
    job = Job.start(JobConfig(), {NODE: RANKS[:2], other: RANKS[2:]}, sharded=True)
    peers = dict.fromkeys(RANKS, RANKS)
    handle(job, SeatsDescribed(NODE, Epoch(0), True, {}, peers, {}), 0.0)
    handle(job, RanksReady(NODE, Epoch(0), RANKS), 0.0)
    handle(job, NodeLost(other, "connection closed"), 1.0)
    assert whom_for(job) == "rank 2, 3 to get a spare node"
    handle(job, NodeJoined(NodeId("node2"), 2), 2.0)
    assert whom_for(job) == "rank 0, 1 to stop at the next operation"
