"""Workers that end with 0 although nobody told them to: all together they leave, alone they are lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.runtime import departures as module
from megatron_flashrecovery.runtime.departures import Departures

RANKS = (Rank(0), Rank(1))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    return clock


def end(rank: int, status: int = 0) -> Any:
    return SimpleNamespace(
        worker=SimpleNamespace(rank=Rank(rank), seat=SimpleNamespace(rank=Rank(rank))), status=status
    )


def lost(departures: Departures) -> list[Rank]:
    return [end.worker.rank for end in departures.stayed_alone()]


def test_one_that_leaves_alone_is_lost_after_a_while(clock: Any) -> None:
    departures = Departures(RANKS)
    assert not departures.is_loss(end(1), takes_part=True)
    assert lost(departures) == []
    assert departures.result() is None
    clock.now += 2.0
    assert lost(departures) == [1]
    assert departures.result() is None


def test_all_that_leave_together_are_done_and_that_is_told_once(clock: Any) -> None:
    departures = Departures(RANKS)
    for rank in RANKS:
        assert not departures.is_loss(end(rank), takes_part=True)
    assert departures.result() == ""
    assert departures.result() is None
    assert departures.still_here() == []


def test_all_of_a_node_that_is_not_dismissed_for_it_are_lost_for_others_stay(clock: Any) -> None:
    departures = Departures(RANKS)
    for rank in RANKS:
        departures.is_loss(end(rank), takes_part=True)
    assert departures.result() == ""
    clock.now += 2.0
    assert lost(departures) == [0, 1]
    assert departures.result() is None
    departures.released = True  # their replacements come to the end of the job
    for rank in RANKS:
        departures.is_loss(end(rank), takes_part=True)
    assert departures.result() == ""


def test_a_node_without_recovery_is_done_and_nobody_of_it_is_lost(clock: Any) -> None:
    departures = Departures(RANKS)
    for rank in RANKS:
        departures.is_loss(end(rank), takes_part=False)
    assert departures.result() == ""
    clock.now += 60.0
    assert lost(departures) == []
    assert departures.still_here() == []
