"""Inside a trainer: what an adapter calls at the seams of the framework's loop.

The loop never sees a failure. ``run_step`` returns when the step that it was asked for is complete, however often it
was computed, by whom, and on whose state; everything in between happens inside it, on the thread that called it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.comm.nccl_communicator import contradictions, nccl_environment
from megatron_flashrecovery.comm.parking import Interrupted
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.comm.startup_record import StartupRecord
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.messages import Update
from megatron_flashrecovery.runtime import dialogue
from megatron_flashrecovery.runtime.bulletin import Bulletin
from megatron_flashrecovery.runtime.framework import Framework, Moment, StepRecord
from megatron_flashrecovery.runtime.injector import Injector
from megatron_flashrecovery.runtime.keeper import Keeper
from megatron_flashrecovery.runtime.line import Line
from megatron_flashrecovery.runtime.ownership import Ownership
from megatron_flashrecovery.runtime.parking_lot import ParkingLot
from megatron_flashrecovery.runtime.progress import NO_STEP, Progress, with_record
from megatron_flashrecovery.runtime.recovery import Recovery
from megatron_flashrecovery.runtime.seat import FROM_CHECKPOINT, taken_seat
from megatron_flashrecovery.runtime.settling import Berth, find_berth, take_memory

T = TypeVar("T")
_GROUP_TIMEOUT = timedelta(hours=1)


class Session:
    """One per process. Every method is the main thread's."""

    def __init__(self, seat: dialogue.Seat, channel: Channel) -> None:
        self._seat = seat
        self._channel = channel
        self.rank = seat.rank
        self._progress = Progress(update=Update.WRITING if seat.joining else Update.BEFORE)
        self._bulletin = Bulletin(seat.store_host, seat.store_port, seat.join_timeout, seat.token.encode())
        self._lot = ParkingLot(
            seat.drain_timeout, lambda: self._line.report(), lambda matches: self._registry.match(matches)
        )
        record = StartupRecord.from_bytes(seat.startup) if seat.joining and seat.startup else None
        self._registry = GroupRegistry(
            rank=seat.rank,
            world_size=seat.world_size,
            store=self._bulletin.store,
            parking=self._lot,
            epoch=seat.epoch,
            timeout=_GROUP_TIMEOUT,
            joining=record,
        )
        self._line = Line(seat, channel, self._lot, self._registry, self._progress)
        self._injector = Injector(seat.injections, channel)
        self._joining = seat.joining
        self._entered = False
        self._last_step = NO_STEP
        self._guarded: list[tuple[str, Callable[[], object]]] = []
        self._doing = "what follows the loop"
        self._previous_call: Callable[[], StepRecord] | None = None
        self._framework: Framework
        self._ownership: Ownership
        self._keeper: Keeper
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

    def attach(self, framework: Framework) -> None:
        """Everything is built: model, optimizer, scheduler, data. Memory for the copies is taken here.

        Raises ``ConfigError`` if there is no host for the second copy, or not enough memory for it.
        """
        self._framework = framework
        self._ownership = Ownership(framework)
        berth = find_berth(self._bulletin, self._seat, framework.data_parallel_peers())
        memories = take_memory(self._line, self._bulletin, self._seat, berth, framework, self._ownership)
        self._keeper = Keeper(
            self._seat, self._bulletin, berth, memories, self._ownership.unique(), self._lot.notify, self._injector
        )
        self._line.copies = self._keeper
        self._describe(berth)
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
            self._progress.completed = self._last_step = loaded
            if loaded:
                self.checkpoint_written(loaded)
            return loaded
        self._line.say_ready(b"")
        self._recovery.join()
        self._report_again()
        self._last_step = self._progress.completed
        return self._last_step

    def run_step(self, step: Step, call: Callable[[], StepRecord]) -> StepRecord:
        """Complete step ``step + 1`` by ``call``, which the loop makes when ``step`` steps are complete."""
        self._enter(step)
        wanted = Step(step + 1)
        began = time.monotonic()
        while True:
            try:
                self._lot.check()
                with self._lot.discarding(self._is_before_update):
                    record = self._reach(wanted, call)
                break
            except Interrupted:
                self._execute()
        self._previous_call = call
        self._last_step = wanted
        self._guarded.clear()
        self._line.say_step(wanted, record, time.monotonic() - began)
        self.mark(Moment.BETWEEN)
        return record

    def guard(self, name: str, call: Callable[[], T]) -> T:
        """A call behind the last step that can enter a collective, and that every rank comes to, a replacement too.

        A replacement makes all such calls from the first on, so after a recovery everybody does; ``name`` is for
        people.
        """
        self._enter(self._progress.completed)
        results: list[T] = []
        self._guarded.append((name, lambda: results.append(call())))
        self._make_guarded_calls(from_the_first=False)
        return results[-1]

    def mark(self, moment: Moment) -> None:
        """The framework is at this moment of a step."""
        after = moment is Moment.BETWEEN
        self._injector.mark(moment, Step(self._progress.completed + (not after)))

    def gate(self) -> None:
        """Right before the first reduction that the update needs: nobody updates to s+1 before all mirrors of s are
        acknowledged (invariant 1), and the reductions behind this point carry that to everyone."""
        self._lot.check()
        if not self._ownership.sharded:
            self._keep_before_update()
        completed = self._progress.completed
        due = completed if self._ownership.sharded else Step(completed + 1)
        self._lot.wait_until(
            lambda: self._keeper.has_acknowledged(due),
            self._mirror_of(due),
        )
        self._wait_for_device()
        self._lot.check()
        self._progress.update = Update.ARMED
        self._lot.begin_telling(Step(completed + 1))
        for group in self._framework.gate_groups():
            self._recovery.meet(group)

    def before_update(self) -> None:
        """Right before the first write to masters or moments. Raises ``Interrupted`` if an abort has begun: an
        operation that it cut short may have returned without having reduced anything."""
        if not self._lot.answering:
            self._lot.check()
        self._progress.update = Update.WRITING

    def after_update(self) -> None:
        """The last inner optimizer is done."""
        self._progress.update = Update.APPLIED

    def checkpoint_written(self, step: Step) -> None:
        """The framework's own checkpoint of ``step`` is complete on every rank."""
        if self.rank == 0:
            self._channel.send(dialogue.CheckpointDone(step))

    def finish(self, state_sha256: str) -> None:
        """The loop is over. Returns when it is over for everybody: until then this rank may still be needed."""
        last = self._progress.completed
        self._enter(last)
        while True:
            try:
                self._line.say_finished(last, state_sha256)
                self._lot.wait_until_released()
                break
            except Interrupted:
                self._execute()
                self._make_guarded_calls(from_the_first=True)
        self._keeper.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _enter(self, step: Step) -> None:
        """Before the first protected step, or the end if there is none: the state that training starts from gets its
        second copy."""
        if self._entered:
            return
        self._entered = True
        if self._joining:
            # Building iterators between the restore and here may have drawn from a generator.
            self._framework.restore_values(self._progress.values[step])
            self._joining = False
            return
        if step != self._progress.completed:
            raise ConfigError(f"the loop begins at step {step}, but first_step said {self._progress.completed}")
        startup = self._registry.startup_record().to_bytes()
        self._registry.stop_recording()
        self._complete(step, StepRecord(None, None))
        if not self._ownership.sharded:
            self._keeper.capture(step, with_record(self._progress.values[step], None))
        self._lot.wait_until(
            lambda: self._keeper.has_acknowledged(step), self._mirror_of(step), self._seat.join_timeout
        )
        self._line.say_ready(startup)

    def _mirror_of(self, step: Step) -> str:
        return f"rank {self._keeper.host} to acknowledge the mirror of step {step}"

    def _wait_for_device(self) -> None:
        """Armed is said of gradients that are reduced, not of reductions that are queued: one that is aborted later
        would leave rubbish. The norm that follows makes the host wait anyway. No GPU has run this yet."""
        device = self._framework.tensor_pieces()[0].tensor.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _describe(self, berth: Berth) -> None:
        """What this rank is part of: every group is told of by its first member."""
        framework = self._framework
        members_of = {key: self._registry.members(key) for key in self._registry.groups}
        unique = sum(piece.nbytes for piece in self._ownership.unique())
        self._channel.send(
            dialogue.Described(
                sharded=self._ownership.sharded,
                host=berth.host,
                peers=framework.data_parallel_peers(),
                groups={key: members for key, members in members_of.items() if members[0] == self.rank},
                unique_nbytes=unique,
                warning="; ".join(berth.warnings) or None,
            )
        )

    def _reach(self, wanted: Step, call: Callable[[], StepRecord]) -> StepRecord:
        while self._progress.completed < wanted:
            due = Step(self._progress.completed + 1)
            self._compute(due, call if due == wanted else self._call_before())
        return self._progress.records[wanted]

    def _compute(self, due: Step, call: Callable[[], StepRecord]) -> None:
        self._progress.update = Update.BEFORE
        self._lot.end_telling()
        record = call()
        self._lot.end_telling()
        self._complete(due, record)
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
            self._keeper.capture(due, with_record(self._framework.values(), None))

    def _make_guarded_calls(self, from_the_first: bool) -> None:
        last = Step(self._last_step)
        while True:
            try:
                self._lot.check()
                self._catch_up(last)
                with self._lot.discarding(self._is_before_update):
                    for name, call in self._guarded if from_the_first else self._guarded[-1:]:
                        self._doing = name
                        call()
                # What an operation has brought since the order to stop may be void, and must not leave the call.
                self._lot.check()
                return
            except Interrupted:
                print(f"flashrecovery: {self._doing} after step {last} was cut short, and begins again", flush=True)
                from_the_first = True
                self._execute()

    def _is_before_update(self) -> bool:
        return self._progress.update is Update.BEFORE

    def _catch_up(self, step: Step) -> None:
        """After the loop: a recovery may have gone back behind its last step."""
        if self._progress.completed < step:
            self._reach(step, self._call_before())

    def _call_before(self) -> Callable[[], StepRecord]:
        assert self._previous_call is not None, "nothing was computed here that could be computed again"
        return self._previous_call

    def _execute(self) -> None:
        """Carry plans out until one of them is not overtaken by another loss."""
        self._recovery.execute()
        self._report_again()

    def _report_again(self) -> None:
        """Whoever reports the steps may have been lost after the resume step and before it said so."""
        step = self._progress.completed
        record = self._progress.records[step]
        if record.loss is not None or record.grad_norm is not None:
            self._line.say_step(step, record, 0.0)
