"""What is done about ranks that hang: a few are ended and replaced, all that wait for each other are sent back once.

A hang of many at the same time is not theirs (a file system that stands still, a compiler): ending them would lose more
than it helps, so they are left alone for as long as what was never timed may take.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_flashrecovery.core.ids import GroupKey, Rank
from megatron_flashrecovery.core.job import SETTLED_AFTER, Job
from megatron_flashrecovery.core.messages import Command, RanksHung
from megatron_flashrecovery.core.phases import Training
from megatron_flashrecovery.core.staffing import fall_back, fence, halt, open_epoch

_SHOWN = 4
_SURE_AFTER = 60.0
"""Seconds: to go back once costs next to nothing, but a network that stumbles twice must not end the job."""


def note_hangs(job: Job, event: RanksHung, now: float) -> list[Command]:
    if not isinstance(job.phase, Training):
        return []
    hangs = job.hangs
    if event.hung or event.waiting:
        hangs.told[event.node] = event
    else:
        hangs.told.pop(event.node, None)
    if not hangs.told:
        hangs.since = None
        hangs.is_excused = False
    elif hangs.since is None:
        hangs.since = now
    return []


def check_hangs(job: Job, now: float) -> list[Command]:
    hangs = job.hangs
    if hangs.since is None or now < hangs.since + SETTLED_AFTER:
        return []
    hung = hangs.hung
    if hung and len(hung) <= few(len(job.seats)):
        why = "; ".join(f"rank {rank} hangs: {evidence}" for rank, evidence in sorted(hung.items())[:_SHOWN])
        return fence(job, {rank: f"hangs: {evidence}" for rank, evidence in hung.items()}, why, now)
    if hung:
        if job.config.hang_timeout and now >= hangs.since + job.config.hang_timeout:
            return fall_back(job, f"{len(hung)} ranks hang at the same time: {_first(hung)}", now)
        return []
    finished = job.phase.finished if isinstance(job.phase, Training) else set()
    waiting = hangs.waiting
    if len(waiting.keys() | finished) < len(job.seats) or not waiting:
        return []
    step = max(event.step for event in hangs.told.values())
    why = f"every rank waits for another in step {step}: {describe(waiting, job.seats.members_of)}"
    if step in job.deadlocks:
        if now < hangs.since + min(_SURE_AFTER, job.config.hang_timeout):
            return []
        return halt(job, f"{why}; again after all went back once, so it is the script's")
    job.deadlocks.add(step)
    return open_epoch(job, {}, why, now)


def few(ranks: int) -> int:
    """How many can hang at the same time by themselves."""
    return max(1, ranks // 4)


def describe(waiting: Mapping[Rank, str], members_of: Mapping[GroupKey, tuple[Rank, ...]]) -> str:
    """Who waits in what, and which members of that group are not there."""
    ranks_in: dict[str, list[Rank]] = {}
    for rank, what in sorted(waiting.items()):
        ranks_in.setdefault(what.partition(", for ")[0], []).append(rank)
    parts = []
    for what, ranks in list(ranks_in.items())[:_SHOWN]:
        members = members_of.get(GroupKey(what.partition(" of ")[2]), ())
        absent = [rank for rank in members if rank not in ranks]
        never = f", where rank {_names(absent)} never came" if absent else ""
        parts.append(f"rank {_names(ranks)} in {what}{never}")
    return "; ".join(parts)


def _first(evidence: Mapping[Rank, str]) -> str:
    rank, why = min(evidence.items())
    return f"rank {rank}: {why}"


def _names(ranks: list[Rank]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
