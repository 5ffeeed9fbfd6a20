"""An agent whose seats come and go, by the orders of its controller."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flashrecovery.core.ids import Epoch, NodeId, OrderNumber, Rank
from megatron_flashrecovery.core.messages import Fence, Park, RestartAll, StartWorkers
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.runtime.agent import Agent
from megatron_flashrecovery.runtime.dialogue import Ready, Seat
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_messages import NodeWelcome
from megatron_flashrecovery.runtime.workers import Worker
from megatron_flashrecovery.state.vault import Vault

RANKS = (Rank(2), Rank(3))
WELCOME = NodeWelcome(Epoch(0), "head", 7)


class Workers:
    """Processes that are asked for, and never made."""

    def __init__(self) -> None:
        self.living: list[Worker] = []
        self.ended = 0

    def start(self, log_name: str) -> Worker:
        channel: Any = SimpleNamespace(send=lambda message, fds=(): None)
        self.living.append(Worker(len(self.living), channel, Path(log_name)))
        return self.living[-1]

    def kill(self, worker: Worker) -> None:
        worker.doomed = True

    def tell(self, worker: Worker, number: signal.Signals) -> None:
        worker.told = number

    def reap(self) -> None:
        doomed = [worker for worker in self.living if worker.doomed]
        self.living = [worker for worker in self.living if not worker.doomed]
        self.ended += len(doomed)

    def seated(self) -> Iterator[tuple[Rank, Worker]]:
        for worker in self.living:
            if worker.rank is not None and not worker.doomed:
                yield worker.rank, worker

    def seats(self) -> list[Seat]:
        return [worker.seat for _, worker in self.seated() if worker.seat is not None]


class Node:
    def __init__(self, node_rank: int) -> None:
        self.workers = Workers()
        self.sent: list[object] = []
        config = LaunchConfig(
            script="t.py", nnodes=2, spare_nodes=1, nproc_per_node=2, node_rank=node_rank, master_port=1, token="x"
        )
        control: Any = SimpleNamespace(send=self.sent.append)
        workers: Any = self.workers
        self.agent = Agent(config, config.node, workers, control, Vault())

    def obey(self, *orders: object) -> list[Seat]:
        """Who sits there behind them."""
        self.hear(*orders)
        self.workers.reap()
        self.agent._fill_seats()
        return self.workers.seats()

    def hear(self, *orders: object) -> None:
        """Who is ended by them does not end yet."""
        for order in orders:
            self.agent.hear(order)
        self.agent._obey()


@pytest.fixture
def node_of() -> Iterator[Callable[[int], Node]]:
    made: list[Node] = []

    def make(node_rank: int) -> Node:
        made.append(Node(node_rank))
        return made[-1]

    yield make
    for node in made:
        node.agent.close()


def test_nobody_sits_on_a_spare_node_until_it_is_given_seats(node_of: Callable[[int], Node]) -> None:
    spare = node_of(2)
    assert spare.obey(WELCOME, Park(Epoch(1), OrderNumber(1), RANKS)) == []
    seats = spare.obey(StartWorkers(NodeId("node2"), Epoch(1), RANKS))
    assert [(seat.rank, seat.joining, seat.epoch) for seat in seats] == [(2, True, 1), (3, True, 1)]
    assert {(seat.store_host, seat.store_port, seat.startup) for seat in seats} == {("head", 7, b"")}


def test_its_seats_take_part_in_a_restart_that_it_has_only_just_heard_of(node_of: Callable[[int], Node]) -> None:
    start = StartWorkers(NodeId("node2"), Epoch(2), RANKS)
    order = RestartAll(Epoch(2), "lost before everybody had started", from_checkpoint=False)
    spare = node_of(2)
    seats = spare.obey(WELCOME, start, order, order)
    assert [(seat.rank, seat.joining, seat.epoch) for seat in seats] == [(2, False, 2), (3, False, 2)]
    assert spare.workers.ended == 2, "those that were to join first have been ended"


def test_a_restart_that_was_heard_before_the_seats_came_is_theirs_too(node_of: Callable[[int], Node]) -> None:
    order = RestartAll(Epoch(2), "no copy is left", from_checkpoint=True)
    seats = node_of(2).obey(WELCOME, order, StartWorkers(NodeId("node2"), Epoch(2), RANKS))
    assert [(seat.rank, seat.joining) for seat in seats] == [(2, False), (3, False)]
    assert all("FLASHRECOVERY_FROM_CHECKPOINT" in seat.environment for seat in seats)


def test_a_node_that_is_left_out_starts_nobody_any_more(node_of: Callable[[int], Node]) -> None:
    node = node_of(1)
    assert len(node.obey(NodeWelcome(Epoch(0), "head", 7, RANKS))) == 2
    fence = Fence(NodeId("node1"), RANKS, "node1 is left out: its device", Epoch(1), Fault.NODE_LOST)
    assert node.obey(fence) == []
    assert node.obey(RestartAll(Epoch(2), "no copy is left", from_checkpoint=True)) == []


def test_whose_rank_is_fenced_for_something_else_is_started_again_there(node_of: Callable[[int], Node]) -> None:
    node = node_of(1)
    node.obey(NodeWelcome(Epoch(0), "head", 7, RANKS))
    fence = Fence(NodeId("node1"), RANKS[:1], "it hangs", Epoch(1), Fault.HANG)
    seats = node.obey(fence, StartWorkers(NodeId("node1"), Epoch(1), RANKS[:1]))
    assert sorted((seat.rank, seat.joining) for seat in seats) == [(2, True), (3, False)]


def test_a_successor_starts_when_its_predecessor_has_ended(node_of: Callable[[int], Node]) -> None:
    """Which holds the memory of its device until then."""
    node = node_of(1)
    node.obey(NodeWelcome(Epoch(0), "head", 7, RANKS))
    fence = Fence(NodeId("node1"), RANKS[:1], "it hangs", Epoch(1), Fault.HANG)
    node.hear(fence, StartWorkers(NodeId("node1"), Epoch(1), RANKS[:1]), Park(Epoch(2), OrderNumber(2), RANKS[:1]))
    node.agent._fill_seats()
    assert [seat.rank for seat in node.workers.seats()] == [3]
    seats = node.obey()
    assert sorted((seat.rank, seat.joining, seat.epoch) for seat in seats) == [(2, True, 2), (3, False, 0)]


def test_a_successor_hears_the_signal_that_was_passed_on_before_it_came(node_of: Callable[[int], Node]) -> None:
    node = node_of(1)
    node.obey(NodeWelcome(Epoch(0), "head", 7, RANKS))
    node.hear(RestartAll(Epoch(1), "lost before everybody had started", from_checkpoint=False), signal.SIGTERM)
    assert node.agent._dismissal is None, "no worker sits anywhere, but some will"
    assert len(node.obey()) == 2
    node.obey(StartWorkers(NodeId("node1"), Epoch(2), RANKS[:1]))  # its replacement learns from the others what to do
    assert [worker.told for _, worker in node.workers.seated()] == [signal.SIGTERM, None]


def test_nobody_starts_on_a_node_that_is_left_out_while_its_predecessor_ends(node_of: Callable[[int], Node]) -> None:
    node = node_of(1)
    node.obey(NodeWelcome(Epoch(0), "head", 7, RANKS))
    node.hear(RestartAll(Epoch(1), "lost before everybody had started", from_checkpoint=False))
    left_out = Fence(NodeId("node1"), RANKS, "node1 is left out: its device", Epoch(2), Fault.NODE_LOST)
    assert node.obey(left_out) == []


def test_a_start_that_is_told_twice_takes_the_seats_once(node_of: Callable[[int], Node]) -> None:
    node = node_of(1)
    welcome = NodeWelcome(Epoch(0), "head", 7, RANKS)
    node.obey(welcome, welcome)
    assert len(node.workers.living) == 2


def test_spare_workers_are_kept_where_seats_are(node_of: Callable[[int], Node]) -> None:
    spare = node_of(2)
    spare.agent._config = LaunchConfig(script="t.py", spares_per_node=1)
    spare.obey(WELCOME)
    spare.agent._keep_spares()
    assert spare.workers.living == []
    spare.obey(StartWorkers(NodeId("node2"), Epoch(1), RANKS))
    for _, worker in list(spare.workers.seated()):
        spare.agent._hear_worker(worker, Ready(Epoch(1), b""), [])
    spare.agent._keep_spares()
    assert [str(worker.log) for worker in spare.workers.living if worker.seat is None] == ["spares.log"]
