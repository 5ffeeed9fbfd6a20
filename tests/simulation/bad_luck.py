"""When what goes wrong in a simulated run: the faults of its settings, and spares that come late or never."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_flashrecovery.core import policy
from megatron_flashrecovery.core.findings import Finding, NumbersBad, NumbersSound, PeersDiffered
from megatron_flashrecovery.core.hangs import few
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.messages import Blamed, Diagnosed, NodeLost, OperationsFailed, RanksHung, StepsTimed
from megatron_flashrecovery.core.phases import Draining, Training
from megatron_flashrecovery.core.policy import NanChoice
from tests.simulation.settings import Fault

if TYPE_CHECKING:
    from tests.simulation.fabric import Handle
    from tests.simulation.main_thread import MainThread
    from tests.simulation.worker import Worker
    from tests.simulation.world import World


RESET = "connection reset"


class BadLuck:
    def __init__(self, world: World) -> None:
        self.world = world
        self.armed = list(world.settings.faults)
        self.due: list[tuple[int, Fault]] = []
        self.has_corrupted = False
        self.spares = world.settings.spares
        self.spare_at: float | None = None
        self.cut: set[Rank] = set()
        """Whose connections went while everybody lived."""
        self.paused: list[tuple[int, Worker]] = []
        self.looks_at: int | None = None
        self.seen: object = None

    def consider(self) -> None:
        """Whatever is due happens now."""
        world = self.world
        if self.armed:
            share = world.turns / world.total_turns
            for fault in [fault for fault in self.armed if fault.when == "turn" and fault.share <= share]:
                self._trigger(fault)
        if self.due:
            for entry in [entry for entry in self.due if entry[0] <= world.events]:
                self.due.remove(entry)
                self._strike(entry[1])
        if self.paused:
            for entry in [entry for entry in self.paused if entry[0] <= world.events]:
                self.paused.remove(entry)
                if entry[1].is_alive:
                    world.thaw(entry[1])
        if self.looks_at is not None and self.looks_at <= world.events:
            self.looks_at = None
            self._tell_who_does_not_stop()
        if self.spare_at is not None and world.now >= self.spare_at:
            self._add_spare()

    def on_phase(self, phase: str, worker: Worker | None = None) -> None:
        """A phase begins: faults that wait for it may strike, one at a time."""
        if phase == "Draining" and self.world.settings.watches:
            self.looks_at = self.world.events + self.world.events % 97
        for fault in self.armed:
            if fault.when == phase:
                self._trigger(fault)
                return

    def on_step(self, worker: Worker) -> None:
        """Its agent tells how long it took: any number of seconds, for nothing may follow from it."""
        if self.world.settings.watches:
            seconds = float(worker.step * 7919 % (worker.rank + 2))
            epoch, step = worker.member.epoch, Step(worker.step)
            told = StepsTimed(worker.agent.node, epoch, step, {worker.rank: seconds}, {worker.rank: 0.0})
            self.world.tell(told)

    def _trigger(self, fault: Fault) -> None:
        self.armed.remove(fault)
        self.due.append((self.world.events + fault.delay, fault))

    def pass_time(self) -> bool:
        """Nothing else can happen: bring on what would happen later. False if there is nothing."""
        if self.due:
            self.due.sort(key=lambda entry: entry[0])
            self._strike(self.due.pop(0)[1])
            return True
        if self.paused:
            _, worker = self.paused.pop(0)
            if worker.is_alive:
                self.world.thaw(worker)
            return True
        if self._tell_who_does_not_stop():
            return True
        deadline = self.world.job.next_deadline
        if self.spare_at is not None and (deadline is None or self.spare_at <= deadline):
            self.world.now = max(self.world.now, self.spare_at)
            self._add_spare()
            return True
        is_training = isinstance(self.world.job.phase, Training)
        if deadline is None or (is_training and deadline <= self.world.now):
            # A hang without a loss: the agents see who does not move, and that the others wait.
            return self._tell_of_hangs()
        return False

    def _tell_of_hangs(self) -> bool:
        hung = {worker.rank for worker in self.world.living() if worker.is_hung}
        if not hung:
            return False
        if not isinstance(self.world.job.phase, Training) or len(hung) > few(len(hung)):
            # Before the first step nobody has a limit, and of many nobody knows who is to blame: all others wait.
            for worker in self.world.living():
                if worker.is_hung:
                    worker.agent.lose([worker.rank], "hangs")
                    return True
        self._tell_who_waits(frozenset(hung))
        return True

    def _tell_who_does_not_stop(self) -> bool:
        """What the agents see at this moment of a stop; false if it is what they saw the last time."""
        world = self.world
        if not world.settings.watches or not isinstance(world.job.phase, Draining):
            return False
        paused = {worker.name for _, worker in self.paused}
        hangs = {worker.name for worker in world.living() if worker.is_hung} - paused
        seen = (world.job.epoch, frozenset(paused), frozenset(hangs))
        if seen == self.seen:
            return False
        self.seen = seen
        for agent in world.agents.values():
            mine = [worker for worker in world.living() if worker.agent is agent]
            hung = {worker.rank: "it hangs" for worker in mine if worker.name in hangs}
            busy = tuple(worker.rank for worker in mine if worker.name in paused)
            if agent.is_alive and mine:
                world.tell(RanksHung(agent.node, world.job.epoch, hung, {}, Step(0), tuple(hung), busy=busy))
        return True

    def _tell_who_waits(self, hung: frozenset[Rank]) -> None:
        world = self.world
        for agent in world.agents.values():
            ranks = [worker.rank for worker in world.living() if worker.agent is agent]
            waiting = {rank: "an operation" for rank in ranks if rank not in hung}
            step = Step(max((worker.step for worker in world.living()), default=0))
            told = RanksHung(agent.node, world.job.epoch, {r: "it hangs" for r in ranks if r in hung}, waiting, step)
            if agent.is_alive and ranks:
                world.tell(told)

    def _add_spare(self) -> None:
        self.spare_at = None
        self.spares -= 1
        self.world.add_spare(self.spares)

    # --- striking ----------------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        victims = self._victims(fault.victims)
        if not victims:
            return
        match fault.kind:
            case "kill":
                by_node: dict[str, list[Worker]] = {}
                for victim in victims:
                    by_node.setdefault(victim.agent.node, []).append(victim)
                for group in by_node.values():
                    group[0].agent.lose([victim.rank for victim in group], "killed by SIGKILL")
            case "hang":
                victims[0].is_hung = True
            case "pause":
                victims[0].is_hung = True
                self.paused.append((self.world.events + 50 + self.world.pick(1500), victims[0]))
            case "corrupt":
                self._corrupt(victims[0])
            case "poison":
                victims[0].agent.lose([victims[0].rank], "uncorrectable memory error", policy.Fault.DEVICE_POISONED)
            case "node":
                self._lose_node(victims[0])
            case "alarm":
                self._tell_who_waits(frozenset())
            case "cut":
                self._cut(victims[0])
            case "numbers":
                self._tell_of_numbers(victims)
            case "diagnosis":
                nodes = tuple(sorted({victim.agent.node for victim in victims}))
                self.world.tell(Diagnosed("an occasion", (Blamed("host", 0.001, "it is slow", nodes),), ""))
            case "differ":
                self._tell_who_differs(victims[0])

    def _cut(self, victim: Worker) -> None:
        """A connection goes: one after the other, the members of its communicator find that out, and sever it."""
        keys = [key for key, end in sorted(victim.ends.items()) if end.broken is None and len(end.comm.members) > 1]
        if not keys or victim.is_hung:
            return
        key = keys[self.world.pick(len(keys))]
        comm = victim.ends[key].comm
        self.cut.update(comm.members)

        def lose(rank: Rank) -> None:
            worker = self.world.worker_on(rank)
            if worker is None or key not in worker.ends or worker.ends[key].comm is not comm:
                return
            has_aborted = worker.has_abort_begun or bool(worker.ends[key].open)
            worker.cut(key, RESET)
            if worker.lose_connection(comm, RESET):
                return
            worker.has_abort_begun = has_aborted  # what was not under way is found out by the next operation
            if has_aborted:
                self._tell_what_failed(worker, f"an operation of {key} failed: {RESET}")

        for rank in comm.members:
            self.world.push(lambda rank=rank: lose(rank))  # type: ignore[misc]

    def on_operation_failed(self, worker: MainThread, handle: Handle) -> None:
        """It says so; left out where no connection was cut, for there a loss explains it sooner or later."""
        if self.cut:
            self._tell_what_failed(worker, f"{handle.operation} failed: {handle.failed}")

    def _tell_what_failed(self, worker: MainThread, what: str) -> None:
        if not worker.is_stopping:
            epoch = worker.member.epoch
            self.world.tell(OperationsFailed(worker.agent.node, epoch, {worker.rank: what}, Step(worker.step)))

    def _tell_of_numbers(self, victims: list[Worker]) -> None:
        """These say that their numbers are bad, and one that they were not; nobody waits for what comes of it."""
        job = self.world.job
        for victim in victims:
            node, step = victim.agent.node, Step(victim.step + 1)
            own, found = {victim.rank: "gradient"}, {victim.rank: Finding(1, "a module", "output")}
            told = NumbersBad(node, job.epoch, step, (victim.rank,), "bad", own, found, NanChoice.SKIP)
            self.world.tell(told)
            self.world.tell(NumbersSound(node, job.epoch, Step(victim.step)))

    def _tell_who_differs(self, victim: Worker) -> None:
        host = self.world.settings.host_of[victim.rank]
        told = PeersDiffered(
            victim.agent.node, self.world.job.epoch, Step(victim.step), host, victim.rank, victim.model.dp, "part 1"
        )
        self.world.tell(told)

    def _corrupt(self, victim: Worker) -> None:
        """The mirror of a rank rots at its host, sometimes its own copies as well, and then the rank is needed."""
        self.has_corrupted = True
        host = self.world.worker_on(self.world.settings.host_of[victim.rank])
        rotten = [] if host is None else [host.guests.get(victim.rank, {})]
        if self.world.pick(3) == 0:
            rotten.append(victim.own)
        for slots in rotten:
            for step, snapshot in slots.items():
                slots[step] = snapshot.corrupted()
        victim.agent.lose([victim.rank], "killed by SIGKILL")

    def _lose_node(self, victim: Worker) -> None:
        agent = victim.agent
        for worker in list(agent.workers.values()):
            if worker.is_alive:
                worker.is_alive = False
                self.world.on_worker_ended(worker)
        agent.is_alive = False
        self.world.tell(NodeLost(agent.node, "connection closed"))
        if self.spares and self.spare_at is None:
            self.spare_at = self.world.now + self.world.settings.spare_delay

    def _victims(self, who: str) -> list[Worker]:
        world = self.world
        living = world.living()
        if not living:
            return []
        first = living[world.pick(len(living))]
        ranks: set[Rank] = {first.rank}
        match who:
            case "two" | "three":
                for _ in range(1 if who == "two" else 2):
                    ranks.add(living[world.pick(len(living))].rank)
            case "host and guest":
                ranks.add(world.settings.host_of[first.rank])
            case "replacement":
                replacements = [worker for worker in living if not worker.member.is_first]
                if replacements:
                    return [replacements[world.pick(len(replacements))]]
            case "peers":
                ranks.update(first.model.groups[first.keys["dp"]])
            case "all":
                ranks.update(worker.rank for worker in living)
        return [worker for worker in living if worker.rank in ranks]
