"""The job's state machine: ``handle(job, event, now)`` applies one event and returns the orders that follow from it.

| in | on | to | orders |
|---|---|---|---|
| Starting | last rank ready, all seats described | Training | BeginTraining |
| Starting | loss | Starting | RestartAll, or Stop after too many |
| Training | loss | Draining, epoch + 1 | Park, StartWorkers |
| Training | a few ranks hang | Draining, epoch + 1 | Fence, Park, StartWorkers |
| Training | operations fail, nobody is lost | Draining, epoch + 1, or Starting the second time | Park, or RestartAll |
| Training | numbers are not finite | Draining, epoch + 1 | Park; or Stop, or RestartAll, when they are so again |
| Training | peers hold different parameters | Starting or Halted | RestartAll from a checkpoint, or Stop |
| Training | all wait for each other | Draining, epoch + 1, or Halted the second time | Park, or Stop |
| Draining | last report of a round | Draining | Drain, until nobody is in anybody's way |
| Draining | settled | Staffing | |
| Staffing | last replacement ready | Executing | ExecutePlan per node |
| Staffing | no step that all can produce | Starting or Halted | RestartAll from a checkpoint, or Stop |
| Executing | last rank has executed | Training | Resume |
| Draining, Staffing, Executing | loss | Draining, epoch + 1 | Park, StartWorkers |
| Draining, Staffing | rank overdue, and not busy | Draining, epoch + 1 | Fence, Park, StartWorkers |
| Draining | a few ranks none of whose threads runs | Draining, epoch + 1 | Fence, Park, StartWorkers |
| Executing | overdue | Draining, epoch + 1 | Park |
| Training | last rank finished | Finished | Release |

What belongs to an older epoch changes nothing, and neither does anything that is told twice. What cannot have happened
raises ``ImpossibleTransition`` with the story so far.

An execution that is overdue fences nobody at once: one rank that hangs makes all that wait for it overdue as well. All
are parked anew instead, and whoever does not answer *that* is fenced.

No order follows another to the same rank before the effect of the first was reported (a newer park order excepted), so
messages may be reordered and repeated on their way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from megatron_flashrecovery.core.answers import known_results
from megatron_flashrecovery.core.bad_numbers import end_of_step, note_numbers, note_sound
from megatron_flashrecovery.core.communicator_errors import note_failures
from megatron_flashrecovery.core.corruption import note_difference
from megatron_flashrecovery.core.deadlines import check_deadlines
from megatron_flashrecovery.core.drain import Disentangle, Past, Settled, Wait, decide_drain
from megatron_flashrecovery.core.errors import ImpossibleTransition
from megatron_flashrecovery.core.findings import NumbersBad, NumbersSound, PeersDiffered
from megatron_flashrecovery.core.hangs import note_hangs
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.job import Job, JobConfig
from megatron_flashrecovery.core.losses import give_up_rank, lose_node, lose_workers
from megatron_flashrecovery.core.messages import (
    BeginTraining,
    CheckpointWritten,
    ClockTicked,
    Command,
    Diagnosed,
    Drain,
    Event,
    ExecutePlan,
    NodeJoined,
    NodeLost,
    OperationsFailed,
    PlanExecuted,
    PlanFailed,
    RanksFinished,
    RanksHung,
    RanksReady,
    RanksStood,
    Release,
    Resume,
    SeatsDescribed,
    StepsTimed,
    WorkersLost,
)
from megatron_flashrecovery.core.overdue import note_watched
from megatron_flashrecovery.core.phases import Draining, Executing, Finished, Halted, Staffing, Starting, Training
from megatron_flashrecovery.core.planner import Holdings, Unrecoverable, plan_recovery
from megatron_flashrecovery.core.policy import Action, Fault, decide
from megatron_flashrecovery.core.staffing import fall_back, fill_homeless

__all__ = ["ImpossibleTransition", "Job", "JobConfig", "handle"]


def handle(job: Job, event: Event, now: float) -> list[Command]:
    """Apply one event to the job, and say what to order. Time never runs backwards."""
    if isinstance(job.phase, Finished | Halted):
        return []
    commands = _apply(job, event, now)
    if not isinstance(event, ClockTicked | StepsTimed) or commands:
        job.story.append((now, job.epoch, type(job.phase).__name__, event))
    return commands


def _apply(job: Job, event: Event, now: float) -> list[Command]:
    match event:
        case WorkersLost():
            return _and_go_on(job, lose_workers(job, event, now), now)
        case NodeLost():
            return _and_go_on(job, lose_node(job, event, now), now)
        case NodeJoined(node=node, room=room):
            job.capacity[node] = room
            job.joined.add(node)
            return fill_homeless(job, now)
        case Diagnosed():
            job.note_diagnosis(event)
            return []
        case CheckpointWritten(step=step):
            job.checkpoint = step if job.checkpoint is None else max(step, job.checkpoint)
            return []
        case ClockTicked():
            return check_deadlines(job, now) + _go_on(job, now)
        case _:
            pass
    if event.epoch < job.epoch:
        return []
    if event.epoch > job.epoch:
        raise ImpossibleTransition(job.tell(event, f"epoch {event.epoch} has not begun"))
    match event:
        case SeatsDescribed():
            if isinstance(job.phase, Starting):
                job.seats.describe(event)
            return _begin_training(job)
        case RanksReady(ranks=ranks):
            return _seat_ready(job, event, ranks, now)
        case RanksStood():
            return _record_reports(job, event, now)
        case PlanExecuted(ranks=ranks):
            return _record_executed(job, event, ranks, now)
        case PlanFailed():
            return _and_go_on(job, give_up_rank(job, event, now), now)
        case RanksHung():
            if isinstance(job.phase, Training):
                note_hangs(job, event, now)
            elif isinstance(job.phase, Draining):
                note_watched(job.phase, event, now)
            return []
        case StepsTimed():
            if isinstance(job.phase, Training):
                job.own_times.note(event, job.seats.peers_of, job.config.slow_factor, now)
            return []
        case OperationsFailed():
            return note_failures(job, event, now)
        case NumbersBad():
            return _and_go_on(job, note_numbers(job, event, now), now)
        case NumbersSound():
            return _and_go_on(job, note_sound(job, event, now), now)
        case PeersDiffered():
            return note_difference(job, event, now)
        case RanksFinished(ranks=ranks):
            return _record_finished(job, event, ranks)
        case _:
            _unreachable(event)


# --- progress --------------------------------------------------------------------------------------------------------


def _seat_ready(job: Job, event: RanksReady, ranks: Iterable[Rank], now: float) -> list[Command]:
    match job.phase:
        case Starting() as phase:
            phase.ready.update(ranks)
            return _begin_training(job)
        case Draining() as phase:
            for rank in ranks:
                if rank not in job.lost:
                    raise ImpossibleTransition(job.tell(event, f"rank {rank} is no replacement"))
                _hear(phase, rank)
        case Staffing() as phase:
            for rank in ranks:
                phase.joining.pop(rank, None)
        case _:
            return []
    return _go_on(job, now)


def _begin_training(job: Job) -> list[Command]:
    match job.phase:
        case Starting(ready=ready) if len(ready) == len(job.seats) == len(job.seats.described):
            job.phase = Training()
            return [BeginTraining(job.epoch)]
        case _:
            return []


def _record_reports(job: Job, event: RanksStood, now: float) -> list[Command]:
    phase = job.phase
    if not isinstance(phase, Draining | Staffing):
        return []
    if event.number > job.number:
        raise ImpossibleTransition(job.tell(event, f"order {event.number} was never given"))
    for report in event.reports:
        if not phase.census.record(report, event.number) or isinstance(phase, Staffing):
            continue
        if event.number >= phase.since.get(report.rank, phase.parked):
            _hear(phase, report.rank)
        for key in job.seats.groups_of.get(report.rank, ()):
            if key in phase.unchanged and phase.unchanged[key] != phase.census.mark(key):
                del phase.unchanged[key]
    return _go_on(job, now)


def _hear(phase: Draining, rank: Rank) -> None:
    if rank in phase.heard:
        return
    phase.heard.add(rank)
    if phase.joining.pop(rank, None) is None:
        phase.silent -= 1


def _record_executed(job: Job, event: PlanExecuted, ranks: Iterable[Rank], now: float) -> list[Command]:
    match job.phase:
        case Executing() as phase:
            phase.executed.update(ranks)
            job.renewed.update((rank, phase.plan.resume_step) for rank in ranks)
            return _resume(job, phase, now) if len(phase.executed) == len(job.seats) else []
        case Training():
            return []
        case _:
            raise ImpossibleTransition(job.tell(event, "no plan of this epoch was given"))


def _record_finished(job: Job, event: RanksFinished, ranks: Iterable[Rank]) -> list[Command]:
    match job.phase:
        case Training(finished=finished):
            finished.update(ranks)
        case _:
            raise ImpossibleTransition(job.tell(event, "nobody was told to train in this epoch"))
    if len(finished) < len(job.seats):
        return []
    job.phase = Finished()
    return [Release(job.epoch, job.next_number())]


# --- from one phase of a recovery to the next ------------------------------------------------------------------------


def _go_on(job: Job, now: float) -> list[Command]:
    """Take every step of the recovery that is possible by now."""
    if isinstance(job.phase, Draining) and not job.phase.silent and not _must_wait(job.phase, now):
        orders = _decide_round(job, job.phase, now)
        if orders:
            return orders
    if isinstance(job.phase, Staffing) and not job.phase.joining:
        return _plan(job, job.phase, now)
    return []


def _and_go_on(job: Job, commands: list[Command], now: float) -> list[Command]:
    return commands + _go_on(job, now) if commands else []


def _must_wait(phase: Draining, now: float) -> bool:
    """Whether what was waited for at the last decision is still under way: deciding again would change nothing."""
    if phase.waiting is None:
        return False
    if phase.waiting.groups:
        return bool(phase.unchanged) and now < phase.patient_until
    return not phase.census.blocked.isdisjoint(phase.waiting.ranks)


def _decide_round(job: Job, phase: Draining, now: float) -> list[Command]:
    past, sharded = Past(phase.severed, phase.answered, phase.missing, job.matched, job.void), bool(job.seats.sharded)
    decision = decide_drain(phase.census, sharded, past, is_patient=True)
    if isinstance(decision, Wait) and decision.groups and decision == phase.waiting and now >= phase.patient_until:
        decision = decide_drain(phase.census, sharded, past, is_patient=False)
    match decision:
        case Wait():
            if decision != phase.waiting:
                phase.waiting, phase.patient_until = decision, now + job.config.drain_grace
            phase.unchanged = {key: phase.census.mark(key) for key in decision.groups}
            return []
        case Settled():
            assert job.timeline is not None
            job.timeline.parked = now
            job.phase = Staffing(phase.census, phase.joining)
            return []
        case Disentangle():
            return _order_drain(job, phase, decision, now)


def _order_drain(job: Job, phase: Draining, decision: Disentangle, now: float) -> list[Command]:
    """Tell every node what concerns its ranks; all who are concerned have to report again."""
    number = job.next_number()
    phase.waiting = None
    phase.deadline = now + job.config.drain_timeout
    phase.severed.update(decision.sever)
    phase.missing.update(decision.missing)
    job.matched.update(decision.missing)
    job.void.update(decision.void)
    for rank in decision.answer:
        report = phase.census.reports[rank]
        phase.answered[rank] = known_results(report, Step(report.step + 1))
    severed_at = {rank for key in decision.sever for rank in job.seats.members_of[key] if rank in phase.census.reports}
    concerned = severed_at | decision.advance | decision.answer.keys() | decision.match.keys()
    phase.heard -= concerned
    phase.silent += len(concerned)
    phase.since.update(dict.fromkeys(concerned, number))
    return [
        Drain(
            node,
            job.epoch,
            number,
            advance=tuple(rank for rank in ranks if rank in decision.advance),
            sever={
                key: reason
                for key, reason in decision.sever.items()
                if not job.seats.ranks_on[node].isdisjoint(job.seats.members_of[key])
            },
            answer={rank: decision.answer[rank] for rank in ranks if rank in decision.answer},
            match={rank: decision.match[rank] for rank in ranks if rank in decision.match},
        )
        for node, ranks in job.seats.by_node(concerned).items()
    ]


def _plan(job: Job, phase: Staffing, now: float) -> list[Command]:
    assert job.timeline is not None
    job.timeline.staffed = job.timeline.planned = now
    holdings = Holdings(phase.census, job.vault, job.failed, job.poisoned, job.renewed)
    plan = plan_recovery(job.epoch, job.seats, holdings)
    if isinstance(plan, Unrecoverable):
        assert decide(Fault.NO_COPY, job.history(now)).action is Action.FALL_BACK
        return fall_back(job, str(plan), now)
    job.phase = Executing(plan, deadline=now + job.config.execute_timeout)
    number = job.next_number()
    orders = job.numbers.to_skip(plan.resume_step), job.numbers.to_examine(plan.resume_step)
    return [
        ExecutePlan(node, job.epoch, number, plan.resume_step, plan.regather, shares, *orders)
        for node, shares in plan.shares_of.items()
    ]


def _resume(job: Job, phase: Executing, now: float) -> list[Command]:
    assert job.timeline is not None
    step = phase.plan.resume_step
    job.recoveries.append(job.timeline.close(phase.plan, now))
    job.note_resume(step)
    for done in [each for each in job.numbers.times if each <= step]:
        end_of_step(job, done)
    job.rounds = 0
    job.begin_anew()
    job.phase = Training()
    return [Resume(job.epoch, job.next_number(), step)]


def _unreachable(value: NoReturn) -> NoReturn:
    raise AssertionError(f"unhandled {value!r}")
