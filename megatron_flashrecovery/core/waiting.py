"""For whom a job waits, in words: what a person wants to know as soon as nothing moves for two seconds."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.overdue import late_ranks
from megatron_flashrecovery.core.phases import Draining, Executing, Staffing, Starting

_SHOWN = 8


def whom_for(job: Job) -> str | None:
    """``None`` while the job trains, or is over."""
    ranks = job.seats.node_of
    world = len(job.seats)
    match job.phase:
        case Starting() | Draining() | Staffing() if job.seats.homeless:
            return _of(job.seats.homeless, world, "to get a spare node")
        case Starting(ready=ready):
            return _of([rank for rank in ranks if rank not in ready], world, "to come to the first step")
        case Draining(silent=silent) as phase if silent:
            late = late_ranks(job, phase)
            return _of(late, world, "to stop at the next operation")
        case Draining() as phase if phase.waiting is not None:
            return _of(phase.waiting.ranks, world, "to be freed") or "operations under way to complete"
        case Draining(joining=joining) | Staffing(joining=joining):
            return _of(joining, world, "to build its model again")
        case Executing(executed=executed):
            return _of([rank for rank in ranks if rank not in executed], world, "to carry out the plan")
        case _:
            return None


def _of(ranks: Iterable[Rank], world: int, what: str) -> str | None:
    names = [str(rank) for rank in sorted(ranks)]
    if not names:
        return None
    if len(names) == world > 1:
        return f"all {world} ranks {what}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"rank {', '.join(names[:_SHOWN])}{more} {what}"
