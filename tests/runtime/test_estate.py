"""What a seat leaves to whoever takes it on another node."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_flashrecovery.comm.startup_record import StartupRecord
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.runtime.dialogue import InjectionOrder, Seat
from megatron_flashrecovery.runtime.estate import Estate

RECORD = StartupRecord.of(Epoch(0), {})
AGENT = InjectionOrder(0, "agent", Step(5), "forward")
KILL = InjectionOrder(1, "kill", Step(5), "forward")
ALWAYS = InjectionOrder(2, "nan", Step(5), "backward", {"times": "always"})


class Board:
    """The store of a job; nobody waits for what is not there."""

    def __init__(self) -> None:
        self.posted: dict[str, bytes] = {}

    def post(self, key: str, value: bytes) -> None:
        self.posted[key] = value

    def read(self, key: str) -> bytes:
        return self.posted[key]

    def post_newest(self, key: str, epoch: Epoch, value: bytes) -> None:
        self.post(key, value)

    def read_newest(self, key: str) -> bytes:
        return self.read(key)

    def has(self, key: str) -> bool:
        return key in self.posted


def estate(board: Any, joining: bool, may_move: bool = True, startup: bytes = b"", reported: int | None = 1) -> Estate:
    """``reported``: what the agent has been told of."""
    seat = Seat(
        rank=Rank(2),
        worker=WorkerId("rank2.1"),
        node=NodeId("node1"),
        epoch=Epoch(0),
        joining=joining,
        startup=startup,
        world_size=4,
        ranks_per_node=2,
        store_host="",
        store_port=0,
        token="",
        script="t.py",
        module=False,
        script_args=(),
        environment={},
        injections=(AGENT, KILL, ALWAYS),
        reported={} if reported is None else {"log": Step(reported)},
        may_move=may_move,
    )
    return Estate(seat, board)


def test_a_replacement_on_another_node_finds_the_record_of_the_start() -> None:
    board = Board()
    first = estate(board, joining=False)
    assert first.record is None
    first.begin(RECORD.to_bytes())
    assert estate(board, joining=True).record == RECORD


def test_what_is_reported_is_not_reported_again_by_any_successor() -> None:
    board = Board()
    first = estate(board, joining=False)
    first.begin(RECORD.to_bytes())
    first.note_reported("log", Step(4))
    assert first.reported == {"log": 1}, "of its predecessors only"
    second = estate(board, joining=True)
    assert second.reported == {"log": 4}
    second.note_reported("tensorboard", Step(5))
    assert estate(board, joining=True).reported == {"log": 4, "tensorboard": 5}


def test_what_the_agent_was_told_of_and_nobody_posted_counts_too() -> None:
    board = Board()
    first = estate(board, joining=False)
    first.begin(RECORD.to_bytes())
    first.note_reported("log", Step(4))
    assert estate(board, joining=True, reported=5).reported == {"log": 5}


def test_a_new_start_of_the_whole_job_reports_anew() -> None:
    board = Board()
    for _start in range(2):
        begun = estate(board, joining=False, reported=None)
        begun.begin(RECORD.to_bytes())
        assert estate(board, joining=True, reported=None).reported == {}
        begun.note_reported("log", Step(4))


def test_a_fault_that_has_taken_the_agent_along_is_not_inflicted_again() -> None:
    board = Board()
    first = estate(board, joining=False)
    first.begin(RECORD.to_bytes())
    first.note_fired(AGENT)
    first.note_fired(ALWAYS)
    assert estate(board, joining=True).injections == (KILL, ALWAYS)
    assert estate(board, joining=False).injections == (KILL, ALWAYS), "nor when everything starts anew"


@pytest.mark.parametrize("joining", [False, True])
def test_without_spare_nodes_nothing_is_posted_and_the_agent_knows_all(joining: bool) -> None:
    board = Board()
    alone = estate(board, joining, may_move=False, startup=RECORD.to_bytes())
    alone.begin(RECORD.to_bytes())
    alone.note_reported("log", Step(4))
    alone.note_fired(AGENT)
    assert board.posted == {}
    assert alone.record == (RECORD if joining else None)
    assert (alone.reported, alone.injections) == ({"log": 1}, (AGENT, KILL, ALWAYS))
