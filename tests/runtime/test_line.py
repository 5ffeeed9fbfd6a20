"""What a rank says while its main thread is stuck inside an operation."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator

import pytest

from megatron_flashrecovery.comm.channel import Channel, channel_pair
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import Park
from megatron_flashrecovery.core.reports import Spot, Standing
from megatron_flashrecovery.detect.pulse import Pulse
from megatron_flashrecovery.runtime.dialogue import OperationFailed, Seat, Stood, dialogue_codec
from megatron_flashrecovery.runtime.line import Line
from megatron_flashrecovery.runtime.parking_lot import ParkingLot
from megatron_flashrecovery.runtime.progress import Progress

SPOT = Spot(GroupKey("dp"), "allreduce", 3)


class BlockedRegistry:
    """The main thread is inside one operation all the time."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.wrong: dict[GroupKey, str] = {}
        self.severed: list[GroupKey] = []

    def errors(self) -> dict[GroupKey, str]:
        return {key: error for key, error in self.wrong.items() if key not in self.severed}

    def standing(self) -> tuple[Spot, float]:
        return SPOT, self._since

    def counts(self) -> dict[GroupKey, object]:
        return {}

    def groups_with(self, ranks: object) -> list[GroupKey]:
        return []

    def sever(self, keys: Iterable[GroupKey], reason: str, epoch: Epoch | None = None) -> None:
        self.severed += keys

    def settle(self) -> None:
        pass

    def backlog(self) -> None:
        """Its host waits for each operation."""


@pytest.fixture
def registry() -> BlockedRegistry:
    return BlockedRegistry()


@pytest.fixture
def agent(registry: BlockedRegistry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Channel]:
    monkeypatch.setattr(os, "_exit", lambda code: None)  # a worker whose agent is gone ends; here only its thread does
    codec = dialogue_codec()
    ours, theirs = channel_pair(codec)
    seat = Seat(Rank(1), WorkerId("1"), NodeId("a"), Epoch(0), False, b"", 2, 2, "", 0, "", "", False, (), {})
    lot = ParkingLot(5.0, lambda: None, lambda matches: None)
    line = Line(seat, Channel(theirs, codec), lot, registry, Progress(), Pulse(None))  # type: ignore[arg-type]
    line._member.ready()
    line.start()
    yield ours
    ours.close()
    line._thread.join(5.0)
    assert not line._thread.is_alive()


def test_a_rank_that_is_blocked_where_it_was_says_so_again_in_a_newer_epoch(agent: Channel) -> None:
    for epoch in (1, 2):
        agent.send(Park(Epoch(epoch), OrderNumber(epoch), (Rank(0),)))
        said, _ = agent.receive(5.0)
        assert isinstance(said, Stood)
        assert (said.epoch, said.number, said.report.standing) == (epoch, epoch, Standing.BLOCKED)


def test_an_error_that_nobody_who_waits_is_told_of_is_told_once_and_severed_with_the_order_to_stop(
    agent: Channel, registry: BlockedRegistry
) -> None:
    registry.wrong = {GroupKey("tp"): "NCCL reports REMOTE_ERROR"}
    said, _ = agent.receive(5.0)
    assert said == OperationFailed(Epoch(0), Step(1), "tp: NCCL reports REMOTE_ERROR")
    assert registry.severed == []
    with pytest.raises(TimeoutError):
        agent.receive(0.6)
    agent.send(Park(Epoch(1), OrderNumber(1), ()))
    said, _ = agent.receive(5.0)
    assert isinstance(said, Stood)
    assert registry.severed == ["tp"]
