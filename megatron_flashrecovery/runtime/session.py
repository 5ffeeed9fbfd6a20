"""Inside a trainer: what an adapter calls at the seams of the framework's loop.

The loop never sees a failure. ``run_step`` returns when the step that it was asked for is complete, however often it
was computed, by whom, and on whose state; everything in between happens inside it, on the thread that called it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.nccl_communicator import contradictions, nccl_environment
from megatron_flashrecovery.comm.parking import Interrupted
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.comm.tensor_bytes import payload_of
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.pace import STEP
from megatron_flashrecovery.core.reports import Update
from megatron_flashrecovery.runtime import dialogue
from megatron_flashrecovery.runtime.bulletin import Bulletin
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.comparison import Comparison
from megatron_flashrecovery.runtime.estate import Estate
from megatron_flashrecovery.runtime.framework import Framework, StepRecord
from megatron_flashrecovery.runtime.guarded_call import GuardedCall
from megatron_flashrecovery.runtime.injector import Injector
from megatron_flashrecovery.runtime.keeper import Keeper
from megatron_flashrecovery.runtime.line import Line
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.runtime.ownership import Ownership
from megatron_flashrecovery.runtime.parking_lot import ParkingLot
from megatron_flashrecovery.runtime.progress import NO_STEP, Progress, with_record
from megatron_flashrecovery.runtime.recovery import Recovery
from megatron_flashrecovery.runtime.refusal import Refusal
from megatron_flashrecovery.runtime.seat import FROM_CHECKPOINT, taken_pulse, taken_seat
from megatron_flashrecovery.runtime.settling import description, find_berth, take_memory

T = TypeVar("T")
_GROUP_TIMEOUT = timedelta(hours=1)


class Session:
    """One per process. Every method is the main thread's."""

    def __init__(self, seat: dialogue.Seat, channel: Channel) -> None:
        self._seat = seat
        self._channel = channel
        self.rank = seat.rank
        self._progress = Progress(update=Update.WRITING if seat.joining else Update.BEFORE, skip=seat.skip)
        self._bulletin = Bulletin(seat.store_host, seat.store_port, seat.join_timeout, seat.token.encode())
        self._pulse = taken_pulse()
        self._lot = ParkingLot(
            seat.drain_timeout,
            lambda: self._line.report(),
            lambda matches: self._registry.match(matches),
            self._pulse,
            lambda spot, error: self._line.say_operation_failed(spot, error),
        )
        estate = self._estate = Estate(seat, self._bulletin)
        self._registry = GroupRegistry(
            rank=seat.rank,
            world_size=seat.world_size,
            store=self._bulletin.store,
            parking=self._lot,
            epoch=seat.epoch,
            timeout=_GROUP_TIMEOUT,
            joining=estate.record,
            watch=self._pulse,
        )
        self._line = Line(seat, channel, self._lot, self._registry, self._progress, self._pulse)
        self._injector = Injector(estate.injections, channel, self._registry.cut_a_connection, estate.note_fired)
        self._line.injector = self._injector
        self._joining = seat.joining
        self._entered = self._inside = False
        self._last_step = NO_STEP
        self._last_resume: Step | None = None
        self._call_of: dict[Step, Callable[[], StepRecord]] = {}
        self._calls_after: dict[Step, list[GuardedCall]] = {}
        self._framework: Framework
        self._ownership: Ownership
        self._keeper: Keeper
        self.refusal: Refusal
        self._recovery: Recovery

    @classmethod
    def from_environment(cls) -> Session:
        """Raises ``ConfigError`` in a process that ``flashrecovery run`` did not start."""
        return cls(*taken_seat())

    @property
    def is_joining(self) -> bool:
        """This process replaces another: it must not load a checkpoint, for it gets its state from the others."""
        return self._joining

    @property
    def must_load(self) -> bool:
        """The job fell back: this process has to start from the newest checkpoint, also if nobody asked for one."""
        return FROM_CHECKPOINT in os.environ and not self._joining

    def install_groups(self) -> None:
        """From here on every process group that is made in this process is a handle. Before ``init_process_group``.

        Raises ``ConfigError`` if the environment tells NCCL to end this process where it has to wait for a replacement.
        """
        if wrong := contradictions(os.environ):
            raise ConfigError(wrong[0])
        for name, value in nccl_environment().items():
            os.environ.setdefault(name, value)
        self._registry.install()
        self._line.start()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Around what a replacement leaves out of its start, such as loading a checkpoint."""
        with self._registry.unrecorded():
            yield

    def attach(self, framework: Framework, choices: Choices | None = None) -> None:
        """Everything is built: model, optimizer, scheduler, data. Memory for the copies is taken here.

        Raises ``ConfigError`` if there is no host for the second copy, or not enough memory for it.
        """
        self._framework = framework
        choices = choices or Choices()
        self._ownership = Ownership(framework, choices.checksum_steps)
        self.refusal = Refusal(self._seat, self._channel, self._lot, self._line, self._progress, choices)
        berth = find_berth(self._bulletin, self._seat, framework.data_parallel_peers())
        memories = take_memory(self._line, self._bulletin, self._seat, berth, framework, self._ownership)
        self._keeper = Keeper(
            self._seat, self._bulletin, berth, memories, self._ownership.mirrored(), self._lot.notify, self._injector
        )
        self._line.copies = self._keeper
        self._keeper.before_delivery = Comparison(
            self._keeper, self._channel, self._ownership.checksum, framework.data_parallel_peers()
        )
        self._channel.send(description(self.rank, framework, self._ownership, self._registry, berth))
        self._recovery = Recovery(
            self._seat, self._lot, self._line, self._registry, self._keeper, framework, self._ownership, self._progress
        )

    def first_step(self, loaded: Step = NO_STEP) -> Step:
        """How many steps are complete when the loop begins: ``loaded`` (the framework's own checkpoint, or 0) on a
        normal start; on a replacement, the step that the job goes on from, with its state in place."""
        if not self._joining:
            if self.must_load and not loaded:
                raise ConfigError(
                    "the job fell back to its checkpoint, but none was loaded: nothing vouches for its state"
                )
            self._progress.completed = loaded
            if loaded:
                self.checkpoint_written(loaded)
            return loaded
        self._line.say_ready(b"")
        self._recovery.join()
        self._last_resume = self._progress.completed
        self._report_again()
        # What the framework still does before its loop is a part of its start, and the others have done it.
        self._registry.rehearse(True)
        return self._progress.completed

    @property
    def has_entered(self) -> bool:
        """The first protected step has begun: from now on whatever enters a collective needs a guard."""
        return self._entered

    @property
    def last_resume(self) -> Step | None:
        """The step from which the newest recovery went on, the same on all ranks; None before the first."""
        return self._last_resume

    @property
    def is_inside(self) -> bool:
        """Of a step or a guarded call."""
        return self._inside

    def run_step(self, step: Step, call: Callable[[], StepRecord]) -> StepRecord:
        """Complete step ``step + 1`` by ``call``, which the loop makes when ``step`` steps are complete.

        A loop that reports, evaluates and saves behind a step lets its replacement begin one step early: then nothing
        is computed here, the record of that step is returned, and the replacement joins the others in what follows it.
        """
        self._enter()
        wanted = Step(step + 1)
        began = time.monotonic()
        self._call_of[wanted] = call
        with self._inside_of(STEP, wanted):
            self._do(lambda: self._reach(wanted, again=False), f"step {wanted}", wanted)
        record = self._progress.records[wanted]
        self._last_step = wanted
        for old in [each for each in {*self._call_of, *self._calls_after} if each < wanted - 1]:
            self._call_of.pop(old, None)
            self._calls_after.pop(old, None)
        self._line.say_step(wanted, record, time.monotonic() - began)
        self.mark(Moment.BETWEEN, self._ownership.of_peers)
        return record

    def guard(self, name: str, call: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """A call between two steps, or behind the last one, that can enter a collective, and that every rank makes.

        A recovery goes back to what follows its resume step: there a replacement makes all such calls from the first
        on, and so does everybody, by ``again`` if that is something else than ``call``. ``name`` is for people.
        """
        self._enter()
        if self._inside:
            with self._pulse.doing(name, self._last_step):
                return call()
        guarded = GuardedCall(name, call, again or call)
        self._calls_after.setdefault(self._last_step, []).append(guarded)
        with self._inside_of(name, self._last_step):
            self._do(guarded.make, name, self._last_step)
        return guarded.result  # type: ignore[no-any-return]

    def mark(self, moment: Moment, tensor: torch.Tensor | None = None) -> None:
        """The framework is at this moment of a step, and computes with this tensor."""
        self._injector.mark(moment, Step(self._progress.completed + (moment is not Moment.BETWEEN)), tensor)

    def gate(self, objects: Callable[[], bool] = lambda: False) -> bool:
        """Right before the first reduction that the update needs: nobody updates to s+1 before all mirrors of s are
        acknowledged (invariant 1), and the reductions behind this point carry that to everyone. Returns whether
        somebody ``objects`` to the update, as far as the gate itself asks others."""
        self._lot.check()
        completed = self._progress.completed
        if not self._ownership.sharded:
            self._keep_before_update()
        due = completed if self._ownership.sharded else Step(completed + 1)
        self._lot.wait_until(lambda: self._keeper.has_acknowledged(due), self._mirror_of(due))
        if self._ownership.sharded:
            self._ownership.take_checksum(completed)
        self._recovery.wait_for_device()
        self._lot.check()
        self._progress.update = Update.ARMED
        self._lot.begin_telling(Step(completed + 1))
        objection = objects()
        for group in self._framework.gate_groups():
            objection = self._recovery.meet(group, objection)
        return objection

    def foretell(self, group: torch.distributed.ProcessGroup, operation: str, results: Sequence[torch.Tensor]) -> None:
        """The next operations of that name on that group in this step have these results, one after the other: nobody
        communicates for them. On every member."""
        assert isinstance(group, FlashGroup), group
        self._lot.foretell(group.identity.key, operation, [payload_of(result) for result in results])

    def before_update(self) -> None:
        """Right before the first write to masters or moments. Raises ``Interrupted`` if an abort has begun: an
        operation that it cut short may have returned without having reduced anything."""
        if not self._lot.answering:
            self._lot.check()
        self._progress.update = Update.WRITING

    def after_update(self) -> None:
        """The last inner optimizer is done."""
        self._progress.update = Update.APPLIED

    @property
    def reported(self) -> Mapping[str, Step]:
        """The newest step of each kind of report that this rank's predecessor had written."""
        return self._estate.reported

    def note_reported(self, name: str, step: Step) -> None:
        """The framework's own report ``name`` of this step is written: a replacement does not write it again."""
        self._channel.send(dialogue.Reported(name, step))
        self._estate.note_reported(name, step)

    def checkpoint_written(self, step: Step) -> None:
        """The framework's own checkpoint of ``step`` is complete on every rank."""
        if self.rank == 0:
            self._channel.send(dialogue.CheckpointDone(step))

    def finish(self, state_sha256: str) -> None:
        """The loop is over. Returns when it is over for everybody: until then this rank may still be needed."""
        self._enter()
        last = self._last_step

        def wait() -> None:
            self._line.say_finished(last, state_sha256)
            self._lot.wait_until_released()

        self._calls_after.setdefault(self._last_step, []).append(GuardedCall("the end", wait, wait))
        with self._inside_of("the end", last):
            self._do(wait, "the end", last)
        self._pulse.end()
        self._keeper.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Before the first protected step, or the end: the state that training starts from gets its second copy."""
        if self._entered:
            return
        self._entered = True
        self._pulse.begin(self._progress.completed)
        step = self._last_step = self._progress.completed
        if self._joining:
            self._registry.rehearse(False)
            # Whatever was built between the restore and here may have drawn from a generator.
            self._framework.restore_values(self._progress.values[step])
            self._joining = False
            return
        startup = self._registry.startup_record().to_bytes()
        self._registry.stop_recording()
        self._complete(step, StepRecord(None, None))
        if not self._ownership.sharded:
            self._keeper.capture(step, with_record(self._progress.values[step], None))
        has_copy = partial(self._keeper.has_acknowledged, step)
        self._lot.wait_until(has_copy, self._mirror_of(step), self._seat.join_timeout)
        self._estate.begin(startup)
        self._line.say_ready(startup)
        with self._inside_of("the beginning", step):
            self._do(self._lot.wait_until_begun, "the beginning", step)

    def _mirror_of(self, step: Step) -> str:
        return f"rank {self._keeper.host} to acknowledge the mirror of step {step}"

    @contextmanager
    def _inside_of(self, activity: str, step: Step) -> Iterator[None]:
        self._inside = True
        try:
            with self._pulse.doing(activity, step):
                yield
        finally:
            self._inside = False

    def _do(self, call: Callable[[], object], name: str, upto: Step) -> None:
        """Make the call, and if a recovery cuts it short, everything from the resume step up to it again."""
        attempt = call
        while True:
            try:
                self._lot.check()
                with self._lot.discarding(lambda: self._progress.update is Update.BEFORE):
                    attempt()
                # What an operation has brought since the order to stop may be void, and must not leave the call.
                self._lot.check()
                return
            except Interrupted:
                self._execute()
                if self._progress.completed < upto or attempt is not call:
                    print(f"flashrecovery: goes on from step {self._progress.completed}, in {name}", flush=True)
                attempt = partial(self._reach, upto, again=True)

    def _reach(self, wanted: Step, again: bool) -> None:
        """Complete ``wanted``; after a recovery also make what follows each step on the way, as a replacement does."""
        while True:
            completed = self._progress.completed
            if again:
                for guarded in self._calls_after.get(completed, ()):
                    with self._pulse.doing(guarded.name, completed):
                        guarded.repeat()
            if completed >= wanted:
                return
            self._compute(Step(completed + 1))

    def _compute(self, due: Step) -> None:
        assert due in self._call_of, f"step {due} was not computed here, so it cannot be computed again"
        self._progress.update = Update.BEFORE
        self._lot.end_telling()
        record = self._call_of[due]()
        self._lot.end_telling()
        self._complete(due, record)
        self.refusal.completed(due)
        self._line.say_first_step(due)

    def _complete(self, step: Step, record: StepRecord) -> None:
        values = self._framework.values()
        self._progress.complete(step, record, values)
        if self._ownership.sharded:
            self._keeper.capture(step, with_record(values, record))
        self._framework.keep_data(Step(step - 1))

    def _keep_before_update(self) -> None:
        """Replicated optimizers: what only this rank has (generators, data position) is final now, and must be with its
        host before anybody updates, because there is no undo afterwards."""
        due = Step(self._progress.completed + 1)
        if not self._keeper.has_acknowledged(due):
            self._ownership.take_checksum(self._progress.completed)
            self._keeper.capture(due, with_record(self._framework.values(), None))

    def _execute(self) -> None:
        """Carry plans out until one of them is not overtaken by another loss."""
        self._lot.end_telling()
        self._recovery.execute()
        self._last_resume = self._progress.completed
        self._report_again()

    def _report_again(self) -> None:
        """Whoever reports the steps may have been lost after the resume step and before it said so."""
        step = self._progress.completed
        record = self._progress.records[step]
        if record.loss is not None or record.grad_norm is not None:
            self._line.say_step(step, record, 0.0)
