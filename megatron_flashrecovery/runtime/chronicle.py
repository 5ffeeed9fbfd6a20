"""What a run leaves behind, and what it says while it goes on: journal, steps, summary, and one line for each turn.

Owned by the controller. It listens to what the core was told and decided, and adds what only the shell can measure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TextIO

from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, Rank, Step
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.moves import in_words, moves_of
from megatron_flashrecovery.core.numbers import BadStep
from megatron_flashrecovery.core.phases import Executing
from megatron_flashrecovery.core.recovery import Recovery
from megatron_flashrecovery.core.waiting import whom_for
from megatron_flashrecovery.runtime import node_messages
from megatron_flashrecovery.runtime.journal import FILE_NAME, JobStarted, Journal
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.oddities import Spikes, StepDiffered
from megatron_flashrecovery.runtime.reserve import Reserve
from megatron_flashrecovery.runtime.status import LauncherNoted
from megatron_flashrecovery.runtime.summary import (
    STEPS_NAME,
    EpochRecord,
    GroupTally,
    MoveRecord,
    PhaseSeconds,
    RecoveryRecord,
    StepLine,
    StepLog,
    Summary,
    write_summary,
)

_NO_STEP = Step(0)
_FIRST_REMINDER, _NEXT_REMINDER = 2.0, 10.0
_RESTORE_PARTS = ("restore", "gather", "agree", "mirror")


@dataclass
class _Measured:
    """One recovery, as the shell saw it. Unix times."""

    died: float | None = None
    seen: float | None = None
    newest: Step = _NO_STEP
    rebuild: float = 0.0
    restore: float = 0.0
    resumed: float = 0.0
    first_step: float | None = None
    recovery: Recovery | None = None
    stepped: set[Rank] = field(default_factory=set)


class Chronicle:
    def __init__(self, config: LaunchConfig, out: TextIO = sys.stderr) -> None:
        self._config = config
        self._out = out
        self._journal = Journal(config.log_dir / FILE_NAME)
        self._steps = StepLog(config.log_dir / STEPS_NAME)
        self._epoch = Epoch(0)
        self._phase = ""
        self._current = _Measured()
        self._measured: dict[Epoch, _Measured] = {}
        self._epochs: dict[Epoch, EpochRecord] = {}
        self._node_of: dict[Rank, NodeId] = {}
        self._moves: list[MoveRecord] = []
        self._final: dict[Rank, str] = {}
        self._last_step = Step(0)
        self._warned: set[str] = set()
        self._waiting: tuple[Epoch, float] | None = None
        self._slow: frozenset[Rank] = frozenset()
        self._alarmed: set[Rank] = set()
        self._bad: list[BadStep] = []
        self._blamed: dict[str, core.Blamed] = {}
        self._spikes = Spikes()
        self._started_in: dict[Rank, Epoch] = {}
        self._closed = False
        self._is_torn = False
        self._reserve = Reserve(config.log_dir)

    @property
    def last_step(self) -> Step:
        """The newest that is completed."""
        return self._last_step

    def begin(self, job: Job, now: float) -> None:
        """Nothing has happened yet."""
        seats = {node: tuple(sorted(ranks)) for node, ranks in job.seats.ranks_on.items()}
        self._node_of = dict(job.seats.node_of)
        self._reserve.make()
        with self._records_are_optional():
            self._journal.started(JobStarted(job.config, seats), time=time.time(), now=now)
        self._write(LauncherNoted.this_one())

    def record(self, event: core.Event, commands: Sequence[core.Command], job: Job, now: float) -> None:
        """The job has handled ``event``, and this is what it ordered. What comes after the end is not recorded."""
        if self._closed:
            return
        if not self._is_torn:  # from a journal with a gap nothing can be replayed that comes behind it
            with self._records_are_optional():
                self._journal.handled(event, commands, job, time=time.time(), now=now)
        if isinstance(event, core.RanksStood):
            newest = max((report.step for report in event.reports), default=Step(0))
            self._current.newest = max(self._current.newest, newest)
        if isinstance(event, core.Diagnosed):
            self._tell_diagnosis(event)
        self._note_numbers(job.numbers.ended)
        self._note_moves(event, commands, job)
        for command in commands:
            self._tell(command, job)
        if job.epoch != self._epoch:
            self._epoch, self._slow = job.epoch, frozenset()
        self._note_slow(job.own_times.slow)
        phase = type(job.phase).__name__
        if phase != self._phase:
            if (self._phase, phase) == ("Starting", "Training"):
                self._say("every rank is at its first step and has its second copy: training begins")
            self._phase = phase
            self._write(_PhaseEntered(phase), now, "phase")
        if isinstance(job.phase, Executing) and any(isinstance(command, core.ExecutePlan) for command in commands):
            plan = job.phase.plan
            planned = GroupsPlanned(plan.resume_step, plan.rebuild, plan.kept)
            self._write(planned, now)

    def _note_moves(self, event: core.Event, commands: Sequence[core.Command], job: Job) -> None:
        moves = moves_of(self._node_of, commands)
        for line in in_words(event, moves, self._node_of, job):
            self._say(line)
        for move in moves:
            self._node_of.update(dict.fromkeys(move.ranks, move.target))
            self._moves.append(MoveRecord(job.epoch, move.ranks, move.origin, move.target))

    def _tell_diagnosis(self, diagnosed: core.Diagnosed) -> None:
        for blamed in diagnosed.blamed:
            self._blamed[blamed.element] = blamed
            evidence = f"(p {blamed.p:.2g}): {blamed.evidence}"
            if self._alarmed.isdisjoint(blamed.ranks) and self._alarmed and diagnosed.is_of_slow_ranks:
                # It says nothing of those who were asked for.
                self._say(f"{diagnosed.occasion}; also conspicuous: {blamed.element} {evidence}")
            else:
                self._say(f"{diagnosed.occasion}: {blamed.element} is to blame {evidence}")
        if diagnosed.undetermined:
            self._say(f"{diagnosed.occasion}: {diagnosed.verdict}")
        self._alarmed = set(self._slow)

    def _note_slow(self, slow: Mapping[Rank, str]) -> None:
        if slow.keys() == self._slow:
            return
        for rank in sorted(slow.keys() ^ self._slow):
            self._write(SlowNoted(rank, slow.get(rank)))
            said = f"is slow: {slow[rank]}" if rank in slow else "is not slow any more"
            self._say(f"rank {rank} {said}")
        self._alarmed |= slow.keys() - self._slow
        self._slow = frozenset(slow)

    def remind(self, job: Job, now: float, absent: Sequence[NodeId] = ()) -> None:
        """Called again and again: silence of more than two seconds needs an explanation. ``absent`` nodes have not
        joined yet."""
        whom = f"{', '.join(absent[:8])} to do the script's imports, and join" if absent else whom_for(job)
        if whom is None:
            self._waiting = None
            return
        if self._waiting is None or self._waiting[0] != job.epoch:
            self._waiting = (job.epoch, now + _FIRST_REMINDER)
        elif now >= self._waiting[1]:
            self._waiting = (job.epoch, now + _NEXT_REMINDER)
            self._say(f"epoch {job.epoch}: waiting for {whom}")

    def tell_of_late_nodes(self, late: Sequence[str], patience: float) -> None:
        """The job is over, and these have never come."""
        whom = ", ".join(late[:8])
        self._say(f"the job is over; {whom} has not come yet, and is waited for, {patience:.0f} s at most, to hear it")

    def note(self, message: object) -> None:
        """What only the record needs to know."""
        if self._closed:
            return
        match message:
            case node_messages.StepNoted(step=step):
                self._last_step = max(self._last_step, step.step)
                line = StepLine.of(step.step, step.loss, step.grad_norm, step.epoch, step.seconds)
                if (difference := self._steps.compare(line)) is not None:
                    self._note_difference(step.step, difference)
                with self._records_are_optional():
                    self._steps.record(line)
                for spike in self._spikes.of(step):
                    self._say(f"step {spike.step}: the {spike.measure} {spike.value:g} is far above the last ones")
                    self._write(spike)
                return
            case node_messages.WorkerStarted(rank=rank, epoch=epoch):
                self._started_in[rank] = epoch
            case node_messages.DeathNoted(seen=seen, announced=announced):
                self._current.seen = self._current.seen or seen
                self._current.died = self._current.died or announced or seen
            case node_messages.ExecutionNoted(seconds=seconds):
                self._current.rebuild = max(self._current.rebuild, seconds.get("rebuild", 0.0))
                restore = sum(seconds.get(part, 0.0) for part in _RESTORE_PARTS)
                self._current.restore = max(self._current.restore, restore)
            case node_messages.FirstStepNoted():
                self._note_first_step(message)
            case node_messages.FinalNoted(rank=rank, state_sha256=sha256):
                self._final[rank] = sha256
            case node_messages.DeviceNoted(node=node, ranks=ranks, evidence=evidence):
                of = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
                self._say(f"{node}{of}: {evidence}")
            case node_messages.BillNoted(warning=warning):
                if warning and warning not in self._warned:
                    self._warned.add(warning)
                    self._say(f"warning: {warning}")
        self._write(message)

    def _note_difference(self, step: Step, difference: str) -> None:
        rank = Rank(self._config.world_size - 1)
        replaced = self._started_in.get(rank, Epoch(0)) == self._epoch
        whose = f", computed by the replacement of rank {rank}" if replaced else ""
        self._say(f"WARNING: {difference}{whose}")
        noted = StepDiffered(step, rank, replaced, difference)
        self._write(noted)

    def _note_numbers(self, ended: Sequence[BadStep]) -> None:
        for bad in ended[len(self._bad) :]:
            self._bad.append(bad)
            self._write(bad)
            if bad.outcome.startswith("did not"):
                self._say(f"step {bad.step}: {bad.what}, and it {bad.outcome}")

    def close(self, failure: str) -> None:
        """The job is over; the summary is written, also of a job that failed."""
        if self._closed:
            return
        self._closed = True
        self._reserve.give_up()
        records = tuple(_record(epoch, measured) for epoch, measured in sorted(self._measured.items()))
        final = {} if failure else dict(sorted(self._final.items()))
        summary = Summary(
            world_size=self._config.world_size,
            steps=self._last_step,
            state_sha256=final,
            recoveries=records,
            bad_numbers=tuple(self._bad),
            blamed=tuple(self._blamed.values()),
            outcome="stopped" if failure else "finished",
            reason=failure,
            epochs=tuple(self._epochs.values()),
            moves=tuple(self._moves),
        )
        with self._records_are_optional():
            write_summary(self._config.log_dir, summary)
        self._write(_Ended(failure))
        with self._records_are_optional():
            self._journal.close()
            self._steps.close()
        if not failure and self._phase == "Starting":
            self._say("finished; nothing was protected, for the script did not ask for recovery")
        elif not failure:
            word = "recovery" if len(records) == 1 else "recoveries"
            who = f"; to blame: {', '.join(self._blamed)}" if self._blamed else ""
            self._say(f"finished at step {self._last_step} after {len(records)} {word}{who}")

    def _write(self, message: object, now: float | None = None, kind: str = "note") -> None:
        with self._records_are_optional():
            self._journal.write(kind, message, time=time.time(), now=now, epoch=self._epoch)

    @contextmanager
    def _records_are_optional(self) -> Iterator[None]:
        """A full disk costs the record, not the job, and not a word on the console: so around each write alone."""
        try:
            yield
        except OSError as error:
            if not self._is_torn:
                self._is_torn = True
                self._say(f"WARNING: the records in {self._config.log_dir} are incomplete from here on: {error}")

    # --- recoveries ---------------------------------------------------------------------------------------------------

    def _tell(self, command: core.Command, job: Job) -> None:
        match command:
            case core.Park(epoch=epoch):
                cause = job.timeline.causes[-1] if job.timeline else "a deadline was missed"
                self._epochs[epoch] = EpochRecord(epoch, time.time(), cause, is_restart=False)
                self._say(f"epoch {epoch}: {cause}; everybody else stops and waits")
            case core.RestartAll(epoch=epoch, reason=reason, from_checkpoint=from_checkpoint):
                start = "from the newest checkpoint" if from_checkpoint else "from the top"
                self._epochs[epoch] = EpochRecord(epoch, time.time(), reason, is_restart=True)
                self._say(f"epoch {epoch}: {reason}; all workers start again, {start}")
                self._current = _Measured()
            case core.Resume():
                self._resume(job.recoveries[-1])
            case core.Fence(ranks=ranks, reason=reason) if job.timeline is None or job.timeline.causes[-1] != reason:
                self._say(f"rank {', '.join(map(str, ranks))} is ended: {reason}")

    def _resume(self, recovery: Recovery) -> None:
        measured, self._current = self._current, _Measured()
        measured.recovery, measured.resumed = recovery, time.time()
        self._measured[recovery.epoch] = measured
        sources = "; ".join(f"rank {rank} from {source}" for rank, source in list(recovery.source_of.items())[:8])
        self._say(
            f"epoch {recovery.epoch}: goes on from step {recovery.resume_step} "
            f"after {recovery.seconds['total']:.2f} s, "
            f"{len(recovery.rebuilt)} groups rebuilt and {recovery.kept} kept; {sources or 'all from live memory'}"
        )

    def _note_first_step(self, noted: node_messages.FirstStepNoted) -> None:
        measured = self._measured.get(noted.epoch)
        if measured is None:
            return
        measured.stepped.add(noted.rank)
        measured.first_step = max(measured.first_step or 0.0, noted.time)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # whoever listened has gone
            print(f"flashrecovery: {line}", file=self._out, flush=True)


@dataclass(frozen=True)
class GroupsPlanned:
    """Which groups the plan of this epoch rebuilds, each with the reason; the commands beside it name them only."""

    resume_step: Step
    rebuild: Mapping[GroupKey, str]
    kept: int


@dataclass(frozen=True)
class SlowNoted:
    """``evidence`` is missing of a rank that is slow no more. A new epoch knows of nobody."""

    rank: Rank
    evidence: str | None


@dataclass(frozen=True)
class _PhaseEntered:
    phase: str


@dataclass(frozen=True)
class _Ended:
    failure: str


def _record(epoch: Epoch, measured: _Measured) -> RecoveryRecord:
    recovery = measured.recovery
    assert recovery is not None
    seconds = recovery.seconds
    died = measured.died or measured.resumed - seconds["total"]
    opened = measured.resumed - seconds["total"]
    end = measured.first_step or measured.resumed
    return RecoveryRecord(
        epoch=epoch,
        cause=recovery.cause,
        lost_ranks=recovery.lost_ranks,
        resume_step=recovery.resume_step,
        steps_recomputed=max(0, measured.newest - recovery.resume_step),
        seconds=PhaseSeconds(
            detect=max(0.0, opened - died),
            park=seconds["park"],
            replace=max(0.0, seconds["replace"] - seconds["park"]),
            rebuild=measured.rebuild,
            restore=max(0.0, seconds["execute"] - measured.rebuild),
            first_step=end - measured.resumed,
            total=end - died,
        ),
        groups=GroupTally(rebuilt=len(recovery.rebuilt), kept=recovery.kept),
        source=dict(recovery.source_of),
    )
