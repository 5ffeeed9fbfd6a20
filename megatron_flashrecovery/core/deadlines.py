"""What is due by now: ranks that are late, nodes that have not come, and findings that have settled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from megatron_flashrecovery.core.bad_numbers import check_numbers
from megatron_flashrecovery.core.communicator_errors import check_failures
from megatron_flashrecovery.core.corruption import check_differences
from megatron_flashrecovery.core.hangs import check_hangs, end_hung
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command
from megatron_flashrecovery.core.overdue import LOOK_AGAIN, overdue_ranks, stopped_for_good
from megatron_flashrecovery.core.phases import Draining, Executing, Staffing, Starting, Training
from megatron_flashrecovery.core.policy import Action, Fault, decide
from megatron_flashrecovery.core.response import Mishap, plan_anew, respond
from megatron_flashrecovery.core.staffing import halt

_TOO_LATE = "no spare node has come in time, start the job again with other nodes, from its newest checkpoint"


def check_deadlines(job: Job, now: float) -> list[Command]:
    if failures := check_failures(job, now):
        return failures
    match job.phase:
        case Starting(deadline=deadline) if deadline is not None and now >= deadline:
            return _stop_without_room(job, job.seats.homeless, now)
        case Executing(deadline=deadline, executed=executed) if now >= deadline:
            late = [rank for rank in job.seats.node_of if rank not in executed]
            return plan_anew(job, f"rank {_names(late)} did not execute the plan in time", now)
        case Draining() | Staffing() as phase:
            late_joiners = [rank for rank, due in phase.joining.items() if now >= due]
            if homeless := job.seats.homeless.intersection(late_joiners):
                return _stop_without_room(job, homeless, now)
            if late_joiners:
                return _fence_late(job, late_joiners, "did not join in time", now)
            if isinstance(phase, Draining):
                return _check_drain(job, phase, now)
            return []
        case Training():
            checks = (check_numbers, check_differences, check_hangs)
            return next(filter(None, (check(job, now) for check in checks)), [])
        case _:
            return []


def _check_drain(job: Job, phase: Draining, now: float) -> list[Command]:
    if not phase.silent and (phase.waiting is None or phase.waiting.groups):
        return []  # everybody has reported: the next round is decided with the counts, not by a deadline
    if phase.silent and (stopped := stopped_for_good(job, phase, now)):
        return end_hung(job, stopped, now)
    if now < phase.deadline:
        return []
    if phase.silent:
        if late := overdue_ranks(job, phase):
            return _fence_late(job, late, "did not stop in time", now)
        phase.deadline = now + LOOK_AGAIN
        return []
    assert phase.waiting is not None
    return _fence_late(job, sorted(phase.census.blocked & phase.waiting.ranks), "could not be freed in time", now)


def _fence_late(job: Job, late: Iterable[Rank], what: str, now: float) -> list[Command]:
    job.rounds += 1
    ranks = sorted(late)
    mishaps = dict.fromkeys(ranks, Mishap(Fault.DEADLINE, what))
    return respond(job, mishaps, f"rank {_names(ranks)} {what}", now, fenced=ranks)


def _stop_without_room(job: Job, homeless: Iterable[Rank], now: float) -> list[Command]:
    rule = decide(Fault.NODE_LOST, replace(job.history(now), has_room=False))
    assert rule.action is Action.STOP, rule
    return halt(job, f"no node has room for rank {_names(homeless)}: {_TOO_LATE}")


def _names(ranks: Iterable[Rank]) -> str:
    names = [str(rank) for rank in sorted(ranks)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
