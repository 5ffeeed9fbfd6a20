"""What is done about numbers that are not finite: back to the step once, then whatever the user wants.

Nobody has written anything: whoever sees it stands right before the update. The first time everybody goes back and
computes the step again on the same data, looking closely. If it does not come again, it was no fault of the data, and
the device of the one rank whose own numbers were bad is suspected. If it does, it is the data or the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_flashrecovery.core.findings import NumbersBad, NumbersSound, first_of
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.job import SETTLED_AFTER, Job
from megatron_flashrecovery.core.messages import Command
from megatron_flashrecovery.core.numbers import Alarm, BadStep
from megatron_flashrecovery.core.phases import Starting, Training
from megatron_flashrecovery.core.policy import Action, Fault, decide
from megatron_flashrecovery.core.response import Mishap, respond
from megatron_flashrecovery.core.staffing import fall_back, halt, open_epoch

_SHOWN = 8


def note_numbers(job: Job, event: NumbersBad, now: float) -> list[Command]:
    """Once everybody has said it, or a moment later, it is decided: what is known by then names the origin."""
    if not isinstance(job.phase, Starting | Training):
        return []
    numbers = job.numbers
    if numbers.alarm is None:
        numbers.alarm = Alarm(event.step, now, event.what, event.choice)
        numbers.times[event.step] += 1
    alarm = numbers.alarm
    if event.own and not alarm.own:
        # Whoever has it says best what it is; all others see what it has become.
        alarm.what = event.what
    alarm.ranks.update(event.ranks)
    alarm.own.update(event.own)
    alarm.findings.update(event.findings)
    if numbers.times[alarm.step] == 1:
        numbers.what[alarm.step] = alarm.what
    return check_numbers(job, now)


def check_numbers(job: Job, now: float) -> list[Command]:
    alarm = job.numbers.alarm
    if alarm is None or not isinstance(job.phase, Training):
        return []
    everybody = len(alarm.ranks | job.phase.finished) >= len(job.seats)
    return _decide(job, alarm, now) if everybody or now >= alarm.since + SETTLED_AFTER else []


def note_sound(job: Job, event: NumbersSound, now: float) -> list[Command]:
    suspect = end_of_step(job, event.step)
    if suspect is None or not isinstance(job.phase, Training):
        return []
    if decide(Fault.BAD_NUMBERS, job.history(now, suspect)).action is not Action.REPLACE_NODE:
        return []
    cause = f"its numbers were bad in step {event.step}, and not when it was computed again, as before"
    mishaps = {suspect: Mishap(Fault.BAD_NUMBERS, cause)}
    return respond(job, mishaps, f"rank {suspect}: {cause}", now, fenced=[suspect])


def end_of_step(job: Job, step: Step) -> Rank | None:
    """The step is complete: a skipped one stays skipped, and what was bad about another one did not come again. Returns
    whose device is suspected for that."""
    numbers = job.numbers
    times = numbers.times.pop(step, 0)
    if not times or step in numbers.skipped:
        return None
    own, nodes, what = numbers.own.pop(step, {}), numbers.nodes.pop(step, {}), numbers.what.pop(step)
    suspect = next(iter(own)) if len(own) == 1 else None
    outcome = "did not come again"
    if suspect is not None:
        job.suspicions[nodes[suspect], suspect] += 1
        outcome += f", so the device of rank {suspect} is suspected"
    elif own:
        outcome += f"; it had spread over rank {_names(own)} before anybody looked, so no device is suspected"
    numbers.ended.append(BadStep(step, what, times, outcome, _own(own), suspect))
    return suspect


def _decide(job: Job, alarm: Alarm, now: float) -> list[Command]:
    numbers, step = job.numbers, alarm.step
    times = numbers.times[step]
    if times == 1:
        # Only now: of an alarm that a loss cuts short nobody knows whose numbers were bad as well.
        numbers.own[step] = dict(alarm.own)
        numbers.nodes[step] = {rank: job.seats.node_of[rank] for rank in alarm.own}
    history = replace(
        job.history(now),
        again=times > 1,
        setbacks=times,
        nan=alarm.choice,
        fell_back=step in numbers.fell_back,
    )
    origin = _origin(alarm)
    why = f"step {step}: {alarm.what}" + (", again on the same data" if times > 1 else "") + origin
    match decide(Fault.BAD_NUMBERS, history).action:
        case Action.RETRY:
            return open_epoch(job, {}, f"{why}; nothing was updated, and the step is computed again", now)
        case Action.SKIP:
            numbers.skipped.add(step)
            _end(job, alarm, "its update is left out", origin)
            return open_epoch(job, {}, f"{why}; its update is left out", now)
        case Action.FALL_BACK:
            numbers.fell_back.add(step)
            _end(job, alarm, "back to the newest checkpoint", origin)
            return fall_back(job, why, now)
        case _:
            _end(job, alarm, "the job stopped", origin)
            return halt(job, f"{why}; it is the data or the model: --flash-recovery-nan skip leaves such a step out")


def _end(job: Job, alarm: Alarm, outcome: str, origin: str) -> None:
    numbers = job.numbers
    origin = origin.removeprefix(", ")
    numbers.ended.append(BadStep(alarm.step, alarm.what, numbers.times[alarm.step], outcome, origin))


def _origin(alarm: Alarm) -> str:
    """Where it began, as far as somebody knows."""
    if (first := first_of(alarm.findings)) is not None:
        return f", first in the {first[1]} on rank {first[0]}"
    return f", from {_own(alarm.own)}" if alarm.own else ""


def _own(own: Mapping[Rank, str]) -> str:
    if not own:
        return ""
    return f"the {own[min(own)]} of rank {_names(own)}"


def _names(ranks: Mapping[Rank, str]) -> str:
    names = [str(rank) for rank in sorted(ranks)]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
