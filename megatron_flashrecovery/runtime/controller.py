"""One controller per job: hears every agent, lets the core decide, and passes its commands on.

It runs in one event loop, so the job has one writer. All it adds to the core is bytes, time and the record: nothing
here depends on what an event means. It lives in the launcher of node 0.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import get_args

from megatron_flashrecovery import __version__
from megatron_flashrecovery.comm.control import ControlServer
from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.coordinator import Job, handle
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Epoch, NodeId
from megatron_flashrecovery.core.liveness import overdue
from megatron_flashrecovery.core.phases import Finished, Starting
from megatron_flashrecovery.core.punctuality import Punctuality
from megatron_flashrecovery.runtime import node_messages
from megatron_flashrecovery.runtime.chronicle import Chronicle
from megatron_flashrecovery.runtime.diagnostician import Diagnostician
from megatron_flashrecovery.runtime.injection import Injection
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.spool import Spool

_EVENTS = get_args(core.Event)
_TICK = 0.05
_PAUSE = 1.0
_LOCAL = NodeId("node0")


class Controller:
    """``store`` is the address of the TCPStore that the workers meet in; ``job`` is the core's state, owned by this
    loop."""

    def __init__(
        self,
        config: LaunchConfig,
        job: Job,
        store: tuple[str, int],
        chronicle: Chronicle,
        spool: Spool | None = None,
        diagnostician: Diagnostician | None = None,
    ) -> None:
        self._config = config
        self._job = job
        self._store = store
        self._chronicle = chronicle
        self._spool = spool
        self._diagnostician = diagnostician
        self._outbox: dict[NodeId, asyncio.Queue[object]] = {}
        self._last_heard: dict[NodeId, float] = {}
        self._punctuality = Punctuality(config.deadlines.heartbeat_interval)
        self._looked = 0.0
        self._known: set[NodeId] = set()
        self._seen: set[str] = set()
        """Also those that were refused."""
        self._has_begun = False
        nodes = range(config.nnodes + config.spare_nodes)
        self._first_seats = {f"node{node_rank}": config.first_seats(node_rank) for node_rank in nodes}
        self._done: dict[NodeId, str] = {}
        """Whose workers have all ended, and what was wrong all the same."""
        self._restarted_in = Epoch(0)
        self._over = asyncio.Event()
        self._waits_for_nobody = asyncio.Event()
        self._dismissal = node_messages.Dismiss("", 0)
        self._server = ControlServer(node_messages.control_codec(), config.token, __version__, self._attach)

    async def start(self, address: str, port: int) -> int:
        return await self._server.start(address, port)

    async def run(self) -> None:
        """Until every node has been dismissed, also one that comes when the job is over."""
        began = time.monotonic()
        self._chronicle.begin(self._job, began)
        with self._failures_end_the_job():
            await self._tick()
        await self._dismiss_who_comes_late(began + self._config.deadlines.join_timeout)
        await self._server.stop()

    def stop(self, reason: str) -> None:
        """From this loop: the launcher ends, whatever the job is at."""
        self._end(node_messages.Dismiss(reason, 1))

    def leave(self) -> None:
        """From this loop, when the job is over: nobody who is late is waited for."""
        self._waits_for_nobody.set()

    async def _dismiss_who_comes_late(self, until: float) -> None:
        """A spare node that is still at its imports when a short job ends would look for the controller until its
        --join-timeout, and hold its machine and the batch job with it."""
        late, patience = self._absent(), until - time.monotonic()
        if not late or patience <= 0 or self._waits_for_nobody.is_set():
            return
        self._chronicle.tell_of_late_nodes(late, patience)
        while self._absent() and time.monotonic() < until and not self._waits_for_nobody.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._waits_for_nobody.wait(), _TICK)

    def _absent(self) -> list[str]:
        return sorted(self._first_seats.keys() - self._seen)

    async def _tick(self) -> None:
        self._looked = time.monotonic()
        while not self._over.is_set():
            self._apply(core.ClockTicked())
            absent = sorted(node for node in self._job.seats.ranks_on if node not in self._known)
            self._chronicle.remind(self._job, time.monotonic(), absent)
            self._check_silence()
            self._look_for_requests()
            self._look_for_who_is_to_blame()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), _TICK)

    async def _attach(self, messages: AsyncIterator[object]) -> AsyncIterator[object]:
        joined = await anext(messages)
        assert isinstance(joined, node_messages.NodeAttached), joined
        self._seen.add(joined.node)
        if self._over.is_set():
            yield self._dismissal
            return
        if (refusal := self._why_not(joined)) is not None:
            yield node_messages.Dismiss(refusal, 2, at_once=True)
            return
        outbox = self._outbox[joined.node] = asyncio.Queue()
        self._known.add(joined.node)
        self._last_heard[joined.node] = time.monotonic()
        reader = asyncio.ensure_future(self._read(joined.node, messages))
        with self._failures_end_the_job():
            self._welcome(joined, outbox)
        try:
            while True:
                message = await outbox.get()
                yield message
                if isinstance(message, node_messages.Dismiss):
                    return
        finally:
            reader.cancel()

    def _welcome(self, joined: node_messages.NodeAttached, outbox: asyncio.Queue[object]) -> None:
        if joined.room:
            outbox.put_nowait(node_messages.NodeWelcome(Epoch(0), *self._store))
            self._apply(core.NodeJoined(joined.node, joined.room))
        self._begin_once_all_are_there()

    def _begin_once_all_are_there(self) -> None:
        """Until then no worker is started, whatever is ordered: a node may be lost before the last one comes."""
        seats = self._job.seats
        if self._has_begun or seats.homeless or not seats.ranks_on.keys() <= self._outbox.keys():
            return
        self._has_begun = True
        for node, ranks in seats.ranks_on.items():
            welcome = node_messages.NodeWelcome(self._job.epoch, *self._store, tuple(sorted(ranks)))
            self._outbox[node].put_nowait(welcome)

    def _why_not(self, joined: node_messages.NodeAttached) -> str | None:
        """A node takes part once: what a second one of the same number would start runs beside the first one's."""
        if joined.node in self._known:
            return f"{joined.node} has joined this job before: give each node a --node-rank of its own"
        seats = self._first_seats.get(joined.node)
        if seats != joined.ranks or joined.room != (0 if seats else self._config.nproc_per_node):
            has = f"ranks {list(joined.ranks)}" if joined.ranks else f"room for {joined.room} ranks"
            return f"{joined.node} has {has}: give every node the same --nproc-per-node, --nnodes and --spare-nodes"
        return None

    async def _read(self, node: NodeId, messages: AsyncIterator[object]) -> None:
        with self._failures_end_the_job():
            async for message in messages:
                if node not in self._outbox:
                    continue  # given up: it has no say any more, until it hears of that
                self._last_heard[node] = now = time.monotonic()
                self._punctuality.hear(node, now)
                self._hear(message)
            if not self._over.is_set() and not self._may_go(node):
                self._lose_node(node, "its agent closed the connection")

    @contextmanager
    def _failures_end_the_job(self) -> Iterator[None]:
        """The outermost frame of this loop: a controller that decides no more must not leave the others waiting."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._end(node_messages.Dismiss(f"the controller failed: {type(error).__name__}: {error}", 1))

    def _hear(self, message: object) -> None:
        if isinstance(message, _EVENTS):
            self._apply(message)
            return
        match message:
            case node_messages.Heartbeat():
                pass
            case node_messages.InjectionAnswered(name=name, refusal=refusal):
                if self._spool is not None:
                    self._spool.answer(name, refusal)
            case node_messages.StartRefused(reason=reason):
                self._end(node_messages.Dismiss(reason, 2))
            case node_messages.NodeDone(node=node, epoch=epoch, failure=failure):
                if epoch >= self._restarted_in:  # else all workers have been started again since
                    self._note_done(node, failure)
            case node_messages.SignalPassedOn():
                self.leave()  # who is late has been told to end as well
                self._chronicle.note(message)
            case _:
                self._chronicle.note(message)

    def _note_done(self, node: NodeId, failure: str) -> None:
        self._done[node] = failure
        seated = self._job.seats.ranks_on
        if not self._job.seats.homeless and seated.keys() <= self._done.keys():
            failures = [failure for node, failure in self._done.items() if failure and node in seated]
            self._end(node_messages.Dismiss("; ".join(failures), 1 if failures else 0))

    def _apply(self, event: core.Event) -> None:
        now = time.monotonic()
        commands = handle(self._job, event, now)
        if self._diagnostician is not None:
            self._diagnostician.hear(event, now)
        self._chronicle.record(event, commands, self._job, now)
        for command in commands:
            self._order(command)

    def _order(self, command: core.Command) -> None:
        match command:
            case core.StartWorkers() | core.RestartAll() if not self._has_begun:
                pass  # each node is told its seats when all are there
            case (
                core.StartWorkers(node=node)
                | core.Drain(node=node)
                | core.ExecutePlan(node=node)
                | core.Fence(node=node)
            ):
                if isinstance(command, core.StartWorkers):
                    self._done.pop(node, None)
                if node in self._outbox:
                    self._outbox[node].put_nowait(command)
            case core.BeginTraining() | core.Park() | core.Resume() | core.Release() | core.RestartAll():
                # It is ordered again when a node comes, which does not make the others start again.
                if isinstance(command, core.RestartAll) and command.epoch > self._restarted_in:
                    self._restarted_in = command.epoch
                    self._done.clear()
                for queue in self._outbox.values():
                    queue.put_nowait(command)
            case core.Stop(reason=reason):
                self._end(node_messages.Dismiss(reason, 1))

    def _end(self, dismissal: node_messages.Dismiss) -> None:
        if self._over.is_set():
            return
        self._dismissal = dismissal
        self._chronicle.close(dismissal.failure)
        if self._diagnostician is not None:
            self._diagnostician.close()
        for queue in self._outbox.values():
            queue.put_nowait(dismissal)
        self._over.set()

    def _look_for_requests(self) -> None:
        """Users who want faults; the agent of the rank answers."""
        for request in () if self._spool is None else self._spool.requests():
            try:
                injection = Injection.parse(request.spec, is_live=True)
                injection.refuse_outside(self._config.world_size, self._config.nproc_per_node)
                node = self._job.seats.node_of.get(injection.rank)
                newest = self._chronicle.last_step
                if node not in self._outbox:
                    raise ConfigError(f"--inject {injection}: rank {injection.rank} {self._why_not_reached(node)}")
                if injection.step is not None and injection.step <= newest:
                    raise ConfigError(f"--inject {injection}: step {newest} is completed already: name a later one")
            except ConfigError as error:
                self._spool.answer(request.name, str(error))  # type: ignore[union-attr]
            else:
                self._outbox[node].put_nowait(node_messages.Inject(request.name, request.spec))

    def _why_not_reached(self, node: NodeId | None) -> str:
        if node is None or node in self._known:
            return "is not to be reached: its node is lost"
        return f"is still starting: ask again when {node} has done the script's imports"

    def _look_for_who_is_to_blame(self) -> None:
        if self._diagnostician is not None:
            diagnosed = self._diagnostician.look(self._job, time.monotonic())
            if diagnosed is not None:
                self._apply(diagnosed)

    def _check_silence(self) -> None:
        """Node 0 is this process: if it does not answer, neither do we."""
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        if gap > _PAUSE:
            # This process was stopped, starved or stuck on its disk: nobody could be heard, so nobody was silent.
            self._last_heard = {node: last + gap for node, last in self._last_heard.items()}
            self._punctuality.excuse(gap)
        for late, gaps in self._punctuality.look(now).items():
            self._chronicle.note(node_messages.HeartbeatsLate(late, gaps.late, gaps.worst))
        heard = {node: last for node, last in self._last_heard.items() if node != _LOCAL and not self._may_go(node)}
        for node in overdue(heard, now, self._config.deadlines.heartbeat_timeout):
            self._lose_node(node, f"nothing heard from its agent for {self._config.deadlines.heartbeat_timeout} s")

    def _may_go(self, node: NodeId) -> bool:
        """Its workers have ended, and nobody waits for them: the job is finished, or has not asked for recovery."""
        return node in self._done and isinstance(self._job.phase, Starting | Finished)

    def _lose_node(self, node: NodeId, cause: str) -> None:
        self._last_heard.pop(node, None)
        self._punctuality.forget(node)
        outbox = self._outbox.pop(node, None)
        if outbox is not None:
            outbox.put_nowait(node_messages.Dismiss(f"this node was given up: {cause}", 1, at_once=True))
            self._apply(core.NodeLost(node, cause))
            self._begin_once_all_are_there()
            if isinstance(self._job.phase, Finished) and node in self._job.seats.ranks_on:
                # Its workers had finished, and nobody hears any more how they have left.
                self._note_done(node, f"{node} was lost behind the last step: {cause}")
