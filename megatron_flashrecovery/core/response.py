"""What is done about faults of ranks: each is looked up in the table, and the gravest of what it says happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, Fence
from megatron_flashrecovery.core.phases import Starting
from megatron_flashrecovery.core.policy import (
    AGAIN,
    BLAMED,
    FRUITLESS,
    LOST_OFTEN,
    MISSED_OFTEN,
    SUSPECTS_A_DEVICE,
    Action,
    Fault,
    Rule,
    decide,
)
from megatron_flashrecovery.core.staffing import fall_back, halt, open_epoch, restart

SHOWN = 8
_GRAVEST_FIRST = (Action.STOP, Action.START_ANEW, Action.FALL_BACK, Action.REPLACE_NODE)


@dataclass(frozen=True)
class Mishap:
    """One rank, and what happened to it. ``step`` and ``raised`` as in ``Loss``."""

    fault: Fault
    cause: str
    again: bool = False
    step: Step | None = None
    raised: str | None = None

    @property
    def suspects_a_device(self) -> bool:
        """An access to memory that does not exist is as often a bug as a broken device: as long as the driver itself
        does not complain, it is judged by how often the seat is lost."""
        is_of_the_script = self.raised is not None and self.fault is Fault.DEVICE_ERROR
        return self.fault in SUSPECTS_A_DEVICE and not is_of_the_script


def respond(
    job: Job, mishaps: Mapping[Rank, Mishap], why: str, now: float, fenced: Sequence[Rank] = ()
) -> list[Command]:
    """Workers of these ranks are gone, or are to be ended now (``fenced``)."""
    orders = _fence(job, mishaps, fenced, why)
    for rank, mishap in mishaps.items():
        job.setbacks[rank] += 1
        if mishap.suspects_a_device and rank in job.seats.node_of:
            job.suspect(rank)
    rules = {
        rank: decide(mishap.fault, replace(job.history(now, rank), again=mishap.again))
        for rank, mishap in mishaps.items()
    }
    for action in _GRAVEST_FIRST:
        if said := {rank: rule for rank, rule in rules.items() if rule.action is action}:
            return orders + _do(job, action, said, mishaps, why, now)
    return orders + open_epoch(job, {rank: mishap.cause for rank, mishap in mishaps.items()}, why, now)


def plan_anew(job: Job, why: str, now: float) -> list[Command]:
    """A plan that was not executed: stop everybody and make another one, but not for ever."""
    job.rounds += 1
    if decide(Fault.DEADLINE, job.history(now)).action is Action.PLAN_ANEW:
        return open_epoch(job, {}, why, now)
    return fall_back(job, f"{job.rounds} deadlines missed in one recovery, the last: {why}", now)


def _fence(job: Job, mishaps: Mapping[Rank, Mishap], fenced: Sequence[Rank], why: str) -> list[Command]:
    """End workers for good; what they leave is heard of from their agents."""
    orders: list[Command] = []
    for node, ranks in job.seats.by_node(fenced).items():
        by_fault: dict[Fault, list[Rank]] = {}
        for rank in ranks:
            by_fault.setdefault(mishaps[rank].fault, []).append(rank)
        orders += [Fence(node, tuple(some), why, Epoch(job.epoch + 1), fault) for fault, some in by_fault.items()]
    for rank in fenced:
        job.vault.pop(rank, None)
        job.fenced[rank] = job.started_for(rank)
    return orders


def _do(
    job: Job, action: Action, said: Mapping[Rank, Rule], mishaps: Mapping[Rank, Mishap], why: str, now: float
) -> list[Command]:
    # Of several that were lost too often it is the one that was lost most often.
    rank = max(said, key=lambda rank: (job.setbacks[rank], -rank))
    when = said[rank].when
    match action:
        case Action.STOP if when == AGAIN[0]:
            return halt(job, _same_again({rank: mishaps[rank] for rank in said}))
        case Action.STOP:
            return halt(job, f"{why}; {_leave_out(job, rank)}")
        case Action.START_ANEW:
            return restart(job, f"lost before everybody had started: {why}", now)
        case Action.FALL_BACK:
            return fall_back(job, f"{_too_often(job, rank, when, now)}: {why}", now)
        case Action.REPLACE_NODE:
            return _replace_nodes(job, _to_leave_out(job, said), mishaps, why, now)
        case _:
            _unreachable(action)


def _to_leave_out(job: Job, said: Mapping[Rank, Rule]) -> set[NodeId]:
    """For a diagnosis one node at a time, and none beside others: each had the room alone, and of several the copies
    would be gone together. Whoever was lost elsewhere gets a new process there."""
    node_of = {rank: job.seats.node_of[rank] for rank in said if rank in job.seats.node_of}
    others = {node for rank, node in node_of.items() if said[rank].when != BLAMED[0]}
    return others or set(sorted(node_of.values())[:1])


def _replace_nodes(job: Job, nodes: set[NodeId], mishaps: Mapping[Rank, Mishap], why: str, now: float) -> list[Command]:
    """These still answer, but nobody sits there any more. (Of a node that is gone the seats are evicted already.)"""
    losses = {rank: mishap.cause for rank, mishap in mishaps.items()}
    orders: list[Command] = []
    for node in sorted(nodes):
        ranks = tuple(sorted(job.seats.ranks_on[node]))
        job.capacity.pop(node, None)
        orders.append(Fence(node, ranks, f"{node} is left out: {why}", Epoch(job.epoch + 1), Fault.NODE_LOST))
        job.seats.evict(node)
        for rank in ranks:
            job.vault.pop(rank, None)
            job.fenced.pop(rank, None)
            losses.setdefault(rank, f"{node} is left out")
    if isinstance(job.phase, Starting):
        return orders + restart(job, f"lost before everybody had started: {why}", now)
    return orders + open_epoch(job, losses, why, now)


def _too_often(job: Job, rank: Rank, when: str, now: float) -> str:
    match when:
        case when if when == LOST_OFTEN[0]:
            return f"rank {rank} was lost {job.setbacks[rank]} times without progress"
        case when if when == FRUITLESS[0]:
            return fruitless(job, now)
        case when if when == MISSED_OFTEN[0]:
            return f"{job.rounds} deadlines missed in one recovery, the last"
        case _:
            return f"rank {rank}: {when}"


def fruitless(job: Job, now: float) -> str:
    minutes = job.config.fruitless_window / 60
    return f"{job.history(now).fruitless} recoveries in {minutes:g} minutes without a completed step, the last"


def _leave_out(job: Job, rank: Rank) -> str:
    node = job.seats.node_of[rank]
    times = job.suspicions[node, rank]
    what = "is of no more use" if times == 1 else f"was suspected {times} times"
    return f"the device of rank {rank} on {node} {what}, and no other node has room: start the job again without {node}"


def _same_again(mishaps: Mapping[Rank, Mishap]) -> str:
    """A replacement on the same state, with the same data, came to the same end: so would all that follow."""
    ranks = ", ".join(map(str, list(mishaps)[:SHOWN])) + (", ..." if len(mishaps) > SHOWN else "")
    first = next(iter(mishaps.values()))
    where = f"in step {first.step}" if first.step is not None else "before its first step"
    what = first.raised or first.fault.value
    if first.fault is Fault.DEVICE_MEMORY:
        remedy = "the device has not enough memory, use a smaller micro batch or recompute more"
        return f"rank {ranks} raised the same exception {where} again after a retry: {remedy}: {what}"
    if first.fault is not Fault.EXCEPTION:
        return f"rank {ranks}: {what} {where} again after a retry: {first.cause}"
    return f"rank {ranks} raised the same exception {where} again after a retry, so it is the script's: {what}"


def _unreachable(action: Action) -> NoReturn:
    raise AssertionError(f"{action} is not done about a rank")
