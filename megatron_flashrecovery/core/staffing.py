"""Vacate and fill seats: every loss opens a new epoch, and what cannot be recovered starts from the top or stops.

A replacement belongs to the recovery, not to the epoch that it was started for: one that is still joining when somebody
else is lost goes on joining, learns of the new epoch by its park order, and says that it is ready *in that epoch*. The
same goes for one that had been ready. One that had begun to execute a plan reports like a survivor.

Groups that an interrupted plan was to rebuild stay marked for it: some members have the new communicator already.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.job import Breaks, Job
from megatron_flashrecovery.core.messages import Command, Park, RestartAll, StartWorkers, Stop
from megatron_flashrecovery.core.phases import Draining, Executing, Halted, Staffing, Starting
from megatron_flashrecovery.core.recovery import Timeline
from megatron_flashrecovery.core.slowness import OwnTimes


def open_epoch(job: Job, losses: Mapping[Rank, str], why: str, now: float) -> list[Command]:
    """Vacate the seats of ``losses`` (rank -> cause; there may be none), and stop everybody else in a new epoch."""
    joining = dict(job.phase.joining) if isinstance(job.phase, Draining | Staffing) else {}
    joining |= dict.fromkeys(losses, now + job.config.join_timeout)
    if isinstance(job.phase, Executing):
        reason = f"was being rebuilt in epoch {job.epoch}"
        job.carried |= dict.fromkeys(job.phase.plan.rebuild, reason)
    job.epoch = Epoch(job.epoch + 1)
    job.own_times = OwnTimes()
    job.breaks = Breaks()
    job.lost.update(losses)
    if job.timeline is None:
        job.timeline = Timeline(opened=now)
        job.begun.append(now)
    job.timeline.causes.append(why)
    job.timeline.lost.update(losses)

    of_lost = {key: f"rank {rank} was lost" for key, rank in job.seats.groups_with(job.lost).items()}
    number = job.next_number()
    job.phase = Draining(
        Census(job.seats, {**job.carried, **of_lost}),
        parked=number,
        silent=len(job.seats) - len(joining),
        joining=joining,
        deadline=now + job.config.drain_timeout,
        severed=set(of_lost),
    )
    commands: list[Command] = [Park(job.epoch, number, tuple(sorted(job.lost)))]
    for node, ranks in job.seats.by_node(losses).items():
        commands.append(StartWorkers(node, job.epoch, ranks))
        job.staffed.update(dict.fromkeys(ranks, job.epoch))
    return commands + fill_homeless(job, now)


def fill_homeless(job: Job, now: float) -> list[Command]:
    """Seat whoever lost their node on nodes that have room, on those that a diagnosis blames last."""
    commands: list[Command] = []
    for node, capacity in sorted(job.capacity.items(), key=lambda each: (each[0] in job.blamed, each)):
        room = capacity - len(job.seats.ranks_on.get(node, ()))
        if room <= 0 or not job.seats.homeless:
            continue
        ranks = job.seats.house(node, room)
        commands.append(StartWorkers(node, job.epoch, ranks))
        job.staffed.update(dict.fromkeys(ranks, job.epoch))
        if isinstance(job.phase, Draining | Staffing):
            job.phase.joining.update(dict.fromkeys(ranks, now + job.config.join_timeout))
    if isinstance(job.phase, Starting) and commands:
        if not job.seats.homeless:
            job.phase.deadline = None
        # A node that has just come has never heard of the restart that its new seats take part in.
        if job.phase.order is not None:
            commands.append(job.phase.order)
    return commands


def fall_back(job: Job, reason: str, now: float) -> list[Command]:
    """No way to recover: the newest checkpoint, or the start if nothing was done since, or a stop that says why."""
    nothing_done = False
    if isinstance(job.phase, Draining | Staffing):
        nothing_done = job.phase.census.newest == 0
    if job.checkpoint is None and not nothing_done:
        return halt(job, f"{reason}; there is no checkpoint to fall back to")
    return restart(job, reason, now)


def restart(job: Job, reason: str, now: float) -> list[Command]:
    """Start every worker from the top, if that was not done too often already."""
    if job.restarts >= job.config.max_restarts:
        return halt(job, f"{reason}; all workers were restarted {job.restarts} times already")
    job.restarts += 1
    job.epoch = Epoch(job.epoch + 1)
    job.base = job.epoch
    job.staffed.clear()
    job.setbacks.clear()
    job.begun.clear()
    job.rounds = 0
    job.last_resume = job.newest_kept = None
    job.deadlocks.clear()
    job.unexplained.clear()
    job.differing.clear()
    job.begin_anew()
    job.seats.forget()
    skip = job.numbers.to_skip(job.checkpoint or Step(0))
    order = RestartAll(job.epoch, reason, from_checkpoint=job.checkpoint is not None, skip=skip)
    job.phase = Starting(order, deadline=now + job.config.join_timeout if job.seats.homeless else None)
    return fill_homeless(job, now) or [order]


def halt(job: Job, reason: str) -> list[Command]:
    job.phase = Halted(reason)
    return [Stop(reason)]
