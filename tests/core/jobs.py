"""Small jobs to play events to."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.coordinator import Job, JobConfig, handle
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import (
    Command,
    Event,
    Loss,
    PlanExecuted,
    RanksReady,
    RanksStood,
    SeatsDescribed,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Executing
from megatron_flashrecovery.core.reports import GroupCount, PairCount, Report, Spot, Standing, Update
from megatron_flashrecovery.core.seats import Seats

A, B = NodeId("a"), NodeId("b")
GROUPS = {
    "tp0": (0, 1),
    "tp1": (2, 3),
    "dp0": (0, 2),
    "dp1": (1, 3),
    "world": (0, 1, 2, 3),
}
HOSTS = {0: 2, 1: 3, 2: 0, 3: 1}
SEATS = {A: (Rank(0), Rank(1)), B: (Rank(2), Rank(3))}
CONFIG = JobConfig(drain_timeout=10.0, drain_grace=2.0, join_timeout=60.0, execute_timeout=30.0, max_rounds=2)


def key(name: str) -> GroupKey:
    return GroupKey(name)


def described(node: NodeId, sharded: bool = True, epoch: int = 0) -> SeatsDescribed:
    ranks = SEATS[node]
    return SeatsDescribed(
        node,
        Epoch(epoch),
        sharded,
        {rank: Rank(HOSTS[rank]) for rank in ranks},
        {rank: tuple(Rank(peer) for peer in GROUPS[f"dp{rank % 2}"]) for rank in ranks},
        {key(name): tuple(map(Rank, members)) for name, members in GROUPS.items() if members[0] in ranks},
    )


def ready(node: NodeId, *ranks: int, epoch: int = 0) -> RanksReady:
    return RanksReady(node, Epoch(epoch), tuple(map(Rank, ranks)))


def lost(node: NodeId, *ranks: int, kept: tuple[int, ...] = (), life: int = 1) -> WorkersLost:
    losses = tuple(Loss(Rank(rank), WorkerId(f"{rank}.{life}"), "killed by SIGKILL") for rank in ranks)
    return WorkersLost(node, losses, {Rank(rank): tuple(map(Step, kept)) for rank in ranks})


def report(
    rank: int,
    step: int = 5,
    update: Update = Update.BEFORE,
    standing: Standing = Standing.PARKED,
    spot: Spot | None = None,
    counts: Mapping[str, GroupCount] | None = None,
    own: tuple[int, ...] | None = None,
    guests: tuple[int, ...] | None = None,
    told: tuple = (),
) -> Report:
    """A rank that stands at ``step`` with the snapshots of this step and the one before, own and of its guest."""
    pair = tuple(map(Step, (step - 1, step)))
    kept = pair if guests is None else tuple(map(Step, guests))
    guest = next(Rank(guest) for guest, host in HOSTS.items() if host == rank)
    return Report(
        Rank(rank),
        standing,
        Step(step),
        update,
        spot,
        {key(name): count for name, count in (counts or {}).items()},
        own=pair if own is None else tuple(map(Step, own)),
        guests={guest: kept} if kept else {},
        told=told,
    )


def stood(*reports: Report, epoch: int = 1, number: int = 1) -> RanksStood:
    node = A if reports[0].rank in SEATS[A] else B
    return RanksStood(node, Epoch(epoch), OrderNumber(number), reports)


def used(number: int, completed: int | None = None, digest: int = 7, broken: str | None = None) -> GroupCount:
    return GroupCount(number, number if completed is None else completed, digest, broken=broken)


def pairs(broken: str | None = None, **counts: tuple[int, int, int]) -> GroupCount:
    """``r1=(sent, received, open)`` for each peer."""
    return GroupCount(pairs={Rank(int(peer[1:])): PairCount(*count) for peer, count in counts.items()}, broken=broken)


def play(job: Job, *events: Event, now: float = 0.0) -> list[Command]:
    """Apply the events at ``now``, and return the orders that followed from the last one."""
    commands: list[Command] = []
    for event in events:
        commands = handle(job, event, now)
    return commands


def training_job(sharded: bool = True, config: JobConfig = CONFIG) -> Job:
    job = Job.start(config, SEATS, sharded)
    play(job, described(A, sharded), described(B, sharded), ready(A, 0, 1), ready(B, 2, 3))
    return job


def draining_job(*ranks: int, sharded: bool = True, kept: tuple[int, ...] = ()) -> Job:
    """A job that has just lost these ranks, in epoch 1, with park order 1."""
    job = training_job(sharded)
    for node, seats in SEATS.items():
        if here := [rank for rank in ranks if rank in seats]:
            play(job, lost(node, *here, kept=kept))
    return job


def executed(node: NodeId, *ranks: int, epoch: int = 1) -> PlanExecuted:
    return PlanExecuted(node, Epoch(epoch), tuple(map(Rank, ranks)))


def executing_job() -> Job:
    """Rank 3 was lost, everybody has stopped, its replacement is ready."""
    job = draining_job(3)
    play(job, stood(report(0), report(1)), stood(report(2)), ready(B, 3, epoch=1), now=1.0)
    assert isinstance(job.phase, Executing)
    return job


def recovered_job() -> Job:
    job = executing_job()
    play(job, executed(A, 0, 1), executed(B, 2, 3), now=2.0)
    return job


def census_of(*reports: Report, sharded: bool = True, doomed: Mapping[str, str] | None = None) -> Census:
    seats = Seats(SEATS)
    seats.describe(described(A, sharded))
    seats.describe(described(B, sharded))
    census = Census(seats, {key(name): reason for name, reason in (doomed or {}).items()})
    for one in reports:
        census.record(one, OrderNumber(1))
    return census
