"""What is done about ranks that hang: a few are ended and replaced, all that wait for each other are sent back once.

A hang of many at the same time is not theirs (a file system that stands still, a compiler): ending them would lose more
than it helps, so they are left alone for as long as what was never timed may take. Many: of those that do not wait for
them, for whoever reads data hangs when the file system does, and all others wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_flashrecovery.core.ids import GroupKey, Rank, Step
from megatron_flashrecovery.core.job import SETTLED_AFTER, Job
from megatron_flashrecovery.core.messages import Command, RanksHung
from megatron_flashrecovery.core.phases import Training
from megatron_flashrecovery.core.policy import FRUITLESS, Action, Fault, Rule, decide
from megatron_flashrecovery.core.response import Mishap, fruitless, respond
from megatron_flashrecovery.core.staffing import fall_back, halt, open_epoch

_SHOWN = 4
_SURE_AFTER = 60.0
"""Seconds: to go back once costs next to nothing, but a network that stumbles twice must not end the job."""


def note_hangs(job: Job, event: RanksHung, now: float) -> None:
    """While everybody trains."""
    hangs = job.hangs
    before = hangs.hung.keys()
    hangs.told[event.node] = event
    hung = hangs.hung.keys()
    if hung - before:
        hangs.hung_since = now
    if not hung:
        hangs.hung_since = hangs.crowd_since = None
    if not hangs.waiting:
        hangs.waiting_since = None
    elif hangs.waiting_since is None:
        hangs.waiting_since = now


def check_hangs(job: Job, now: float) -> list[Command]:
    hangs = job.hangs
    if hangs.since is None or now < hangs.since + SETTLED_AFTER:
        return []
    return _end_hung(job, now) if hangs.hung else _send_back(job, now)


def _end_hung(job: Job, now: float) -> list[Command]:
    hangs, seats = job.hangs, len(job.seats)
    hung, silent = hangs.hung, hangs.silent
    if silent and len(silent) <= few(seats):
        # Nobody but themselves keeps their threads from running, whatever all others wait for.
        return end_hung(job, {rank: hung[rank] for rank in silent}, now)
    at_most = few(seats - len(hangs.waiting))
    if len(hung) > at_most and hangs.crowd_since is None:
        hangs.crowd_since = now
    if hangs.crowd_since is not None:
        # As long as one of that crowd hangs: those that are left when the others go on are only the last of them.
        lasted = now >= hangs.crowd_since + job.config.hang_timeout
        rule = decide(Fault.CROWD, replace(job.history(now), lasted=lasted))
        if rule.action is Action.NOTE:
            return []
        if len(hung) > at_most:
            return fall_back(job, f"{len(hung)} ranks hang at the same time: {_first(hung)}", now)
    elif len(hung.keys() | hangs.slow) > at_most:
        return []
    return end_hung(job, hung, now)


def end_hung(job: Job, hung: Mapping[Rank, str], now: float) -> list[Command]:
    why = "; ".join(f"rank {rank} hangs: {evidence}" for rank, evidence in sorted(hung.items())[:_SHOWN])
    mishaps = {rank: Mishap(Fault.HANG, f"hangs: {evidence}") for rank, evidence in hung.items()}
    return respond(job, mishaps, why, now, fenced=tuple(hung))


def _send_back(job: Job, now: float) -> list[Command]:
    """Everybody waits: for each other, or in one operation that does not get on."""
    hangs = job.hangs
    finished = job.phase.finished if isinstance(job.phase, Training) else set()
    waiting = hangs.waiting
    if len(waiting.keys() | finished) < len(job.seats):
        return []
    step = max(event.step for event in hangs.told.values())
    why = f"every rank waits for another in step {step}: {describe(waiting, job.seats.members_of)}"
    assert hangs.waiting_since is not None
    history = replace(
        job.history(now),
        again=step in job.deadlocks,
        lasted=now >= hangs.waiting_since + min(_SURE_AFTER, job.config.hang_timeout),
        is_one_operation=len({_operation(what) for what in waiting.values()}) == 1,
    )
    return _answer_deadlock(job, decide(Fault.DEADLOCK, history), step, why, now)


def _answer_deadlock(job: Job, rule: Rule, step: Step, why: str, now: float) -> list[Command]:
    match rule.action:
        case Action.RETRY:
            job.deadlocks.add(step)
            return open_epoch(job, {}, why, now)
        case Action.FALL_BACK if rule.when == FRUITLESS[0]:
            return fall_back(job, f"{fruitless(job, now)}: {why}", now)
        case Action.FALL_BACK:
            return fall_back(job, f"{why}; again after all went back once", now)
        case Action.STOP:
            return halt(job, f"{why}; again after all went back once, so it is the script's")
        case _:
            return []


def few(ranks: int) -> int:
    """How many can hang at the same time by themselves."""
    return max(1, ranks // 4)


def describe(waiting: Mapping[Rank, str], members_of: Mapping[GroupKey, tuple[Rank, ...]]) -> str:
    """Who waits in what, and which members of that group are not there."""
    ranks_in: dict[str, list[Rank]] = {}
    for rank, what in sorted(waiting.items()):
        ranks_in.setdefault(_operation(what), []).append(rank)
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


def _operation(what: str) -> str:
    """Without how long it is waited in."""
    return what.partition(", for ")[0]
