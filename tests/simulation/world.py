"""A whole job in one thread: whatever can happen next waits in one bag, and one seeded die picks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from random import Random

from megatron_flashrecovery.core.coordinator import Job, handle
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.member import Member, Order
from megatron_flashrecovery.core.messages import (
    CheckpointWritten,
    ClockTicked,
    Command,
    Drain,
    Event,
    ExecutePlan,
    Fence,
    NodeJoined,
    NodeLost,
    RestartAll,
    Resume,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Draining, Executing, Finished, Halted, Staffing
from tests.simulation.agent import Agent
from tests.simulation.bad_luck import BadLuck
from tests.simulation.fabric import Communicator, mix
from tests.simulation.lawless import LawlessMember, care_for_no_update, trust_blindly, without_epochs
from tests.simulation.monitor import Monitor
from tests.simulation.program import initial, undisturbed
from tests.simulation.settings import Settings
from tests.simulation.snapshot import Snapshot
from tests.simulation.worker import Worker

Happening = Callable[[], None]
TICK = 0.001
LATE = 0.02
TWICE = 0.03


class World:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.off = settings.off
        self.rng = Random(f"storm {settings.seed}")
        self.now = 0.0
        self.events = 0
        self.turns = 0
        self.bag: list[Happening] = []
        self.late: list[Happening] = []
        self.frozen: dict[WorkerId, list[Happening]] = {}
        self.names: Counter[Rank] = Counter()
        self.comms: dict[tuple[GroupKey, Epoch], Communicator] = {}
        self.unborn: dict[Rank, list[tuple[Rank, Snapshot, Epoch]]] = {}
        self.checkpoints: dict[int, dict[Rank, tuple[tuple[int, int, int], int]]] = {}
        self.checkpoint: int | None = None
        self.monitor = Monitor(self)
        self.job = Job.start(settings.config, settings.seats, settings.model.sharded)
        self.agents = {node: Agent(self, node) for node in settings.seats}
        self.luck = BadLuck(self)
        self.seen: Counter[str] = Counter()
        for rank in settings.host_of if settings.are_suspected else ():
            self.job.suspect(rank)
        for node, ranks in settings.seats.items():
            self.agents[node].workers = dict.fromkeys(ranks)  # type: ignore[assignment]
            self.agents[node].start_all(Epoch(0), from_checkpoint=False)

    # --- the die -----------------------------------------------------------------------------------------------------

    def pick(self, number: int) -> int:
        return int(self.rng.random() * number)

    def push(self, happening: Happening) -> None:
        self.bag.append(happening)

    def run(self, limit: int) -> None:
        """Until the job has ended and nothing is under way any more, or ``limit`` events have passed."""
        while self.events < limit:
            if isinstance(self.job.phase, Halted | Finished) and self._is_over():
                return
            if not self.bag:
                self._idle()
                continue
            self.events += 1
            self.now += TICK
            index = self.pick(len(self.bag))
            happening, self.bag[index] = self.bag[index], self.bag[-1]
            self.bag.pop()
            happening()
            if self.late and self.events % 64 == 0:
                self.bag.append(self.late.pop(self.pick(len(self.late))))
            if self.events % 100 == 0:
                self.hear(ClockTicked())
            self.luck.consider()
        self.monitor.blame(f"not over after {limit} events, in {type(self.job.phase).__name__}")

    def _is_over(self) -> bool:
        if isinstance(self.job.phase, Halted):
            return True
        return not any(worker.is_alive and not worker.is_hung for worker in self.living())

    def _idle(self) -> None:
        """Nothing is under way: late messages arrive, time passes, or somebody notices a hang."""
        if self.late:
            self.bag, self.late = self.late, []
            return
        if self.luck.pass_time():
            return
        deadline = self.job.next_deadline
        if deadline is None:
            self.monitor.blame(f"nothing can happen any more, in {type(self.job.phase).__name__}")
            return
        self.events += 1
        self.now = max(self.now + TICK, deadline)
        self.hear(ClockTicked())

    # --- messages ----------------------------------------------------------------------------------------------------

    def post(self, happening: Happening) -> None:
        """On its way: in any order, sometimes late, sometimes twice."""
        chance = self.rng.random()
        (self.late if chance < LATE else self.bag).append(happening)
        if chance > 1 - TWICE:
            self.late.append(happening)

    def tell(self, event: Event) -> None:
        self.post(lambda: self.hear(event))

    def hear(self, event: Event) -> None:
        """The controller hears of an event, and sends what follows from it."""
        before, lost = self.job.phase, set(self.job.lost)
        if "epochs" in self.off:
            event = without_epochs(event, self.job)
        commands = handle(self.job, event, self.now)
        if "poison" in self.off:
            self.job.poisoned.clear()
        if "counts" in self.off:
            trust_blindly(self.job)
        if "before" in self.off:
            care_for_no_update(self.job)
        after = self.job.phase
        for command in commands:
            self._send(command)
            if isinstance(command, Stop | RestartAll) and command.reason.startswith("no copy"):
                self.monitor.on_given_up(command.reason, lost | _vacated(event, self.settings))
        if isinstance(after, Executing) and after is not before:
            held = before if isinstance(before, Staffing | Draining) else None
            assert held is not None
            self.monitor.on_planned(self.job, held.census.reports, self.job.vault)
        if any(isinstance(command, Resume) for command in commands):
            self.monitor.on_resume(self.job)
        if isinstance(after, Halted) and after is not before:
            self.monitor.on_halted(self.job, before, after.reason)
        if isinstance(after, Finished) and after is not before:
            self.monitor.on_all_finished()
        if after is not before:
            self.luck.on_phase(type(after).__name__)

    def _send(self, command: Command) -> None:
        self._cover(command)
        agents = list(self.agents.values())
        if isinstance(command, StartWorkers | Fence | ExecutePlan) or hasattr(command, "node"):
            agents = [agent for agent in agents if agent.node == command.node]  # type: ignore[union-attr]
        for agent in agents:
            self.post(lambda agent=agent: agent.obey(command))  # type: ignore[misc]

    def _cover(self, command: Command) -> None:
        """Count what the run has exercised."""
        self.seen[type(command).__name__] += 1
        match command:
            case Drain(advance=advance, sever=sever, answer=answer, match=match):
                self.seen["matched"] += len(match)
                self.seen["advanced"] += len(advance)
                self.seen["severed"] += len(sever)
                self.seen["answered"] += len(answer)
            case ExecutePlan(shares=shares):
                for share in shares:
                    self.seen[f"from {share.source.value}"] += 1
            case Resume():
                recovery = self.job.recoveries[-1]
                self.seen["kept"] += recovery.kept
                self.seen["rebuilt"] += len(recovery.rebuilt)
                for reason in recovery.rebuilt.values():
                    self.seen["because " + re.sub(r"\d+", "N", reason)[:60]] += 1
            case Stop(reason=reason) | Fence(reason=reason) | RestartAll(reason=reason):
                self.seen[type(command).__name__ + ": " + re.sub(r"\d+(, N)*", "N", reason)[:70]] += 1
            case _:
                pass

    def send_order(self, worker: Worker, order: Order) -> None:
        self.post(lambda: worker.receive(order))

    # --- workers -----------------------------------------------------------------------------------------------------

    def next_name(self, rank: Rank) -> WorkerId:
        self.names[rank] += 1
        return WorkerId(f"{rank}.{self.names[rank]}")

    def living(self) -> list[Worker]:
        return [
            worker
            for agent in self.agents.values()
            if agent.is_alive
            for worker in agent.workers.values()
            if worker is not None and worker.is_alive
        ]

    def worker_on(self, rank: Rank) -> Worker | None:
        for agent in self.agents.values():
            worker = agent.workers.get(rank)
            if agent.is_alive and worker is not None and worker.is_alive:
                return worker
        return None

    def on_worker_started(self, worker: Worker) -> None:
        for guest, snapshot, epoch in self.unborn.pop(worker.rank, []):
            self.deliver_mirror(guest, worker.rank, snapshot, epoch)

    def on_worker_ended(self, worker: Worker) -> None:
        # Whoever mirrors to a seat whose worker is replaced connects again and sends again.
        for guest, snapshot, epoch in worker.early:
            self.unborn.setdefault(worker.rank, []).append((guest, snapshot, epoch))
        for happening in self.frozen.pop(worker.name, []):
            self.push(happening)
        for end in worker.ends.values():
            end.broken = end.broken or "ended"
            self.forsake(end.comm, worker.rank)

    def load(self, worker: Worker, from_checkpoint: bool) -> None:
        """The state that a start from the top begins with."""
        model = self.settings.model
        step = self.checkpoint if from_checkpoint else 0
        if step is None:
            self.monitor.blame("told to start from a checkpoint that there is not")
            return
        if step:
            (_, master, values), timeline = self.checkpoints[step][worker.rank]
            masters = [self.checkpoints[step][rank][0][1] for rank in model.groups[worker.keys["dp"]]]
            worker.start_from(step, (mix(*masters) if model.sharded else mix(master), master, values), timeline)
        else:
            worker.start_from(0, initial(model, worker.rank), 0)

    def defer(self, worker: Worker, happening: Happening) -> bool:
        """A hung worker does nothing until it is woken."""
        if worker.is_hung:
            self.frozen.setdefault(worker.name, []).append(happening)
        return worker.is_hung

    def thaw(self, worker: Worker) -> None:
        worker.is_hung = False
        for happening in self.frozen.pop(worker.name, []):
            self.push(happening)

    def lawless(self, member: Member) -> Member:
        return LawlessMember(member)

    def on_mark(self, worker: Worker, update: str) -> None:
        self.luck.on_phase(update.upper(), worker)

    def save(self, worker: Worker) -> None:
        """The framework's own checkpoint, complete when every rank has written its part."""
        every = self.settings.checkpoint_every
        if not every or worker.step % every or worker.step == self.settings.model.steps:
            return
        parts = self.checkpoints.setdefault(worker.step, {})
        parts[worker.rank] = ((worker.params, worker.master, worker.values), worker.timeline)
        if len(parts) == self.settings.model.size and (self.checkpoint is None or worker.step > self.checkpoint):
            self.checkpoint = worker.step
            self.tell(CheckpointWritten(Step(worker.step)))

    # --- communicators and mirrors -----------------------------------------------------------------------------------

    def communicator(self, key: GroupKey, epoch: Epoch) -> Communicator:
        if (key, epoch) not in self.comms:
            members = self.settings.model.groups[key]
            self.comms[key, epoch] = Communicator(key, members, epoch, self.settings.is_eager, self.settings.forms_kept)
        return self.comms[key, epoch]

    def ripen(self, comm: Communicator) -> None:
        for end in comm.endpoints.values():
            if any(comm.ripe(one) for one in end.open):
                worker = self.worker_on(end.rank)
                if worker is not None and worker.ends.get(comm.key) is end:
                    self.push(worker.progress)

    def forsake(self, comm: Communicator, rank: Rank) -> None:
        failed = comm.forsake(rank, self.rng, self.settings.notice)
        for one in failed:
            if one in one.endpoint.open:
                one.endpoint.open.remove(one)
            worker = self.worker_on(one.endpoint.rank)
            if worker is not None and worker.ends.get(comm.key) is one.endpoint:
                worker.on_failed(one)

    def on_connected(self, comm: Communicator) -> None:
        if comm.is_connected():
            for rank in comm.members:
                if (worker := self.worker_on(rank)) is not None:
                    self.push(worker.check_news)

    def mirror(self, owner: Worker, snapshot: Snapshot) -> None:
        epoch, host = owner.data_epoch, self.settings.host_of[owner.rank]
        is_late = self.rng.random() < self.settings.late_mirrors
        (self.late if is_late else self.bag).append(lambda: self.deliver_mirror(owner.rank, host, snapshot, epoch))

    def deliver_mirror(self, guest: Rank, host: Rank, snapshot: Snapshot, epoch: Epoch) -> None:
        worker = self.worker_on(host)
        if worker is None:
            if epoch == self.job.base:
                self.unborn.setdefault(host, []).append((guest, snapshot, epoch))
            return
        if self.defer(worker, lambda: self.deliver_mirror(guest, host, snapshot, epoch)):
            return
        if worker.host_mirror(guest, snapshot, epoch):
            self.post(lambda: self._acknowledge(guest, snapshot.step, epoch))

    def _acknowledge(self, guest: Rank, step: int, epoch: Epoch) -> None:
        owner = self.worker_on(guest)
        if owner is None or self.defer(owner, lambda: self._acknowledge(guest, step, epoch)):
            return
        if epoch == owner.data_epoch:
            self.monitor.on_acknowledged(guest, step)
        owner.on_acked(step, epoch)

    def transfer(self, giver: Worker, rank: Rank, what: str, content: object) -> None:
        epoch = giver.member.epoch

        def arrive() -> None:
            worker = self.worker_on(rank)
            if worker is not None and not self.defer(worker, arrive):
                worker.news[epoch, what] = content
                worker.check_news()

        self.post(arrive)

    @property
    def total_turns(self) -> int:
        return undisturbed(self.settings.model).turns

    def node_of(self, worker: Worker) -> NodeId:
        return worker.agent.node

    def add_spare(self, index: int) -> None:
        node = NodeId(f"spare{index}")
        self.agents[node] = Agent(self, node)
        self.agents[node].epoch = Epoch(0)
        room = max(len(ranks) for ranks in self.settings.seats.values())
        self.tell(NodeJoined(node, room))


def _vacated(event: Event, settings: Settings) -> set[Rank]:
    match event:
        case WorkersLost(losses=losses):
            return {loss.rank for loss in losses}
        case NodeLost(node=node):
            return set(settings.seats.get(node, ()))
        case _:
            return set()
