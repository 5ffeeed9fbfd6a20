"""The controller's own part: nodes that are silent, and nodes that are lost when everything is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank
from megatron_flashrecovery.core.job import Job, JobConfig
from megatron_flashrecovery.core.phases import Finished
from megatron_flashrecovery.runtime import controller as module
from megatron_flashrecovery.runtime import node_messages
from megatron_flashrecovery.runtime.controller import Controller
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.spool import Request


def done(node: NodeId, failure: str = "", epoch: int = 9) -> node_messages.NodeDone:
    return node_messages.NodeDone(node, Epoch(epoch), failure)


FIRST, SECOND, SPARE = NodeId("node0"), NodeId("node1"), NodeId("node2")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def controller_of(tmp_path: Path) -> Controller:
    """Of two nodes that have attached."""
    config = LaunchConfig(script="x", nnodes=2, master_port=1, token="secret", log_dir=tmp_path)
    job = Job.start(JobConfig(spare_nodes=0), {FIRST: (Rank(0),), SECOND: (Rank(1),)}, sharded=True)
    records: Any = SimpleNamespace(last_step=0, record=lambda *_: None, close=lambda *_: None)
    controller = Controller(config, job, ("", 0), records)
    for node in (FIRST, SECOND):
        controller._outbox[node] = asyncio.Queue()
        controller._last_heard[node] = 100.0
    controller._looked = 100.0
    controller._known |= {FIRST, SECOND}
    return controller


def test_a_node_that_is_silent_is_lost(tmp_path: Path, clock: Clock) -> None:
    controller = controller_of(tmp_path)
    for tenth in range(25):
        clock.now = 100.0 + tenth / 10
        controller._check_silence()
    assert SECOND not in controller._outbox
    assert FIRST in controller._outbox


def test_a_controller_that_was_stuck_takes_nobody_for_silent(tmp_path: Path, clock: Clock) -> None:
    controller = controller_of(tmp_path)
    clock.now = 130.0
    controller._check_silence()
    assert SECOND in controller._outbox


def test_a_node_that_is_lost_behind_the_last_step_is_not_waited_for(tmp_path: Path) -> None:
    controller = controller_of(tmp_path)
    controller._job.phase = Finished()
    controller._lose_node(SECOND, "its agent closed the connection")
    assert not controller._over.is_set()
    controller._hear(done(FIRST))
    assert controller._over.is_set()
    (dismissal,) = [controller._outbox[FIRST].get_nowait()]
    assert "node1 was lost behind the last step" in dismissal.failure


@pytest.mark.parametrize("plain", [False, True], ids=["finished", "a script without recovery"])
def test_a_node_that_goes_when_its_workers_have_ended_well_spoils_no_end(
    tmp_path: Path, clock: Clock, plain: bool
) -> None:
    controller = controller_of(tmp_path)
    if not plain:
        controller._job.phase = Finished()
    controller._hear(done(SECOND))
    for tenth in range(30):
        clock.now = 100.0 + tenth / 10
        controller._check_silence()
    controller._hear(done(FIRST))
    assert controller._dismissal == node_messages.Dismiss("", 0)


# --- nodes that come -------------------------------------------------------------------------------------------------


def attach(controller: Controller, *joined: node_messages.NodeAttached) -> None:
    for each in joined:
        assert controller._why_not(each) is None
        controller._known.add(each.node)
        outbox = controller._outbox[each.node] = asyncio.Queue()
        controller._welcome(each, outbox)


def ordered(controller: Controller, node: NodeId) -> list[object]:
    queue = controller._outbox[node]
    return [queue.get_nowait() for _ in range(queue.qsize())]


def expecting(tmp_path: Path, spares: int) -> Controller:
    """Two nodes and spare ones; nobody has come."""
    config = LaunchConfig(
        script="x", nnodes=2, spare_nodes=spares, nproc_per_node=1, master_port=1, token="secret", log_dir=tmp_path
    )
    job = Job.start(JobConfig(spare_nodes=spares), {FIRST: (Rank(0),), SECOND: (Rank(1),)}, sharded=True)
    records: Any = SimpleNamespace(last_step=0, record=lambda *_: None, close=lambda *_: None)
    return Controller(config, job, ("head", 7), records)


IS_FIRST = node_messages.NodeAttached(FIRST, (Rank(0),))
IS_SECOND = node_messages.NodeAttached(SECOND, (Rank(1),))
IS_SPARE = node_messages.NodeAttached(SPARE, (), room=1)


def welcome(*ranks: int, epoch: int = 0) -> node_messages.NodeWelcome:
    return node_messages.NodeWelcome(Epoch(epoch), "head", 7, tuple(map(Rank, ranks)))


def test_the_job_begins_when_all_who_have_seats_are_there_and_waits_for_no_spare_node(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=2)
    attach(controller, IS_SPARE, IS_FIRST)
    assert ordered(controller, FIRST) == []
    attach(controller, IS_SECOND)
    told = [ordered(controller, node) for node in (FIRST, SECOND, SPARE)]
    assert told == [[welcome(0)], [welcome(1)], [welcome()]]


def test_a_node_that_is_lost_before_the_last_one_has_come_is_replaced_in_the_same_start(tmp_path: Path) -> None:
    """Nobody has a worker yet, so nobody is told to start any before all are there."""
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_SECOND, IS_SPARE)
    controller._lose_node(SECOND, "its agent closed the connection")
    assert ordered(controller, SPARE) == [welcome()]
    attach(controller, IS_FIRST)
    assert ordered(controller, FIRST) == [welcome(0, epoch=1)]
    assert ordered(controller, SPARE) == [welcome(1, epoch=1)]


def test_a_lost_node_is_given_up_and_its_seats_go_to_the_spare_one(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    given_up = controller._outbox[SECOND]
    controller._lose_node(SECOND, "nothing heard")
    *_, last = [given_up.get_nowait() for _ in range(given_up.qsize())]
    assert last == node_messages.Dismiss("this node was given up: nothing heard", 1, at_once=True)
    _, start, restart = ordered(controller, SPARE)
    assert start == core.StartWorkers(SPARE, Epoch(1), (Rank(1),))
    assert isinstance(restart, core.RestartAll)
    assert not controller._over.is_set()


def test_the_job_is_over_when_all_nodes_with_seats_are_done(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    controller._lose_node(SECOND, "nothing heard")
    controller._hear(done(FIRST))
    assert not controller._over.is_set()
    controller._hear(done(SPARE))
    assert controller._dismissal == node_messages.Dismiss("", 0)


def test_what_was_wrong_on_a_node_that_was_replaced_is_no_failure_of_the_job(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    controller._hear(done(SECOND, "told to end by SIGTERM"))
    controller._lose_node(SECOND, "nothing heard")
    for node in (FIRST, SPARE):
        assert not controller._over.is_set()
        controller._hear(done(node))
    assert controller._dismissal == node_messages.Dismiss("", 0)


def test_the_job_is_not_over_while_seats_wait_for_a_node(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND)
    controller._lose_node(SECOND, "nothing heard")
    controller._hear(done(FIRST))
    assert not controller._over.is_set()


def test_who_was_done_before_all_workers_started_again_is_not_done(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    controller._hear(done(FIRST))
    controller._lose_node(SECOND, "nothing heard")
    for node in (SPARE, FIRST):
        assert not controller._over.is_set()
        controller._hear(done(node))
    assert controller._over.is_set()


def test_that_all_start_again_is_said_twice_when_a_node_comes_and_who_is_done_since_stays_so(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND)
    controller._lose_node(SECOND, "nothing heard")
    controller._hear(done(FIRST))
    attach(controller, IS_SPARE)
    assert not controller._over.is_set()
    controller._hear(done(SPARE))
    assert controller._dismissal == node_messages.Dismiss("", 0)


def test_who_was_done_before_it_heard_that_all_start_again_is_not_done(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    controller._lose_node(SECOND, "nothing heard")
    for late in (done(FIRST, epoch=0), done(SPARE)):
        controller._hear(late)
    assert not controller._over.is_set()
    controller._hear(done(FIRST))
    assert controller._over.is_set()


def test_a_node_that_gets_workers_again_is_not_done(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=0)
    attach(controller, IS_FIRST, IS_SECOND)
    controller._hear(done(SECOND))
    controller._order(core.StartWorkers(SECOND, Epoch(1), (Rank(1),)))
    controller._hear(done(FIRST))
    assert not controller._over.is_set()
    controller._hear(done(SECOND))
    assert controller._over.is_set()


def test_a_node_that_was_given_up_has_no_say_any_more(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    controller._lose_node(SECOND, "nothing heard")

    async def late() -> AsyncIterator[object]:
        yield node_messages.Heartbeat(SECOND)
        yield node_messages.StartRefused(SECOND, "no such flag")

    asyncio.run(controller._read(SECOND, late()))
    assert not controller._over.is_set()
    assert SECOND not in controller._last_heard


def test_a_spare_node_that_goes_behind_the_last_step_spoils_no_end(tmp_path: Path) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_FIRST, IS_SECOND, IS_SPARE)
    controller._job.phase = Finished()
    controller._lose_node(SPARE, "its agent closed the connection")
    for node in (FIRST, SECOND):
        controller._hear(done(node))
    assert controller._dismissal == node_messages.Dismiss("", 0)


@pytest.mark.parametrize(
    ("joined", "says"),
    [
        pytest.param(IS_SPARE, "node2 has joined this job before: give each node a --node-rank of its own", id="twice"),
        pytest.param(node_messages.NodeAttached(NodeId("node3"), (), 1), "node3 has room for 1", id="one-too-many"),
        pytest.param(node_messages.NodeAttached(SECOND, (Rank(1), Rank(2))), "node1 has ranks [1, 2]", id="ranks"),
        pytest.param(node_messages.NodeAttached(SECOND, (), 1), "node1 has room for 1", id="a-spare-one-that-is-none"),
    ],
)
def test_a_node_that_has_no_place_in_the_job_is_refused(
    tmp_path: Path, joined: node_messages.NodeAttached, says: str
) -> None:
    controller = expecting(tmp_path, spares=1)
    attach(controller, IS_SPARE)
    assert (controller._why_not(joined) or "").startswith(says)


class OneRequest:
    """A spool that holds one, and the answers to it."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self.answers: list[str] = []

    def requests(self) -> list[Request]:
        return [Request("a", self._spec)]

    def answer(self, _name: str, refusal: str) -> None:
        self.answers.append(refusal)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        pytest.param("kill:rank=1", "rank 1 is still starting: ask again when node1 has done", id="starting"),
        pytest.param("kill:rank=99", "there is no rank 99 in a job of 2: give a rank from 0 to 1", id="no-such-rank"),
        pytest.param("drop_heartbeats:rank=0", "so nothing would follow: name a rank from 1 on", id="pointless"),
        pytest.param("kill:rank=0", "rank 0 is not to be reached: its node is lost", id="lost"),
    ],
)
def test_a_request_for_a_rank_that_cannot_be_reached_is_answered_with_the_reason(
    tmp_path: Path, spec: str, says: str
) -> None:
    controller = controller_of(tmp_path)
    spool: Any = OneRequest(spec)
    controller._spool = spool
    controller._outbox.clear()
    controller._known.remove(SECOND)
    controller._look_for_requests()
    (answer,) = spool.answers
    assert says in answer
