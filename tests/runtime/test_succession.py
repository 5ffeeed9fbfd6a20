"""A seat whose last process does not end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.runtime.succession import Succession
from megatron_flashrecovery.runtime.workers import Worker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sitting(rank: int) -> Worker:
    nothing: Any = None
    seat: Any = SimpleNamespace(rank=Rank(rank))
    return Worker(0, nothing, Path(), pid=4711, seat=seat)


def test_a_seat_that_nobody_sits_on_is_taken_at_once_and_once() -> None:
    succession = Succession(lambda: [sitting(1)], 20.0)
    succession.enter([Rank(0), Rank(2)], joining=True)
    assert succession.due() == [(0, True), (2, True)]
    assert succession.due() == []


def test_what_was_to_start_there_before_is_forgotten() -> None:
    living = [sitting(0)]
    succession = Succession(lambda: living, 20.0)
    succession.enter([Rank(0)], joining=True)
    succession.enter([Rank(0)], joining=False)
    assert succession.due() == []
    living.clear()
    assert succession.due() == [(0, False)]


def test_a_process_that_never_ends_is_told_of_and_not_waited_for_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    succession = Succession(lambda: [sitting(0)], 75.0, clock)
    succession.enter([Rank(0)], joining=True)
    assert succession.due() == []
    assert capsys.readouterr().err == ""
    for clock.now in (3.0, 4.0):
        assert succession.due() == []
    assert capsys.readouterr().err == "flashrecovery: rank 0 starts when process 4711 has ended, or in 17 s\n"
    succession.enter([Rank(0)], joining=True)  # by another order: it has waited long enough all the same
    clock.now = 20.0
    assert succession.due() == [(0, True)]
    assert "process 4711 of rank 0 has not ended for 20 s; its successor starts anyway" in capsys.readouterr().err
