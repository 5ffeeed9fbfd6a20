"""Workers and nodes that are gone: whose end is news, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, Fence, Loss, NodeLost, PlanFailed, WorkersLost
from megatron_flashrecovery.core.phases import Draining, Executing, Staffing, Starting
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.staffing import fence, halt, open_epoch, restart
from megatron_flashrecovery.core.suspicion import why_to_replace_node

_SHOWN = 8
_NO_OTHER_NODE = "a node cannot be replaced yet: start the job again without it, from its newest checkpoint"


def lose_workers(job: Job, event: WorkersLost, now: float) -> list[Command]:
    news: dict[Rank, Loss] = {}
    for loss in event.losses:
        if job.seats.node_of.get(loss.rank) != event.node:
            continue
        kept = event.vault.get(loss.rank, ())
        if loss.epoch is not None and loss.epoch == job.fenced.get(loss.rank):
            del job.fenced[loss.rank]
            job.vault[loss.rank] = kept
        is_known = loss.worker in job.gone or (loss.epoch is not None and loss.epoch < job.started_for(loss.rank))
        job.gone.add(loss.worker)
        if not is_known:
            news[loss.rank] = loss
            job.vault[loss.rank] = kept
            job.note_kept(kept)
    if again := [loss for loss in news.values() if job.has_raised_before(loss)]:
        return halt(job, _same_again(again))
    if (why := why_to_replace_node(job, event.node, news.values())) is not None:
        return _give_up_node(job, event.node, why, now)
    return _lose(job, {rank: loss.cause for rank, loss in news.items()}, now)


def lose_node(job: Job, event: NodeLost, now: float) -> list[Command]:
    job.capacity.pop(event.node, None)
    ranks = job.seats.evict(event.node)
    if ranks and not job.config.replaces_nodes:
        seats = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
        return halt(job, f"node {event.node} with rank {seats} is gone: {event.cause}; {_NO_OTHER_NODE}")
    for rank in ranks:
        job.vault.pop(rank, None)
        job.fenced.pop(rank, None)
    return _lose(job, dict.fromkeys(ranks, f"node {event.node} is gone: {event.cause}"), now)


def _give_up_node(job: Job, node: NodeId, why: str, now: float) -> list[Command]:
    ranks = tuple(sorted(job.seats.ranks_on.get(node, ())))
    return [Fence(node, ranks, why, Epoch(job.epoch + 1)), *lose_node(job, NodeLost(node, why), now)]


def give_up_rank(job: Job, event: PlanFailed, now: float) -> list[Command]:
    if event.worker in job.gone or job.seats.node_of.get(event.rank) != event.node:
        return []
    if not isinstance(job.phase, Executing):
        return []
    job.gone.add(event.worker)
    if (origin := job.phase.plan.origin_of.get(event.rank)) is not None:
        job.failed[event.rank, origin, job.phase.plan.resume_step] += 1
    why = f"rank {event.rank} could not execute the plan: {event.reason}"
    return fence(job, {event.rank: event.reason}, why, now)


def _lose(job: Job, causes: Mapping[Rank, str], now: float) -> list[Command]:
    if not causes:
        return []
    if isinstance(job.phase, Draining | Staffing | Executing):
        job.unexplained.clear()  # what failed just before was the end of these, only told late
    why = "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items())[:_SHOWN])
    if isinstance(job.phase, Starting):
        return restart(job, f"lost before everybody had started: {why}", now)
    return open_epoch(job, causes, why, now)


def _same_again(losses: list[Loss]) -> str:
    """A replacement on the same state, with the same data, came to the same end: so would all that follow."""
    ranks = ", ".join(str(loss.rank) for loss in losses[:_SHOWN]) + (", ..." if len(losses) > _SHOWN else "")
    first = losses[0]
    where = f"in step {first.step}" if first.step is not None else "before its first step"
    again = f"rank {ranks} raised the same exception {where} again after a retry"
    if first.fault is Fault.DEVICE_MEMORY:
        return f"{again}: the device has not enough memory, use a smaller micro batch or recompute more: {first.raised}"
    return f"{again}, so it is the script's: {first.raised}"
