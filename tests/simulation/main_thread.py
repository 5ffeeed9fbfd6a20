"""The main thread of a simulated worker: it joins, trains, and executes plans.

The main thread runs in turns, between which anything may happen. It stands when it waits for something:
- ``handle``: inside an operation that is not complete;
- ``door``: parked before something that it has not started;
- ``caught``: an operation failed under it;
- ``match``: for counterparts that it issued for others, while it stands somewhere else;
- ``gate``: for the acknowledgement of its mirror;
- ``news``: for whatever the plan that it executes needs from others;
- ``idle``: it has nothing to do.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from megatron_flashrecovery.core.ids import Epoch, GroupKey, Rank, Step, WorkerId
from megatron_flashrecovery.core.member import Member, Mode
from megatron_flashrecovery.core.messages import OperationsFailed, PlanFailed, RanksFinished
from megatron_flashrecovery.core.reports import Told, Update
from tests.simulation.execution import Connect, ConnectionLost, Failure, News
from tests.simulation.fabric import Endpoint, Handle, Void, mix
from tests.simulation.program import (
    Arm,
    Ask,
    Await,
    BeforeWrite,
    Begin,
    Collective,
    Exchange,
    Gate,
    Pause,
    Program,
    train_step,
)
from tests.simulation.snapshot import Snapshot, keep

KINDS = ("tp", "pp", "dp", "mp", "world", "embedding")

if TYPE_CHECKING:
    from tests.simulation.agent import Agent
    from tests.simulation.world import World


class MainThread:
    """What the session part (``worker.Worker``) does is named here and done there."""

    def __init__(self, world: World, agent: Agent, rank: Rank, name: WorkerId, member: Member) -> None:
        self.world, self.agent, self.rank, self.name, self.member = world, agent, rank, name, member
        self.model = world.settings.model
        self.started_for = member.epoch
        self.is_alive = True
        self.is_hung = False
        self.ends: dict[GroupKey, Endpoint] = {}
        self.keys = {kind: key for kind in KINDS if (key := self.model.key(rank, kind)) is not None}
        self.step, self.params, self.master, self.values, self.timeline = 0, 0, 0, 0, 0
        self.update = Update.BEFORE
        self.told: list[Told] = []
        self.answers: deque[Told] = deque()
        self.is_finishing = False
        self.is_half_restored = not member.is_first
        self.has_abort_begun = False
        self.began_in = member.epoch
        """The epoch in which the step that the rank is in was begun."""
        self.guests: dict[Rank, dict[int, Snapshot]] = {}
        self.data_epoch = member.epoch if member.is_first else Epoch(-1)
        """The epoch of the last start or executed plan: mirrors of another one are not of this timeline."""
        self.acked = -1
        self.early: list[tuple[Rank, Snapshot, Epoch]] = []
        self.news: dict[tuple[Epoch, str], object] = {}
        self.rebuilding: tuple[GroupKey, ...] = ()
        """By the newest plan."""
        self.program: Program | None = None
        self.waits = "idle"
        self.ask: Ask | Connect | News | None = None
        self.handle: Handle | None = None
        self.matching: list[Handle] = []
        self.stood = ""
        """What it waits for when its counterparts are done."""
        self.is_void = False
        """Its step goes on with contents that nobody computed. The rank itself does not know."""
        self.result: object = None
        self.joins_in = world.pick(4)
        self.is_queued = False
        self.is_reporting = False
        self.push_turn()

    # --- the main thread ---------------------------------------------------------------------------------------------

    @property
    def own(self) -> dict[int, Snapshot]:
        return self.agent.vault.setdefault(self.rank, {})

    @property
    def is_stopping(self) -> bool:
        return self.member.mode is Mode.STOPPED

    def push_turn(self) -> None:
        if not self.is_queued:
            self.is_queued = True
            self.world.push(self.turn)

    def wake(self, result: object = None) -> None:
        self.waits, self.result = "", result
        self.push_turn()

    def stand(self, waits: str) -> None:
        self.waits = waits
        self.say_where()

    def turn(self) -> None:
        """Run the main thread up to its next ask."""
        self.is_queued = False
        if not self.is_alive or self.world.defer(self, self.turn):
            return
        if self.member.mode is Mode.JOINING:
            self._join()
            return
        if self.waits or self.program is None:
            return
        self.world.turns += 1
        try:
            if isinstance(self.result, ConnectionLost):
                ask = self.program.throw(self.result)
            else:
                ask = self.program.send(self.result)  # type: ignore[arg-type]
        except StopIteration:
            self.program = None
            self.stand("idle")
            return
        except ConnectionLost as lost:
            # It has all that it needs for another plan, and may be the last that has it.
            self.program = None
            self.waits = "idle"
            failed = {self.rank: str(lost)}
            self.world.tell(OperationsFailed(self.agent.node, self.member.epoch, failed, Step(self.step + 1)))
            return
        except Failure as failure:
            self.program = None
            self.waits = "idle"
            self.world.tell(PlanFailed(self.agent.node, self.member.epoch, self.rank, self.name, str(failure)))
            return
        self.result = None
        self.consider(ask)

    def consider(self, ask: Ask | Connect | News) -> None:
        """Do what the program asks for, unless the rank has to stop first."""
        self.ask = ask
        match ask:
            case Pause():
                self.push_turn()
            case Arm():
                if self.is_stopping and "gate check" not in self.world.off:
                    # Nobody knows whether what it has got since the order to stop is void.
                    self.stand("door")
                    return
                if not self.has_abort_begun or "abort check" in self.world.off:
                    self.mark("armed")
                self.push_turn()
            case Await(handle):
                self.wait_for(handle)
            case Connect() | News():
                self.stand("news")
                self.check_news()
            case Gate():
                self._pass_gate()
            case BeforeWrite():
                is_unsafe = self.has_abort_begun and "abort check" not in self.world.off
                is_told_off = self.is_stopping and self.world.settings.parks_at_write
                if self.is_finishing or not (is_unsafe or is_told_off):
                    self.push_turn()
                else:
                    self.stand("door")
            case Collective(is_told=True) if self.is_finishing and self.answers:
                self._take_answer()
            case Collective() | Begin() | Exchange():
                if self.is_stopping:
                    self.stand("door")
                else:
                    self.issue()

    def issue(self) -> None:
        """Start the operation that is asked for."""
        ask = self.ask
        end = self.ends[self.keys["pp" if isinstance(ask, Exchange) else ask.kind]]  # type: ignore[union-attr]
        match ask:
            case Collective(_, operation, value) | Begin(_, operation, value):
                handle = end.issue(operation, Void(value) if self.is_void else value)
            case Exchange(operation, sends, receives):
                given = {peer: Void(value) if self.is_void else value for peer, value in sends.items()}
                handle = end.exchange(operation, given, receives)
            case _:
                raise AssertionError(ask)
        self.world.ripen(end.comm)
        if isinstance(ask, Begin):
            self.wake(handle)
        else:
            self.wait_for(handle)

    def wait_for(self, handle: Handle) -> None:
        self.handle = handle
        if handle.is_done:
            self._completed(handle)
        elif handle.failed:
            self.waits = "handle"
            self.on_failed(handle)
        else:
            self.stand("handle")

    def progress(self) -> None:
        """One of the operations that this rank has under way completes, if one can."""
        if not self.is_alive or self.world.defer(self, self.progress):
            return
        for end in self.ends.values():
            for handle in end.open:
                if end.comm.ripe(handle):
                    end.complete(handle)
                    self.world.ripen(end.comm)
                    if self.waits == "handle" and self.handle is handle:
                        self._completed(handle)
                    else:
                        self.end_matching()
                        self.say_where()
                    return

    def _completed(self, handle: Handle) -> None:
        if self.program is None:
            self.stand("idle")
            return
        self.is_void = self.is_void or isinstance(handle.result, Void)
        if isinstance(self.ask, Collective) and self.ask.is_told:
            assert handle.result is not None
            self.world.monitor.on_use(self, f"{self.ask.operation} is told")
            payload = handle.result.to_bytes(8, "little")
            self.told.append(Told(self.ask.operation, payload, Step(self.step + 1)))
        self.wake(handle.result)

    def on_failed(self, handle: Handle) -> None:
        """An operation failed, because somebody died or an end was cut."""
        self.has_abort_begun = True
        if self.waits != "handle" or self.handle is not handle:
            self.end_matching()
            self.say_where()
        elif self.program is None:
            self.stand("idle")
        elif self._returns_garbage():
            self.wake(mix(self.world.pick(1 << 30), 13))
        else:
            self.stand("caught")
            self.world.luck.on_operation_failed(self, handle)

    def end_matching(self) -> None:
        """Counterparts that are done or have failed let it stand again where it stood."""
        self.matching = [one for one in self.matching if not one.is_done and not one.failed]
        if self.waits == "match" and not self.matching:
            self.waits = self.stood

    def _returns_garbage(self) -> bool:
        """Aborted is not completed: on a device the operation ends with wrong data, except where the host waits."""
        if not self.world.settings.returns_garbage or self.member.mode is Mode.EXECUTING:
            return False
        if self.world.luck.cut and not self.is_stopping:
            # Whoever lost a partner cannot pass the gate. Where all live, only who stands still may abort anything.
            return False
        return not (isinstance(self.ask, Collective) and self.ask.is_told) or "abort check" in self.world.off

    def _pass_gate(self) -> None:
        needed = self.step if self.model.sharded else self.step + 1
        if not self.model.sharded and not self.is_stopping and needed not in self.own:
            self.capture(needed, 0, mix(self.timeline, self.began_in))
        if self.is_finishing or (not self.is_stopping and (self.acked >= needed or "gate" in self.world.off)):
            kept = self.step if self.world.settings.keeps_told_last else self.step + 1
            self.told = [told for told in self.told if told.step is not None and told.step >= kept]
            self.push_turn()
            self.waits = ""
        else:
            self.stand("door" if self.is_stopping else "gate")

    def _take_answer(self) -> None:
        answer = self.answers.popleft()
        assert isinstance(self.ask, Collective)
        if answer.operation != self.ask.operation:
            self.world.monitor.blame(f"rank {self.rank} was told {answer.operation} at {self.ask.operation}")
        self.told.append(answer)
        self.wake(int.from_bytes(answer.payload, "little"))

    # --- training ----------------------------------------------------------------------------------------------------

    def mark(self, update: str) -> None:
        self.update = Update(update)
        self.world.monitor.on_use(self, f"it is {update}")
        self.world.on_mark(self, update)

    def train(self) -> Program:
        """The framework's loop, from the state of ``self.step``."""
        while self.step < self.model.steps:
            self.began_in = self.member.epoch
            yield from train_step(self)
            self._complete_step()
            if self.model.sharded:
                self.own.pop(self.step - 2, None)
                yield Pause()
                self.capture(self.step, self.master, self.timeline)
        if not self.is_stopping:
            self.finish()

    def _complete_step(self) -> None:
        self.step += 1
        self.timeline = mix(self.timeline, self.began_in)
        self.update = Update.BEFORE
        self.is_finishing = False
        self.answers.clear()
        self.world.monitor.on_use(self, "it completes a step")
        self.world.monitor.on_step(self)
        self.world.luck.on_step(self)
        self.world.save(self)

    def finish(self) -> None:
        self.member.finished()
        self.world.monitor.on_finished(self)
        self.world.tell(RanksFinished(self.agent.node, self.member.epoch, (self.rank,)))

    def capture(self, step: int, master: int, timeline: int) -> None:
        """Commit a snapshot of the live state, and let the mirror thread send it."""
        snapshot = Snapshot.take(step, master, self.values, timeline)
        keep(self.own, snapshot)
        self.world.mirror(self, snapshot)

    def _join(self) -> None:
        if self.joins_in > 0:
            self.joins_in -= 1
            self.push_turn()
            return
        if not self.member.is_first or self.acked >= self.step or "gate" in self.world.off:
            self.member.ready()
            self.say_ready()

    def start_from(self, step: int, state: tuple[int, int, int], timeline: int) -> None:
        """Every worker is started from the top: with a checkpoint, or without one."""
        self.step, self.timeline = step, timeline
        self.params, self.master, self.values = state
        for key in self.keys.values():
            self.ends[key] = self.world.communicator(key, self.member.epoch).join(self.rank)
        self.capture(step, self.master if self.model.sharded else 0, timeline)

    # --- done by the session -----------------------------------------------------------------------------------------

    def say_where(self) -> None:
        raise NotImplementedError

    def say_ready(self) -> None:
        raise NotImplementedError

    def check_news(self) -> None:
        raise NotImplementedError
