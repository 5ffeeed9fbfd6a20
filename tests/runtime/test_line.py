"""What a rank says while its main thread is stuck inside an operation."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from megatron_flashrecovery.comm.channel import Channel, channel_pair
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import Drain, ExecutePlan, Park, Resume
from megatron_flashrecovery.core.reports import Match, Spot, Standing
from megatron_flashrecovery.core.shares import Share, Source
from megatron_flashrecovery.detect.pulse import Pulse
from megatron_flashrecovery.runtime import line as line_module
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
        self.resets = 0

    def reset_counts(self) -> None:
        self.resets += 1

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

    def settle(self, on_wait: Callable[[], None]) -> None:
        pass

    def backlog(self) -> None:
        """Its host waits for each operation."""

    def held_up_in(self) -> Spot | None:
        return None


@pytest.fixture
def registry() -> BlockedRegistry:
    return BlockedRegistry()


@pytest.fixture
def line_of() -> Iterator[Callable[[object], tuple[Line, Channel, ParkingLot]]]:
    """Makes one in training, with the other end of its channel, and where its main thread stands."""
    channels: list[Channel] = []

    def make(registry: object) -> tuple[Line, Channel, ParkingLot]:
        codec = dialogue_codec()
        ours, theirs = channel_pair(codec)
        channels.extend((ours, Channel(theirs, codec)))
        seat = Seat(Rank(1), WorkerId("1"), NodeId("a"), Epoch(0), False, b"", 2, 2, "", 0, "", "", False, (), {})
        lot = ParkingLot(5.0, lambda: None, lambda matches: None)
        line = Line(seat, channels[-1], lot, registry, Progress(), Pulse(None))  # type: ignore[arg-type]
        line._member.ready()
        return line, ours, lot

    yield make
    for channel in channels:
        channel.close()


@pytest.fixture
def agent(line_of: Any, registry: BlockedRegistry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Channel]:
    monkeypatch.setattr(os, "_exit", lambda code: None)  # a worker whose agent is gone ends; here only its thread does
    line, ours, _lot = line_of(registry)
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


class FreeRegistry(BlockedRegistry):
    """The main thread is in no operation."""

    def standing(self) -> None:  # type: ignore[override]
        return None


class WaitingForDevice(FreeRegistry):
    """As in ``torch.cuda.synchronize()`` behind an operation for which the others do not come."""

    def held_up_in(self) -> Spot:
        return SPOT


def test_a_rank_whose_host_waits_for_its_device_says_in_which_operation_that_is(
    line_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "_HELD_UP_AFTER", 0.05)
    main_thread = iter(["computing", "waiting", "waiting", "waiting"])
    monkeypatch.setattr(line_module, "_place_of_main_thread", lambda: next(main_thread))
    line, ours, lot = line_of(WaitingForDevice())
    line._obey(Park(Epoch(1), OrderNumber(1), (Rank(0),)))
    time.sleep(0.06)
    line._look_again()
    with pytest.raises(TimeoutError):
        ours.receive(0.0)  # it has moved, and may be on its way to its next operation
    time.sleep(0.06)
    line._look_again()
    said, _ = ours.receive(1.0)
    assert (said.report.standing, said.report.spot) == (Standing.BLOCKED, SPOT)
    line._obey(ExecutePlan(NodeId("a"), Epoch(1), OrderNumber(2), Step(0), True, (Share(Rank(1), Source.LIVE),)))
    lot.take_plan()
    line._look_again()
    with pytest.raises(TimeoutError):
        ours.receive(0.0)  # in a plan it is no news that others are waited for


def test_a_thread_that_is_in_one_call_is_at_one_place() -> None:
    places: list[object] = []
    looked = threading.Event()

    def look() -> None:
        for _ in range(2):
            time.sleep(0.02)
            places.append(line_module._place_of_main_thread())
        looked.set()

    threading.Thread(target=look, daemon=True).start()
    assert looked.wait(5.0)
    assert places[0] == places[1]
    assert places[0] is not None
    assert line_module._place_of_main_thread() != places[0]


class RecordedCopies:
    """Which epoch's transfers were ended."""

    def __init__(self) -> None:
        self.ended: list[Epoch] = []

    def own_steps(self) -> tuple[Step, ...]:
        return ()

    def guest_steps(self) -> dict[Rank, tuple[Step, ...]]:
        return {}

    def end_transfers(self, epoch: Epoch) -> None:
        self.ended.append(epoch)


def test_a_loss_frees_whoever_carries_out_a_plan_from_all_that_the_plan_makes_it_wait_for(line_of: Any) -> None:
    """A group without a lost member, too: who was to come to it may stand still by now."""
    line, _agent, _lot = line_of(registry := FreeRegistry())
    line.copies = copies = RecordedCopies()
    line._obey(Park(Epoch(1), OrderNumber(1), (Rank(0),)))
    shares = (Share(Rank(1), Source.LIVE, rebuild=(GroupKey("pp"),)),)
    line._obey(ExecutePlan(NodeId("a"), Epoch(1), OrderNumber(2), Step(4), False, shares))
    assert registry.severed == []
    line._obey(Park(Epoch(2), OrderNumber(3), (Rank(0),)))
    assert registry.severed == ["pp"]
    assert copies.ended == [1, 2]


def test_groups_that_are_kept_begin_to_count_anew_when_all_have_executed_the_plan(line_of: Any) -> None:
    """A second loss must not meet members that count from different places."""
    line, _agent, lot = line_of(registry := FreeRegistry())
    line._obey(Park(Epoch(1), OrderNumber(1), (Rank(0),)))
    line._obey(ExecutePlan(NodeId("a"), Epoch(1), OrderNumber(2), Step(4), False, (Share(Rank(1), Source.LIVE),)))
    lot.take_plan()
    assert line.say_executed(Epoch(1), {})
    assert registry.resets == 0
    line._obey(Resume(Epoch(1), OrderNumber(3), Step(4)))
    assert registry.resets == 1
    assert not lot.stopping


class OneOrderFirst:
    """A lock for which the first thread to ask has to wait until another one has obeyed an order under it."""

    def __init__(self, obey: Callable[[], None]) -> None:
        self._obey = obey
        self._waits = True

    def __enter__(self) -> None:
        if self._waits:
            self._waits = False
            self._obey()

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("order", "told"),
    [
        pytest.param({"advance": (Rank(1),)}, [], id="advance"),
        pytest.param({"match": {Rank(1): (Match(GroupKey("dp"), b"", 3),)}}, [], id="match"),
        pytest.param({"sever": {}}, [2], id="only-to-say-it-again"),
    ],
)
def test_where_a_rank_stands_is_not_told_as_the_answer_to_the_order_that_lets_it_go(
    line_of: Any, order: dict[str, Any], told: list[int]
) -> None:
    line, agent, lot = line_of(FreeRegistry())
    line._obey(Park(Epoch(1), OrderNumber(1), (Rank(0),)))
    threading.Thread(target=lambda: lot.before(SPOT), daemon=True).start()
    while lot.stand is None:
        time.sleep(0.001)
    drain = Drain(NodeId("a"), Epoch(1), OrderNumber(2), **order)
    # What the thread does next is to report; and the order comes between its first look and that.
    line._saying = OneOrderFirst(lambda: line._obey(drain))  # type: ignore[assignment]
    lot.get_out_of_the_way = lambda *_: None  # type: ignore[method-assign]  # its thread has not woken up yet
    line.report()
    heard = []
    with suppress(TimeoutError):
        while True:
            said, _ = agent.receive(0.0)
            assert isinstance(said, Stood)
            heard.append(int(said.number))
    assert sorted(set(heard)) == told
