"""A simulated agent: starts, fences and watches the workers of its node, and holds what outlives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_flashrecovery.core.ids import Epoch, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.member import Member
from megatron_flashrecovery.core.messages import (
    BeginTraining,
    Command,
    Drain,
    ExecutePlan,
    Fence,
    Loss,
    Park,
    RanksStood,
    Release,
    RestartAll,
    Resume,
    SeatsDescribed,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.reports import Report
from tests.simulation.snapshot import Snapshot
from tests.simulation.worker import Worker

if TYPE_CHECKING:
    from tests.simulation.world import World


class Agent:
    def __init__(self, world: World, node: NodeId) -> None:
        self.world = world
        self.node = node
        self.is_alive = True
        self.epoch = Epoch(0)
        """The newest epoch that this agent has heard of."""
        self.started_anew_in = Epoch(-1)
        self.from_checkpoint = False
        self.workers: dict[Rank, Worker] = {}
        self.started_for: dict[Rank, Epoch] = {}
        self.vault: dict[Rank, dict[int, Snapshot]] = {}
        self.poisoned: dict[Rank, dict[Rank, dict[int, Snapshot]]] = {}
        """The mirrors that a worker kept whose memory may have been wrong."""
        self.reports: dict[OrderNumber, dict[Rank, Report]] = {}

    def start_all(self, epoch: Epoch, from_checkpoint: bool) -> None:
        """Start every seat of this node from the top, and describe them."""
        self.started_anew_in = epoch
        self.vault.clear()
        self.poisoned.clear()
        ranks = [*self.workers, *(rank for rank in self.started_for if rank not in self.workers)]
        for rank in ranks:
            self._end(rank)
        self.from_checkpoint = from_checkpoint
        for rank in ranks:
            self._start(rank, epoch, is_first=True)
        if ranks:
            self._describe(ranks)
        for rank in ranks:
            self.world.load(self.workers[rank], from_checkpoint)

    def _describe(self, ranks: list[Rank]) -> None:
        model = self.world.settings.model
        groups = {key: members for key, members in model.groups.items() if members[0] in ranks}
        peers = {rank: model.groups[self.workers[rank].keys["dp"]] for rank in ranks}
        hosts = {rank: self.world.settings.host_of[rank] for rank in ranks}
        event = SeatsDescribed(self.node, self.started_anew_in, model.sharded, hosts, peers, groups)
        self.world.tell(event)

    def _start(self, rank: Rank, epoch: Epoch, is_first: bool) -> None:
        name = self.world.next_name(rank)
        self.started_for[rank] = epoch
        member = Member(rank, max(epoch, self.epoch), is_first)
        if "epochs" in self.world.off:
            member = self.world.lawless(member)
        self.workers[rank] = Worker(self.world, self, rank, name, member)
        self.workers[rank].started_for = epoch
        self.workers[rank].guests.update(self.poisoned.pop(rank, {}))
        self.world.on_worker_started(self.workers[rank])

    def _end(self, rank: Rank) -> None:
        worker = self.workers.get(rank)
        if worker is not None and worker.is_alive:
            worker.is_alive = False
            self.world.on_worker_ended(worker)

    def lose(self, ranks: list[Rank], cause: str, fault: Fault = Fault.PROCESS_ENDED) -> None:
        """Workers end by themselves, and the agent sees it at once."""
        losses = []
        for rank in ranks:
            if (worker := self.workers[rank]).is_alive:
                self._end(rank)
                if not self.world.settings.has_vault:
                    self.vault.pop(rank, None)
                if fault is Fault.DEVICE_POISONED:
                    self._poison(worker)
                losses.append(Loss(rank, worker.name, cause, worker.started_for, fault=fault))
        if losses:
            vault = {loss.rank: self._kept(loss.rank) for loss in losses}
            self.world.tell(WorkersLost(self.node, tuple(losses), vault))

    def _poison(self, worker: Worker) -> None:
        """What it kept stays where it is, and whoever takes its seat finds it."""
        kept = {worker.rank: self.vault.get(worker.rank, {}), **worker.guests}
        for rank, slots in kept.items():
            kept[rank] = {step: snapshot.poisoned() for step, snapshot in slots.items()}
        self.vault[worker.rank] = kept.pop(worker.rank)
        self.poisoned[worker.rank] = kept

    def _kept(self, rank: Rank) -> tuple[Step, ...]:
        return tuple(Step(step) for step in sorted(self.vault.get(rank, {})))

    def report(self, report: Report, number: OrderNumber, epoch: Epoch) -> None:
        """Collect what ranks say, and pass it on together."""
        if not self.reports:
            self.world.push(self._pass_on)
        self.reports.setdefault(number, {})[report.rank] = report
        self.reported_in = epoch

    def _pass_on(self) -> None:
        reports, self.reports = self.reports, {}
        for number, said in reports.items():
            by_epoch: dict[Epoch, list[Report]] = {}
            for rank, report in said.items():
                if (worker := self.workers.get(rank)) is not None and worker.member.number == number:
                    by_epoch.setdefault(worker.member.epoch, []).append(report)
            for epoch, some in by_epoch.items():
                self.world.tell(RanksStood(self.node, epoch, number, tuple(some)))

    def obey(self, command: Command) -> None:
        if not self.is_alive:
            return
        match command:
            case StartWorkers():
                self._start_workers(command)
            case Fence():
                self._fence(command)
            case RestartAll(epoch=epoch, from_checkpoint=from_checkpoint):
                if epoch > self.started_anew_in:
                    self.epoch = max(self.epoch, epoch)
                    self.start_all(epoch, from_checkpoint)
            case Stop():
                for rank in self.workers:
                    self._end(rank)
            case BeginTraining() | Park() | Drain() | ExecutePlan() | Resume() | Release():
                self.epoch = max(self.epoch, command.epoch)
                for worker in self.workers.values():
                    self.world.send_order(worker, command)

    def _start_workers(self, command: StartWorkers) -> None:
        for rank in command.ranks:
            if self.started_for.get(rank, Epoch(-1)) >= command.epoch:
                continue
            self._end(rank)
            self.epoch = max(self.epoch, command.epoch)
            self.started_for[rank] = command.epoch
            if command.epoch == self.started_anew_in:
                self._start(rank, command.epoch, is_first=True)
                self._describe([rank])
                self.world.load(self.workers[rank], self.from_checkpoint)
            else:
                self._start_when_it_has_ended(rank, command.epoch)

    def _start_when_it_has_ended(self, rank: Rank, ordered_for: Epoch) -> None:
        """The process that sat here takes its time; orders come meanwhile."""

        def start() -> None:
            # All workers may have been started from the top since.
            if self.is_alive and self.started_for.get(rank) == ordered_for and ordered_for > self.started_anew_in:
                self._start(rank, max(ordered_for, self.epoch), is_first=False)
                self.started_for[rank] = ordered_for

        self.world.push(start)

    def _fence(self, command: Fence) -> None:
        for rank in command.ranks:
            worker = self.workers.get(rank)
            if worker is not None and worker.is_alive and worker.started_for < command.epoch:
                self.lose([rank], "fenced")
            if command.fault is Fault.NODE_LOST:
                self.started_for.pop(rank, None)

    def name(self, rank: Rank) -> WorkerId:
        return self.workers[rank].name
