"""A launcher that is told to end."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.runtime.departures import Departures
from megatron_flashrecovery.runtime.farewell import Farewell
from megatron_flashrecovery.runtime.node_messages import Dismiss, SignalPassedOn

NODE = NodeId("node0")


def farewell(seated: list[Any], told: list[object], sent: list[object]) -> Farewell:
    workers: Any = SimpleNamespace(seated=lambda: seated, tell=lambda worker, number: told.append((worker, number)))
    return Farewell(NODE, 30.0, workers, SimpleNamespace(send=sent.append), Departures([Rank(0), Rank(1)]))


def test_a_signal_before_any_worker_has_a_seat_ends_the_job_at_once() -> None:
    sent: list[object] = []
    dismissal = farewell([], [], sent).pass_on(signal.SIGTERM)
    assert dismissal == Dismiss("told to end by SIGTERM before any worker had started", 1)
    assert sent == []


def test_a_spare_node_leaves_by_itself() -> None:
    workers: Any = SimpleNamespace(seated=lambda: [])
    spare = Farewell(NodeId("node2"), 30.0, workers, SimpleNamespace(send=list[object]().append), Departures([]))
    leaves = Dismiss("told to end by SIGTERM, and no worker sits here", 1, at_once=True)
    assert spare.pass_on(signal.SIGTERM) == leaves
    elsewhere: list[object] = []
    controllers = Farewell(NODE, 30.0, workers, SimpleNamespace(send=elsewhere.append), Departures([]))
    assert controllers.pass_on(signal.SIGTERM) is None, "ranks on other nodes may still need it"


def test_a_node_without_seats_is_never_done() -> None:
    departures = Departures([])
    assert departures.result() is None
    assert departures.stayed_alone() == []
    assert departures.result() is None


def test_workers_are_told_and_have_their_time() -> None:
    told: list[object] = []
    sent: list[object] = []
    one = farewell([(Rank(0), "worker")], told, sent)
    assert one.pass_on(signal.SIGTERM) is None
    assert told == [("worker", signal.SIGTERM)]
    assert sent == [SignalPassedOn(NODE, "SIGTERM", 1)]
    assert one.out_of_patience() is None
