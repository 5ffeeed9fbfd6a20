"""Workers and nodes that are gone: whose end is news, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, Loss, NodeLost, PlanFailed, WorkersLost
from megatron_flashrecovery.core.phases import Draining, Executing, Staffing
from megatron_flashrecovery.core.policy import Action, Fault, decide
from megatron_flashrecovery.core.response import SHOWN, Mishap, respond
from megatron_flashrecovery.core.staffing import fall_back, halt

_NO_OTHER_NODE = "no spare node is left: start the job again without it, from its newest checkpoint"


def lose_workers(job: Job, event: WorkersLost, now: float) -> list[Command]:
    news: dict[Rank, Loss] = {}
    for loss in event.losses:
        if job.seats.node_of.get(loss.rank) != event.node:
            continue
        kept = event.vault.get(loss.rank, ())
        was_fenced = loss.epoch is not None and _was_fenced(job, loss.rank, loss.epoch)
        if was_fenced:
            del job.fenced[loss.rank]
            job.vault[loss.rank] = kept
        is_known = loss.worker in job.gone or (loss.epoch is not None and loss.epoch < job.started_for(loss.rank))
        job.gone.add(loss.worker)
        if loss.fault is Fault.DEVICE_POISONED and (was_fenced or not is_known):
            _distrust(job, loss.rank)
        if was_fenced and is_known and Mishap(loss.fault, loss.cause, raised=loss.raised).suspects_a_device:
            job.suspect(loss.rank)
        if not is_known:
            news[loss.rank] = loss
            job.vault[loss.rank] = kept
            job.note_kept(kept)
    mishaps = {
        rank: Mishap(loss.fault, loss.cause, job.has_happened_before(loss), loss.step, loss.raised)
        for rank, loss in news.items()
    }
    return _lose(job, mishaps, now)


def _was_fenced(job: Job, rank: Rank, epoch: Epoch) -> bool:
    """A worker that waited for its predecessor's end has taken its seat in a newer epoch than it was ordered for."""
    return rank in job.fenced and (job.fenced[rank] <= epoch < job.started_for(rank) or epoch == job.fenced[rank])


def _distrust(job: Job, rank: Rank) -> None:
    """Whatever this seat keeps, of its own and for its guests, may be wrong; what others keep of it was right when it
    was copied."""
    job.poisoned.add(rank)
    keeps = {rank, *job.seats.guests_of.get(rank, ())}
    job.renewed = {renewed for renewed in job.renewed if renewed[0] not in keeps}


def lose_node(job: Job, event: NodeLost, now: float) -> list[Command]:
    job.capacity.pop(event.node, None)
    ranks = job.seats.evict(event.node)
    if ranks and not job.may_house_all():
        rule = decide(Fault.NODE_LOST, replace(job.history(now), has_room=False))
        assert rule.action is Action.STOP, rule
        seats = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
        return halt(job, f"node {event.node} with rank {seats} is gone: {event.cause}; {_NO_OTHER_NODE}")
    for rank in ranks:
        job.vault.pop(rank, None)
        job.fenced.pop(rank, None)
    return _lose(job, dict.fromkeys(ranks, Mishap(Fault.NODE_LOST, f"node {event.node} is gone: {event.cause}")), now)


def give_up_rank(job: Job, event: PlanFailed, now: float) -> list[Command]:
    if event.worker in job.gone or job.seats.node_of.get(event.rank) != event.node:
        return []
    if not isinstance(job.phase, Executing):
        return []
    if event.fault is Fault.CORRUPTION and decide(event.fault, job.history(now)).action is Action.FALL_BACK:
        # To end whoever spoke first would copy the state of the other one, be it right or wrong.
        return fall_back(job, f"rank {event.rank}: {event.reason}", now)
    job.gone.add(event.worker)
    if (origin := job.phase.plan.origin_of.get(event.rank)) is not None:
        job.failed[event.rank, origin, job.phase.plan.resume_step] += 1
    why = f"rank {event.rank} could not execute the plan: {event.reason}"
    return respond(job, {event.rank: Mishap(Fault.PLAN_FAILED, event.reason)}, why, now, fenced=[event.rank])


def _lose(job: Job, mishaps: Mapping[Rank, Mishap], now: float) -> list[Command]:
    if not mishaps:
        return []
    if isinstance(job.phase, Draining | Staffing | Executing):
        job.unexplained.clear()  # what failed just before was the end of these, only told late
    why = "; ".join(f"rank {rank}: {mishaps[rank].cause}" for rank in sorted(mishaps)[:SHOWN])
    return respond(job, mishaps, why, now)
