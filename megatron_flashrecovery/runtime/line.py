"""The line between a trainer and its agent: a thread that hears orders while the main thread computes, and says where
the main thread stands once it has been told to stop, also when it is stuck inside an operation."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Protocol, assert_never

from megatron_flashrecovery.comm.channel import Channel, ChannelClosed
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.ids import Epoch, GroupKey, Rank, Step
from megatron_flashrecovery.core.member import (
    CarryOut,
    GetOutOfTheWay,
    GoOn,
    Leave,
    Member,
    Mode,
    Order,
    SayReady,
    SetOut,
    StandStill,
)
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.reports import Report, Spot, Standing
from megatron_flashrecovery.detect.pulse import Pulse
from megatron_flashrecovery.runtime import dialogue
from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.runtime.injector import Injector
from megatron_flashrecovery.runtime.parking_lot import ParkingLot, Stand
from megatron_flashrecovery.runtime.progress import Progress

_BLOCKED_AFTER = 0.02
_HELD_UP_AFTER = 1.0
"""Seconds in which neither the device nor the main thread gets on. A backward pass is one call of the main thread, so
one that issues nothing for so long looks like this, too. It is not taken back, and healthy groups may be made anew."""
_POLL = 0.01
_BEAT = 0.25
"""Seconds between two signs of life in the page that the agent reads."""
_AGENT_GONE_EXIT = 18
_BROKEN_EXIT = 19


class Copies(Protocol):
    """The committed snapshots of this process."""

    def own_steps(self) -> tuple[Step, ...]: ...
    def guest_steps(self) -> Mapping[Rank, tuple[Step, ...]]: ...
    def end_transfers(self, epoch: Epoch) -> None: ...


class Line:
    """``report`` and the ``say_`` methods may be called by any thread."""

    def __init__(
        self,
        seat: dialogue.Seat,
        channel: Channel,
        lot: ParkingLot,
        registry: GroupRegistry,
        progress: Progress,
        pulse: Pulse,
    ) -> None:
        self._pulse = pulse
        self._seat = seat
        self._channel = channel
        self._lot = lot
        self._registry = registry
        self._progress = progress
        self._member = Member(seat.rank, seat.epoch, is_first=not seat.joining)
        self._saying = threading.Lock()
        self._last_said: Report | None = None
        self._first_step_due = seat.joining
        self._rebuilding: tuple[GroupKey, ...] = ()
        """By the newest plan."""
        self._held_up: tuple[Spot, object, float] | None = None
        """In which operation the device was, where the main thread was, and since when both have not changed."""
        self._errors_told: set[tuple[Epoch, GroupKey]] = set()
        self._granted: queue.SimpleQueue[tuple[dialogue.MemoryGranted, list[int]]] = queue.SimpleQueue()
        self.copies: Copies | None = None
        self.injector: Injector | None = None
        self._thread = threading.Thread(target=self._listen, name="flashrecovery-line", daemon=True)

    @property
    def epoch(self) -> Epoch:
        return self._member.epoch

    def start(self) -> None:
        self._thread.start()

    # --- what is said -------------------------------------------------------------------------------------------------

    def ask_for_memory(self, needed: dialogue.MemoryNeeded, timeout: float) -> tuple[dialogue.MemoryGranted, list[int]]:
        """Raises ``queue.Empty`` if the agent does not answer in time."""
        self._channel.send(needed)
        return self._granted.get(timeout=timeout)

    def say_ready(self, startup: bytes) -> None:
        """Stands before its first protected step. A replacement says so again whenever a newer epoch begins, until its
        plan arrives."""
        with self._saying:
            self._member.ready()
            self._channel.send(dialogue.Ready(self.epoch, startup))

    def say_executed(self, epoch: Epoch, seconds: dict[str, float]) -> bool:
        """Whether it still matters: another loss may have made the plan void."""
        with self._saying:
            if self._member.epoch != epoch:
                return False
            self._first_step_due = True
            self._member.executed()
            self._channel.send(dialogue.Executed(epoch, seconds))
            return True

    def say_operation_failed(self, spot: Spot, error: Exception) -> None:
        first_line = str(error).partition("\n")[0] or type(error).__name__
        self._say_what_failed(f"{spot.operation} of {spot.group} failed: {first_line}")

    def say_plan_cut_short(self, epoch: Epoch, reason: str) -> None:
        """By a connection, and this rank has all that it needs for another one."""
        self._say_what_failed(f"while a plan was carried out: {reason}", epoch)

    def _say_what_failed(self, what: str, epoch: Epoch | None = None) -> None:
        due = Step(self._progress.completed + 1)
        self._channel.send(dialogue.OperationFailed(self.epoch if epoch is None else epoch, due, what))

    def say_failed(self, epoch: Epoch, reason: str, fault: Fault) -> None:
        self._channel.send(dialogue.Failed(epoch, reason, fault))

    def say_step(self, step: Step, record: StepRecord, seconds: float) -> None:
        """Only the last rank does: everybody would say the same."""
        if self._seat.rank == self._seat.world_size - 1:
            done = dialogue.StepDone(step, self.epoch, record.loss, record.grad_norm, record.skipped, seconds)
            self._channel.send(done)

    def say_first_step(self, step: Step) -> None:
        """The first step that is completed after a recovery; any other is not worth a message."""
        if self._first_step_due:
            self._first_step_due = False
            self._channel.send(dialogue.Resumed(self.epoch, step))

    def say_finished(self, steps: int, state_sha256: str) -> None:
        with self._saying:
            if self._member.mode is Mode.TRAINING:
                self._member.finished()
                self._channel.send(dialogue.Finished(self.epoch, steps, state_sha256))

    def report(self) -> None:
        """Where the main thread stands and what this rank holds; nothing, if it still moves."""
        with self._saying:  # with the number of the order that it stands by, and not of one that lets it go
            stand = self._lot.stand or self._blocked()
            if stand is None:
                return
            report = self._report(stand)
            self._last_said = report
            self._channel.send(dialogue.Stood(self.epoch, self._member.number, report))

    # --- what is heard ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while True:
                self._pulse.beat()
                # Only then: asking a device may block this thread for as long as another one allocates on it.
                self._pulse.note_device(self._registry.backlog() if self._pulse.has_stood() else None)
                try:
                    message, fds = self._channel.receive(_POLL if self._lot.stopping else _BEAT)
                except TimeoutError:
                    if self._lot.stopping:
                        self._look_again()
                    self._look_for_errors()
                    continue
                if isinstance(message, dialogue.MemoryGranted):
                    self._granted.put((message, fds))
                elif isinstance(message, dialogue.InjectionOrder):
                    assert self.injector is not None
                    self.injector.add(message)
                else:
                    self._obey(message)
        except ChannelClosed:
            print("flashrecovery: the agent of this node is gone, so this worker ends", file=sys.stderr, flush=True)
            os._exit(_AGENT_GONE_EXIT)
        except Exception:
            # Without this thread the main thread would stand still for ever, and nobody would know why.
            traceback.print_exc()
            os._exit(_BROKEN_EXIT)

    def _obey(self, message: object) -> None:
        assert isinstance(message, Order), message
        with self._saying:
            action = self._member.receive(message)
            if isinstance(action, StandStill | GetOutOfTheWay):
                # Whoever is stuck where it was has to say so again: what was said before the order counts no more.
                self._last_said = None
            if isinstance(action, StandStill):
                # Before anything is said in the new epoch: from here on the main thread cannot start an operation.
                self._lot.stop()
            elif isinstance(action, GetOutOfTheWay) and (action.advance or action.answer is not None or action.match):
                self._lot.let_go()
        match action:
            case SetOut():
                self._lot.begin()
            case StandStill(lost=lost, is_executing=is_executing):
                reason = f"epoch {message.epoch}: rank {', '.join(map(str, lost))} was lost"
                broken = self._registry.groups_with(lost)
                if is_executing:
                    # Who was to come to one of these stands still now. All are made again by the next plan.
                    broken = [*broken, *(key for key in self._rebuilding if key not in broken)]
                self._registry.sever(broken, reason, message.epoch)
                if self.copies is not None:
                    self.copies.end_transfers(message.epoch)
                for key, error in self._registry.errors().items():
                    # Whoever waits on a device for what has failed hears of nothing, and cannot stop.
                    self._registry.sever([key], error, message.epoch)
                self._registry.settle(self._pulse.beat)
                self.report()
            case SayReady():
                with self._saying:
                    self._channel.send(dialogue.Ready(self.epoch, b""))
            case GetOutOfTheWay(advance=advance, sever=sever, answer=answer, match=matches):
                for key, reason in sever.items():
                    self._registry.sever([key], reason, message.epoch)
                self._registry.settle(self._pulse.beat)
                self._lot.get_out_of_the_way(advance, answer, matches)
                self.report()
            case CarryOut(share=share):
                assert isinstance(message, core.ExecutePlan)
                self._rebuilding = share.rebuild
                self._lot.execute(message)
            case GoOn():
                self._errors_told.clear()  # what was told during the recovery may be forgotten with it
                # All have executed the plan by now: in groups that were kept, all begin to count anew at one place.
                self._registry.reset_counts()
                self._lot.resume()
            case Leave():
                self._lot.release()
            case None:
                pass
            case _:
                assert_never(action)

    def _look_again(self) -> None:
        """While stopped: say it if the main thread turned out to be stuck, or if operations completed behind its
        back."""
        stand = self._lot.stand or self._blocked()
        if stand is not None and self._report(stand) != self._last_said:
            self.report()

    def _look_for_errors(self) -> None:
        """That nobody who waits is told of."""
        for key, error in self._registry.errors().items():
            if (self.epoch, key) not in self._errors_told:
                self._errors_told.add((self.epoch, key))
                self._say_what_failed(f"{key}: {error}")

    def _blocked(self) -> Stand | None:
        if not self._lot.stopping or self._lot.executing:
            return None
        inside = self._registry.standing()
        if inside is None:
            spot = self._held_up_in()
            return None if spot is None else Stand(Standing.BLOCKED, spot)
        self._held_up = None
        spot, since = inside
        if time.monotonic() - max(since, self._lot.stopped_since) < _BLOCKED_AFTER:
            return None
        return Stand(Standing.BLOCKED, spot)

    def _held_up_in(self) -> Spot | None:
        """The operation in which the device waits for others, if the main thread waits for the device, wherever: it is
        in one call all the time."""
        spot, place = self._registry.held_up_in(), _place_of_main_thread()
        if spot is None:
            self._held_up = None
            return None
        now, held_up = time.monotonic(), self._held_up
        if held_up is None or held_up[:2] != (spot, place):
            held_up = self._held_up = (spot, place, now)
        return spot if now - max(held_up[2], self._lot.stopped_since) >= _HELD_UP_AFTER else None

    def _report(self, stand: Stand) -> Report:
        progress, copies = self._progress, self.copies
        return Report(
            rank=self._seat.rank,
            standing=stand.standing,
            step=progress.completed,
            update=progress.update,
            spot=stand.spot,
            counts=self._registry.counts(),
            own=copies.own_steps() if copies else (),
            guests=copies.guest_steps() if copies else {},
            told=self._lot.told,
        )


def _place_of_main_thread() -> object:
    """Another one after each instruction that it has carried out."""
    main = threading.main_thread().ident
    frame = None if main is None else sys._current_frames().get(main)
    return None if frame is None else (id(frame), frame.f_lasti)
