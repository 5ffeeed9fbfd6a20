"""What is done about operations that fail although everybody lives: all go back to the step, on new communicators.

Whoever waits for a rank that dies sees its connection go before that rank's agent has said so. So a failure is
explained by a loss that follows within a moment; one that is not is a fault of its own.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, OperationsFailed
from megatron_flashrecovery.core.phases import Executing, Starting, Training
from megatron_flashrecovery.core.policy import Action, Fault, decide
from megatron_flashrecovery.core.response import plan_anew
from megatron_flashrecovery.core.staffing import fall_back, open_epoch, restart

_SHOWN = 4
_PLACE = re.compile(r"\[[^\]\s]+\.\w+:\d+\] ")
"""In the source of a library, as gloo says it."""


def note_failures(job: Job, event: OperationsFailed, now: float) -> list[Command]:
    """While ranks stop or wait for replacements, whatever is broken is seen in their counts anyway."""
    if isinstance(job.phase, Starting | Training | Executing):
        job.breaks.failed = {**job.breaks.failed, **event.failed}
        job.breaks.step = max(job.breaks.step, event.step)
        job.breaks.since = now if job.breaks.since is None else job.breaks.since
    return []


def check_failures(job: Job, now: float) -> list[Command]:
    breaks = job.breaks
    if breaks.due is None or now < breaks.due:
        return []
    shown = "; ".join(f"rank {rank}: {_shown(what)}" for rank, what in sorted(breaks.failed.items())[:_SHOWN])
    why = f"communication failed in step {breaks.step}, and no rank was lost: {shown}"
    if isinstance(job.phase, Executing):
        return plan_anew(job, why, now)
    rule = decide(Fault.COMMUNICATOR_ERROR, replace(job.history(now), again=breaks.step in job.unexplained))
    job.unexplained.add(breaks.step)
    match rule.action:
        case Action.START_ANEW:
            return restart(job, why, now)
        case Action.FALL_BACK:
            return fall_back(job, f"{why}; {rule.when}", now)
        case _:
            return open_epoch(job, {}, why, now)


def _shown(what: str) -> str:
    """The first sentence: the journal has all of it in the event."""
    return _PLACE.sub("", what).partition(". ")[0]
