"""One agent per node: starts the workers of its seats, watches them, and passes orders down and reports up.

It decides nothing. What a worker says becomes an event for the controller, and what the controller orders becomes a
message to a worker, a new process, or the end of one. One thread does it all; the control stream only feeds its queue.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from megatron_flashrecovery.comm.channel import ChannelClosed
from megatron_flashrecovery.comm.codec import UnknownMessage
from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Epoch, NodeId, OrderNumber, Rank
from megatron_flashrecovery.core.pace import Pace
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.out_of_memory import OutOfMemory
from megatron_flashrecovery.runtime import dialogue, node_messages
from megatron_flashrecovery.runtime.departures import Departures
from megatron_flashrecovery.runtime.device_watch import DeviceWatch
from megatron_flashrecovery.runtime.farewell import Farewell, Sender
from megatron_flashrecovery.runtime.injections import Injections
from megatron_flashrecovery.runtime.inquest import Inquest
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_seats import NodeSeats
from megatron_flashrecovery.runtime.relay import merged, narrowed, of_numbers
from megatron_flashrecovery.runtime.saying import say
from megatron_flashrecovery.runtime.seating import grant, seats_described
from megatron_flashrecovery.runtime.succession import Succession
from megatron_flashrecovery.runtime.vigil import Vigil
from megatron_flashrecovery.runtime.watch import Watch
from megatron_flashrecovery.runtime.workers import CONFIG_EXIT, Worker, WorkerEnded, Workers
from megatron_flashrecovery.state.vault import Vault

_TICK = 0.05


class Agent:
    def __init__(self, config: LaunchConfig, node: NodeId, workers: Workers, control: Sender, vault: Vault) -> None:
        self._config = config
        self._node = node
        self._workers = workers
        self._control = control
        self._vault = vault
        self._vigil = Vigil(config)
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._seats = NodeSeats(config)
        first = config.first_seats(config.node_rank)
        self._epoch = Epoch(0)
        self._number = OrderNumber(0)
        self._spares: list[Worker] = []
        self._succession = Succession(lambda: workers.living, config.deadlines.join_timeout / 4)
        self._watch = Watch(node, Pace(unknown=config.deadlines.hang_timeout))
        self._devices = DeviceWatch(node, first, control)
        self._inquest = Inquest(self._watch, OutOfMemory(), self._devices)
        self.injections = Injections(config.injections, first)
        self._departures = Departures(first)
        self._farewell = Farewell(node, config.shutdown_timeout, workers, control, self._departures)
        self._dismissal: node_messages.Dismiss | None = None

    def hear(self, message: object) -> None:
        """Called by the control stream, on its thread."""
        self._inbox.put(message)
        with suppress(BlockingIOError):  # it is awake already
            os.write(self._wake_write, b"x")

    def run(self, on_tick: Callable[[], None]) -> node_messages.Dismiss:
        """Until the controller dismisses this node."""
        config = self._config
        first = config.first_seats(config.node_rank)
        room = config.nproc_per_node if config.is_spare else 0
        self._control.send(node_messages.NodeAttached(self._node, first, room))
        patience = time.monotonic() + self._config.deadlines.join_timeout
        while self._dismissal is None:
            if not self._seats.store[0] and time.monotonic() > patience:
                raise ConfigError(f"{_who_has_not_come(config)} within --join-timeout: start the others, too")
            self._wait()
            self._obey()
            self._notice_deaths()
            self._fill_seats()
            self._listen()
            self._look_for_hangs()
            self._keep_spares()
            self._tell_started()
            on_tick()
            self._dismissal = self._dismissal or self._vigil.look()
            if (late := self._farewell.out_of_patience()) is not None:
                return late
        if self._dismissal.at_once:
            self._workers.close(0.0)
        return self._dismissal

    def close(self) -> None:
        self._devices.close()

    # --- orders from the controller -----------------------------------------------------------------------------------

    def _obey(self) -> None:
        while True:
            try:
                order = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._obey_one(order)

    def _obey_one(self, order: object) -> None:
        self._watch.heed(order)
        match order:
            case node_messages.NodeWelcome():
                self._begin(order)
            case core.StartWorkers(epoch=epoch, ranks=ranks):
                self._end_seated(ranks)
                self._seats.add(ranks)
                self._hold_seats()
                self._start(max(epoch, self._epoch), ranks, joining=epoch > self._seats.begun_in)
            case core.RestartAll():
                self._restart(order)
            case core.BeginTraining():
                self._to_all(order)
            case core.Park(epoch=epoch, number=number):
                self._epoch, self._number = epoch, number
                self._to_all(order)
            case core.Resume(epoch=epoch, number=number):
                self._epoch, self._number = epoch, number
                self._to_all(order)
            case core.Release(number=number):
                self._number, self._departures.released = number, True
                self._to_all(order)
            case core.Drain(number=number):
                self._number = number
                for rank, worker in self._workers.seated():
                    self._say(worker, narrowed(order, rank))
            case core.ExecutePlan(number=number, shares=shares):
                self._number = number
                for rank, worker in self._workers.seated():
                    self._say(worker, replace(order, shares=tuple(s for s in shares if s.rank == rank)))
            case core.Fence():
                self._fence(order)
            case node_messages.Inject():
                self._inject(order)
            case signal.Signals():
                self._dismissal = self._farewell.pass_on(order, bool(self._succession)) or self._dismissal
            case node_messages.Dismiss():
                self._dismissal = order
            case _:
                raise AssertionError(f"the controller ordered {order}")

    def _inject(self, request: node_messages.Inject) -> None:
        accepted = self.injections.accept(request.spec)
        refusal = accepted if isinstance(accepted, str) else ""
        self._control.send(node_messages.InjectionAnswered(request.name, refusal))
        for rank, worker in self._workers.seated():
            if not isinstance(accepted, str) and rank == accepted[0]:
                self._say(worker, accepted[1])

    def _begin(self, welcome: node_messages.NodeWelcome) -> None:
        self._seats.store = (welcome.store_host, welcome.store_port)
        if not welcome.ranks:
            say("this is a spare node: it waits until another one is lost")
        elif welcome.epoch > self._seats.begun_in:  # else told twice: these seats are taken
            self._seats.begun_in = welcome.epoch
            self._seats.add(welcome.ranks)
            self._hold_seats()
            self._start(welcome.epoch, welcome.ranks, joining=False)

    def _hold_seats(self) -> None:
        self._departures.ranks = frozenset(self._seats.ranks)
        self._devices.ranks = self._seats.ranks

    def _fence(self, order: core.Fence) -> None:
        """Its end is told as a loss, for what it left in the vault counts."""
        seated = [worker for rank, worker in self._workers.seated() if rank in order.ranks]
        fenced = [worker for worker in seated if worker.seat and worker.seat.epoch < order.epoch]
        self._watch.ask_for_stacks(fenced)
        self._inquest.note_fenced(fenced, order.reason, order.fault)
        for worker in fenced:
            self._workers.kill(worker)
        if order.fault is Fault.NODE_LOST:
            self._seats.give_up(order.ranks)
            self._succession.drop(order.ranks)
            self._hold_seats()
            say(f"{order.reason}; no worker sits here any more")

    def _end_seated(self, ranks: tuple[Rank, ...]) -> None:
        for rank, worker in list(self._workers.seated()):
            if rank in ranks:
                self._workers.kill(worker)

    def _restart(self, order: core.RestartAll) -> None:
        if order.epoch <= self._seats.begun_in:
            return
        self._seats.begin_anew(order)
        self._end_seated(self._seats.ranks)
        self._vault.close()
        self._departures.begin_anew()
        self._watch.go_on()
        self._start(order.epoch, self._seats.ranks, joining=False)

    def _start(self, epoch: Epoch, ranks: tuple[Rank, ...], *, joining: bool) -> None:
        self._epoch = epoch
        self._succession.enter(ranks, joining=joining)
        self._fill_seats()

    def _fill_seats(self) -> None:
        for rank, joining in self._succession.due():
            worker = self._spares.pop(0) if self._spares else self._workers.start(f"rank{rank}.log")
            worker.seat = self._seats.seat(rank, self._epoch, joining, self.injections.orders(rank))
            self._say(worker, worker.seat, self._watch.take(worker.id))
            # A replacement learns from the others that they leave; whoever starts with all others has to be told.
            if self._departures.passed_on is not None and not joining:
                self._workers.tell(worker, self._departures.passed_on)

    def _to_all(self, order: object) -> None:
        for _rank, worker in self._workers.seated():
            self._say(worker, order)

    def _say(self, worker: Worker, message: object, fds: tuple[int, ...] = ()) -> None:
        with suppress(ChannelClosed):  # its end is about to be noticed, and that is what counts
            worker.channel.send(message, fds)

    # --- what workers say ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        told: list[core.Event | object] = []
        for worker in self._workers.living:
            try:
                if select.select([worker.channel], [], [], 0)[0]:
                    worker.channel.fill()
            except ChannelClosed:
                continue  # dead or dying: the process table says when and how
            try:
                while (heard := worker.channel.next_message()) is not None:
                    if not worker.doomed:
                        self._hear_worker(worker, heard[0], told)
            except UnknownMessage as error:
                print(f"flashrecovery: {worker.id} is ended, because it said nonsense: {error}", flush=True)
                if worker.pid is not None:
                    os.kill(worker.pid, 9)
        for message in merged(told):
            self._control.send(message)

    def _hear_worker(self, worker: Worker, message: object, told: list[object]) -> None:
        rank = worker.rank
        assert rank is not None, message
        match message:
            case dialogue.MemoryNeeded(own_nbytes=own, guests=guests):
                self._say(worker, *grant(self._vault, rank, own, guests))
            case dialogue.Described():
                self._seats.described[rank] = message
                self.injections.note_under_recovery(rank)
                self._devices.note_device(rank, message.device)
                told.append(node_messages.BillNoted(rank, message.host, message.unique_nbytes, message.warning))
                if self._seats.are_described() and worker.seat is not None and not worker.seat.joining:
                    told.append(seats_described(self._node, self._epoch, self._seats.described))
            case dialogue.Ready(epoch=epoch, startup=startup):
                self._seats.note_ready(rank, startup)
                told.append(core.RanksReady(self._node, epoch, (rank,)))
            case dialogue.Stood(epoch=epoch, number=number, report=report):
                told.append(core.RanksStood(self._node, epoch, number, (report,)))
            case dialogue.Executed(epoch=epoch, seconds=seconds):
                told.append(node_messages.ExecutionNoted(rank, epoch, seconds, time.time()))
                told.append(core.PlanExecuted(self._node, epoch, (rank,)))
            case dialogue.Failed(epoch=epoch, reason=reason, fault=fault):
                told.append(core.PlanFailed(self._node, epoch, rank, worker.id, reason, fault))
            case dialogue.Finished(epoch=epoch, steps=steps, state_sha256=sha256):
                told.append(node_messages.FinalNoted(rank, steps, sha256))
                told.append(core.RanksFinished(self._node, epoch, (rank,)))
            case dialogue.StepDone():
                told.append(node_messages.StepNoted(message))
            case dialogue.Resumed(epoch=epoch, step=step):
                told.append(node_messages.FirstStepNoted(rank, epoch, step, time.time()))
            case dialogue.CheckpointDone(step=step):
                told.append(core.CheckpointWritten(step))
            case dialogue.Reported(name=name, step=step):
                self._seats.note_reported(rank, name, step)
            case dialogue.UpdateRefused() | dialogue.Examined() | dialogue.GuestDiffers():
                told.append(of_numbers(self._node, rank, message))
            case dialogue.Raised():
                self._watch.note_raised(worker.id, message)
            case dialogue.OperationFailed(epoch=epoch, step=step, reason=reason):
                told.append(core.OperationsFailed(self._node, epoch, {rank: reason}, step))
            case dialogue.InjectionFired():
                noted, is_its_end = self.injections.note_fired(message)
                if is_its_end:
                    self._inquest.note_announced(worker.id, message.time)
                told += noted
            case _:
                raise AssertionError(f"{worker.id} said {message}")

    # --- processes ----------------------------------------------------------------------------------------------------

    def _look_at_devices(self, ended: Sequence[WorkerEnded]) -> None:
        """Whoever computes on one that has failed is ended before anybody recovers, and is lost with the evidence."""
        seated = [worker for _, worker in self._workers.seated()]
        for worker, evidence in self._devices.look(seated, [end.worker for end in ended]):
            self._inquest.note_fenced([worker], evidence, Fault.DEVICE_ERROR)
            self._workers.kill(worker)
        self._report_losses(self._devices.stuck())

    def _notice_deaths(self) -> None:
        ended = self._workers.poll()
        self._look_at_devices(ended)
        told: list[object] = []
        for end in ended:
            self._hear_last_words(end.worker, told)
            end.worker.channel.close()
            self._spares = [spare for spare in self._spares if spare is not end.worker]
        for message in merged(told):
            self._control.send(message)
        self._report_losses([end for end in ended if self._is_loss(end)] + self._departures.stayed_alone())
        seated = {worker.id for worker in self._workers.living if worker.seat is not None}
        self._watch.keep_only(seated)
        self._devices.forget_all_but(seated)
        if (result := self._departures.result()) is not None:
            self._control.send(node_messages.NodeDone(self._node, self._epoch, result))

    def _hear_last_words(self, worker: Worker, told: list[object]) -> None:
        """What it still said before it died counts, and comes before its death."""
        with suppress(ChannelClosed):
            while select.select([worker.channel.fileno()], [], [], 0)[0]:
                worker.channel.fill()
        while (heard := worker.channel.next_message()) is not None:
            if not worker.doomed:
                self._hear_worker(worker, heard[0], told)

    def _is_loss(self, end: WorkerEnded) -> bool:
        worker = end.worker
        if worker.seat is None or (worker.doomed and not self._inquest.was_fenced(worker.id)):
            return False
        if self._refuses_to_start(end):
            return False
        return self._departures.is_loss(end, self._seats.takes_part(worker.seat))

    def _report_losses(self, ended: list[WorkerEnded]) -> None:
        losses = tuple(self._loss(end) for end in ended)
        if losses:
            vault = {loss.rank: self._vault.committed(loss.rank) for loss in losses}
            self._control.send(core.WorkersLost(self._node, losses, vault))

    def _loss(self, end: WorkerEnded) -> core.Loss:
        found = self._inquest.hold(end)
        for note in found.notes:
            self._control.send(note)
        if found.loss.fault is Fault.DEVICE_POISONED:
            self._vault.forget(found.loss.rank)
        return found.loss

    def _look_for_hangs(self) -> None:
        for told in self._watch.look(self._epoch, self._workers.seated()):
            self._control.send(told)

    def _refuses_to_start(self, end: WorkerEnded) -> bool:
        assert end.worker.seat is not None
        if end.exit_code != CONFIG_EXIT or self._seats.has_started(end.worker.seat):
            return False
        self._control.send(node_messages.StartRefused(self._node, end.last_words().removeprefix("flashrecovery: ")))
        return True

    def _keep_spares(self) -> None:
        """Spares are started once the seats are taken, so that they do not slow the start down."""
        if not self._seats.are_ready() or self._departures.released or self._departures.passed_on:
            return
        while len(self._spares) < self._config.spares_per_node:
            self._spares.append(self._workers.start("spares.log"))

    def _tell_started(self) -> None:
        for rank, worker in self._workers.seated():
            if worker.pid is not None and worker.seat is not None and not worker.is_known:
                worker.is_known = True
                self._control.send(node_messages.WorkerStarted(rank, worker.id, worker.pid, worker.seat.epoch))

    def _wait(self) -> None:
        waits = [self._wake_read, *(worker.channel.fileno() for worker in self._workers.living)]
        if (server := self._workers.server_fileno()) is not None:
            waits.append(server)
        select.select(waits, [], [], _TICK)
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)


def _who_has_not_come(config: LaunchConfig) -> str:
    if config.is_spare:
        return f"node 0 was not to be reached at {config.master_addr}:{config.master_port}"
    return f"not all of the {config.nnodes} nodes have come"
