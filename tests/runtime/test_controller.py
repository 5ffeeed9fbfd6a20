"""The controller's own part: nodes that are silent, and nodes that are lost when everything is over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.job import Job, JobConfig
from megatron_flashrecovery.core.phases import Finished
from megatron_flashrecovery.runtime import controller as module
from megatron_flashrecovery.runtime import node_messages
from megatron_flashrecovery.runtime.controller import Controller
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.spool import Request

FIRST, SECOND = NodeId("node0"), NodeId("node1")


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
    controller._hear(node_messages.NodeDone(FIRST, ""))
    assert controller._over.is_set()
    (dismissal,) = [controller._outbox[FIRST].get_nowait()]
    assert "node1 was lost behind the last step" in dismissal.failure


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
