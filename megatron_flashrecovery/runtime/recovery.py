"""Carrying out one rank's share of a plan, on the main thread.

The order matters: what belongs to a timeline that is over is discarded before anything is taken up (invariant 2),
state is in place before the peers compare it, and the share counts as executed only once the host has acknowledged the
mirror of the resume step (invariant 3). Another loss may come between any two lines: the next plan starts from the
first line again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.parking import Interrupted
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.core.errors import FlashRecoveryError, LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.messages import ExecutePlan
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.reports import Update
from megatron_flashrecovery.core.shares import Share, Source
from megatron_flashrecovery.detect.exceptions import fault_of, leaves_device_unusable
from megatron_flashrecovery.runtime.dialogue import Seat
from megatron_flashrecovery.runtime.framework import Framework, StepRecord
from megatron_flashrecovery.runtime.keeper import Keeper
from megatron_flashrecovery.runtime.line import Line
from megatron_flashrecovery.runtime.ownership import Ownership
from megatron_flashrecovery.runtime.parking_lot import ParkingLot
from megatron_flashrecovery.runtime.progress import Progress, split_record, with_record
from megatron_flashrecovery.state.pieces import TensorPiece, Value
from megatron_flashrecovery.state.tensor_fingerprint import tensors_fingerprint

_GRACE = 2.0


class PeersDisagree(FlashRecoveryError):
    """After a restore the replicated pieces of data-parallel peers are not the same bits."""


class NotCompleted(FlashRecoveryError):
    """A rank was taken to hold a step of which it holds the tensors only."""


class Recovery:
    def __init__(
        self,
        seat: Seat,
        lot: ParkingLot,
        line: Line,
        registry: GroupRegistry,
        keeper: Keeper,
        framework: Framework,
        ownership: Ownership,
        progress: Progress,
    ) -> None:
        self._seat = seat
        self._lot = lot
        self._line = line
        self._registry = registry
        self._keeper = keeper
        self._framework = framework
        self._ownership = ownership
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._live = not seat.joining
        self._cut_short = 0
        """Plans of this recovery, here."""

    def join(self) -> None:
        """For a replacement: wait for the plan that it joins by, and carry it out."""
        self._lot.wait_for_plan()
        self.execute()

    def execute(self) -> None:
        """Until a plan has been carried out by everybody."""
        while True:
            plan = self._lot.take_plan()
            try:
                self._attempt(plan)
                self._cut_short = 0
                return
            except Interrupted:
                continue

    def meet(self, group: object, objects: bool) -> bool:
        """A reduction of a few bytes: nobody leaves before every member has come. Returns whether somebody objects."""
        assert isinstance(group, dist.ProcessGroup)
        told = torch.full((1,), int(objects), dtype=torch.int32, device=self._device())
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
        return bool(told.item())  # small results have been brought to the host already

    def wait_for_device(self) -> None:
        """Armed is said of gradients that are reduced, not of reductions that are queued: one that is aborted later
        would leave rubbish. The norm that follows makes the host wait anyway. No GPU has run this yet."""
        device = self._device()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _attempt(self, plan: ExecutePlan) -> None:
        (share,) = plan.shares
        self._seconds = {}
        try:
            self._carry_out(plan, share)
        except (FlashRecoveryError, RuntimeError) as error:
            if leaves_device_unusable(error):
                raise  # nothing can be restored into it: another process is refilled from the own copy
            # Somebody else's death looks like this too: then the order to park is on its way, and says so better.
            if not self._lot.stops_within(_GRACE):
                self._say_why_not(plan, share, error)
            self._lot.wait_until_over()
        else:
            self._line.say_executed(plan.epoch, self._seconds)
            self._lot.wait_until_over()

    def _say_why_not(self, plan: ExecutePlan, share: Share, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        is_of_a_connection = isinstance(error, LinkLost) or (
            not isinstance(error, FlashRecoveryError) and fault_of(error) is Fault.PROCESS_ENDED
        )
        self._cut_short += 1
        if share.source is Source.LIVE and is_of_a_connection and self._cut_short == 1:
            # Whoever speaks need not be to blame, and this may be the last process that has its state. The second time
            # it speaks of itself.
            self._line.say_plan_cut_short(plan.epoch, reason)
        else:
            fault = Fault.CORRUPTION if isinstance(error, PeersDisagree) else Fault.PLAN_FAILED
            self._line.say_failed(plan.epoch, reason, fault)

    def _carry_out(self, plan: ExecutePlan, share: Share) -> None:
        step = plan.resume_step
        self._keeper.enter_epoch(plan.epoch, step, share.gives_mirror_to)
        if self._live:
            self._framework.discard_partial_step()
        if share.source is not Source.LIVE:
            self._progress.update = Update.WRITING
        with self._timed("rebuild"):
            self._rebuild(plan, share)
        with self._timed("restore"):
            record, values = self._restore(share, step)
            self._give_state(share, step)
        with self._timed("gather"):
            if plan.regather:
                self._framework.gather_parameters()
        with self._timed("agree"):
            self._agree(step)
        self._framework.restore_values(values)
        self._framework.rewind_data(step)
        self._progress.go_to(step, record, values)
        self._progress.skip, self._progress.examine = plan.skip, plan.examine
        with self._timed("mirror"):
            self._keep(step, record, values)

    def _rebuild(self, plan: ExecutePlan, share: Share) -> None:
        if self._live:
            self._registry.rebuild(share.rebuild, plan.epoch)
        else:
            # First: one that is cut short is made up for by a rebuild, for the rest of the start is kept only once.
            self._live = True
            self._registry.go_live(plan.epoch)

    # --- state --------------------------------------------------------------------------------------------------------

    def _restore(self, share: Share, step: Step) -> tuple[StepRecord, dict[str, Value]]:
        match share.source:
            case Source.LIVE:
                if step not in self._progress.records:
                    # Applied, but cut short before its call returned: what the call reports is not known here.
                    raise NotCompleted(f"rank {self._seat.rank} has applied step {step} and never completed it")
                return self._progress.records[step], dict(self._progress.values[step])
            case Source.OWN:
                return self._read_own(step, self._ownership.mirrored())
            case Source.MIRROR:
                assert share.giver is not None
                return self._read_mirror(share.giver, step)
            case Source.PEER:
                assert share.giver is not None
                return self._copy_peer(share.giver, share.unique_from, step)

    def _read_mirror(self, host: Rank, step: Step) -> tuple[StepRecord, dict[str, Value]]:
        """A mirror that is not what its owner sent does not exist (invariant 8): then this node's own copy may do."""
        try:
            self._keeper.fetch_mirror(host, step)
            return self._read_own(step, self._ownership.mirrored())
        except SnapshotMismatch as mismatch:
            print(f"flashrecovery: the mirror that rank {host} keeps cannot be used: {mismatch}", flush=True)
            return self._read_own(step, self._ownership.mirrored())

    def _read_own(self, step: Step, pieces: list[TensorPiece]) -> tuple[StepRecord, dict[str, Value]]:
        values, record = split_record(self._keeper.restore(step, pieces))
        return record or StepRecord(None, None), values

    def _copy_peer(self, peer: Rank, unique_from: Rank | None, step: Step) -> tuple[StepRecord, dict[str, Value]]:
        """Everything from a data-parallel peer, but what only this rank has from its own copy or its host's mirror."""
        if unique_from is not None:
            self._keeper.fetch_mirror(unique_from, step)
        mine, _ = split_record(self._keeper.restore(step, self._ownership.mirrored()))
        peers, record = split_record(self._keeper.fetch_state(peer, step, self._framework.tensor_pieces()))
        unique = self._framework.unique_values()
        return record or StepRecord(None, None), {
            name: mine[name] if name in unique else value for name, value in peers.items()
        }

    def _give_state(self, share: Share, step: Step) -> None:
        if not share.gives_state_to:
            return
        values = with_record(self._progress.values[step], self._progress.records[step])
        for rank in share.gives_state_to:
            try:
                self._keeper.give_state((rank,), step, self._framework.tensor_pieces(), values)
            except (LinkLost, SnapshotMismatch) as error:
                # Whoever takes it says so, and gets it from another process; this one may be the last that has it.
                print(f"flashrecovery: {error}; the state of step {step} was not given to rank {rank}", flush=True)

    def _keep(self, step: Step, record: StepRecord, values: dict[str, Value]) -> None:
        """The resume step has its second copy again, also where the host or this rank's own memory is new."""
        if step not in self._keeper.own_steps():
            self._keeper.capture(step, with_record(values, record))
        else:
            self._keeper.mirror_again(step)
        self._lot.wait_until(
            lambda: self._keeper.has_acknowledged(step),
            f"rank {self._keeper.host} to acknowledge the mirror of step {step}",
            self._seat.execute_timeout,
        )

    # --- agreement ----------------------------------------------------------------------------------------------------

    def _agree(self, step: Step) -> None:
        """Data-parallel peers compare what they should share, before anybody steps."""
        pieces = [(piece.name, piece.tensor) for piece in self._ownership.replicated() if not piece.peers_differ]
        mine = step.to_bytes(8, "little") + tensors_fingerprint(pieces)
        own = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device())
        peers = self._framework.data_parallel_peers()
        said = [torch.empty_like(own) for _ in peers]
        dist.all_gather(said, own, group=self._group())
        differing = [rank for rank, theirs in zip(peers, said, strict=True) if not torch.equal(theirs, own)]
        if differing:
            raise PeersDisagree(
                f"rank {self._seat.rank} at step {step} holds other parameters than its data-parallel peers "
                f"{', '.join(map(str, differing))}: one of the copies was not what it should be"
            )

    def _group(self) -> dist.ProcessGroup:
        group = self._framework.agreement_group()
        assert isinstance(group, dist.ProcessGroup)
        return group

    def _device(self) -> torch.device:
        return self._framework.tensor_pieces()[0].tensor.device

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] = time.monotonic() - began
