"""A simulated worker: its main thread, and a session that obeys orders, reports, and mirrors."""

from __future__ import annotations

from collections import deque

from megatron_flashrecovery.core.ids import Epoch, GroupKey, Rank, Step
from megatron_flashrecovery.core.member import (
    CarryOut,
    GetOutOfTheWay,
    GoOn,
    Leave,
    Mode,
    Order,
    SayReady,
    SetOut,
    StandStill,
)
from megatron_flashrecovery.core.messages import PlanExecuted, RanksReady
from megatron_flashrecovery.core.reports import Match, Report, Spot, Standing, Update
from tests.simulation.bad_luck import RESET
from tests.simulation.execution import Connect, ConnectionLost, News, execute
from tests.simulation.fabric import Communicator
from tests.simulation.main_thread import MainThread
from tests.simulation.program import Begin, Collective, Exchange
from tests.simulation.snapshot import Snapshot, keep


class Worker(MainThread):
    # --- orders ------------------------------------------------------------------------------------------------------

    def receive(self, order: Order) -> None:
        if not self.is_alive or self.world.defer(self, lambda: self.receive(order)):
            return
        action = self.member.receive(order)
        if action is None:
            return
        self.world.monitor.on_obeyed(self, order)
        match action:
            case SetOut():
                self.program = self.train()
                self.wake()
            case StandStill(lost, is_executing):
                self._stand_still(lost, is_executing)
            case SayReady():
                self.say_ready()
            case GetOutOfTheWay():
                self._get_out_of_the_way(action)
            case CarryOut(resume_step, regather, share):
                self.is_finishing = False
                self.rebuilding = share.rebuild
                self.program = execute(self, resume_step, regather, share)
                self.wake()
            case GoOn():
                self.has_abort_begun = any(end.broken not in (None, RESET) for end in self.ends.values())
                self.program = self.train()
                self.wake()
            case Leave():
                self.is_alive = False

    def _stand_still(self, lost: tuple[Rank, ...], is_executing: bool) -> None:
        self.is_finishing = False
        self.answers.clear()
        if is_executing:
            self.program = None
            if self.waits != "handle":
                self.waits = "idle"
        if self.waits == "gate":
            self.waits = "door"
        for key in self.keys.values():
            if key in self.ends and any(rank in lost for rank in self.model.groups[key]):
                self.cut(key, "a member was lost")
            elif key in self.ends and is_executing and key in self.rebuilding:
                self.cut(key, "the plan that was to make it is void")
        self.say_where()

    def _get_out_of_the_way(self, action: GetOutOfTheWay) -> None:
        for key, reason in action.sever.items():
            if key in self.ends:
                self.cut(key, reason)
        if action.advance and self.waits == "door" and isinstance(self.ask, Collective | Begin | Exchange):
            self.issue()
        if action.answer is not None and self.waits in ("door", "caught"):
            self.is_finishing = True
            self.answers = deque(action.answer)
            assert self.ask is not None
            self.waits = ""
            self.consider(self.ask)
        if action.match:
            self._issue_counterparts(action.match)
        self.say_where()

    def _issue_counterparts(self, matches: tuple[Match, ...]) -> None:
        if self.waits not in ("door", "caught", "idle"):
            self.world.monitor.blame(f"rank {self.rank} is to match others, but waits for {self.waits or 'nothing'}")
        self.stood, self.waits = self.waits, "match"
        self.matching = [self.ends[match.group].match(match) for match in matches]
        for key in dict.fromkeys(match.group for match in matches):
            self.world.ripen(self.ends[key].comm)
        self.end_matching()

    def cut(self, key: GroupKey, reason: str) -> None:
        """Sever this rank's end of a group; others may or may not see it."""
        end = self.ends[key]
        if end.broken is None:
            self.has_abort_begun = True
        failed = end.cut(reason)
        self.world.forsake(end.comm, self.rank)
        for handle in failed:
            self.on_failed(handle)

    # --- what it says ------------------------------------------------------------------------------------------------

    def say_ready(self) -> None:
        self.world.tell(RanksReady(self.agent.node, self.member.epoch, (self.rank,)))

    def executed(self) -> None:
        self.member.executed()
        self.world.monitor.on_executed(self)
        self.world.tell(PlanExecuted(self.agent.node, self.member.epoch, (self.rank,)))

    def say_where(self) -> None:
        if self.is_stopping and self.waits and not self.is_reporting:
            self.is_reporting = True
            self.world.push(self._report)

    def _report(self) -> None:
        if self.is_alive and not self.world.defer(self, self._report):
            self.is_reporting = False
            if self.is_stopping and self.waits:
                self.agent.report(self.report(), self.member.number, self.member.epoch)

    def report(self) -> Report:
        standing = {"handle": Standing.BLOCKED, "match": Standing.BLOCKED, "caught": Standing.CAUGHT}.get(
            self.waits, Standing.PARKED
        )
        return Report(
            self.rank,
            standing,
            Step(self.step),
            Update.WRITING if self.is_half_restored else self.update,
            self._spot() if self.waits in ("handle", "caught", "door", "match") else None,
            {key: end.count() for key, end in self.ends.items()},
            own=tuple(Step(step) for step in sorted(self.own)),
            guests={guest: tuple(Step(step) for step in sorted(kept)) for guest, kept in self.guests.items()},
            told=tuple(self.told),
        )

    def _spot(self) -> Spot | None:
        handle = self.matching[0] if self.waits == "match" else self.handle
        if self.waits != "door" and handle is not None:
            return Spot(
                handle.endpoint.comm.key,
                handle.operation,
                handle.number,
                tuple(peer for peer, _ in handle.sends),
                tuple(peer for peer, _ in handle.receives),
            )
        match self.ask:
            case Exchange(operation, sends, receives):
                return Spot(self.keys["pp"], operation, 0, tuple(sends), receives)
            case Collective(kind, operation) | Begin(kind, operation):
                return Spot(self.keys[kind], operation, self.ends[self.keys[kind]].issued + 1)
            case _:
                return None

    # --- the mirror thread -------------------------------------------------------------------------------------------

    def host_mirror(self, guest: Rank, snapshot: Snapshot, epoch: Epoch) -> bool:
        """Keep what a guest sent, if it is of this timeline; false if it is not."""
        if epoch > self.data_epoch and "epochs" not in self.world.off:
            self.early.append((guest, snapshot, epoch))
            return False
        if epoch < self.data_epoch and "epochs" not in self.world.off:
            return False
        keep(self.guests.setdefault(guest, {}), snapshot)
        self.say_where()
        return True

    def on_acked(self, step: int, epoch: Epoch) -> None:
        if epoch != self.data_epoch and "epochs" not in self.world.off:
            return
        self.acked = max(self.acked, step)
        if self.waits == "gate":
            assert self.ask is not None
            self.waits = ""
            self.consider(self.ask)
        if self.member.mode is Mode.JOINING and self.joins_in <= 0:
            self.push_turn()
        self.check_news()

    def discard(self, resume_step: int) -> None:
        """Nothing newer than the resume step survives, and from now on only mirrors of this epoch count."""
        if "discard" not in self.world.off:
            for slots in [self.own, *self.guests.values()]:
                for step in [step for step in slots if step > resume_step]:
                    del slots[step]
        self.data_epoch = self.member.epoch
        self.acked = -1
        self.world.monitor.on_discarded(self.rank)
        early, self.early = self.early, []
        for guest, snapshot, epoch in early:
            self.world.deliver_mirror(guest, self.rank, snapshot, epoch)

    def check_news(self) -> None:
        """Whether what the plan waits for has come."""
        if self.waits != "news":
            return
        match self.ask:
            case Connect(comm):
                if comm.is_connected():
                    self.wake()
            case News(what):
                if what == "acknowledged":
                    if self.acked >= self.step or "gate" in self.world.off:
                        self.wake()
                elif (content := self.news.pop((self.member.epoch, what), None)) is not None:
                    self.wake(content)

    def lose_connection(self, comm: Communicator, why: str) -> bool:
        """Whether it was waiting for the others to connect."""
        if self.waits != "news" or self.ask != Connect(comm) or self.is_hung:
            return False
        self.world.seen["connections lost in a plan"] += 1
        self.wake(ConnectionLost(f"{comm.key}: {why}"))
        return True

    def rejoin(self, key: GroupKey) -> Communicator:
        """Take a place in the new communicator of a group."""
        if key in self.ends:
            self.cut(key, "replaced")
        comm = self.world.communicator(key, self.member.epoch)
        self.ends[key] = comm.join(self.rank)
        self.world.on_connected(comm)
        return comm
