"""Seats that go to spare nodes: how many are waited for, and what a person is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, Event, Fence, NodeJoined, NodeLost, Park, StartWorkers, Stop
from megatron_flashrecovery.core.moves import Move, in_words, moves_of, names_of
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.shares import Source
from tests.core.jobs import CONFIG, A, B, lost, play, ready, report, stood, training_job
from tests.core.test_devices import lost_to

SPARE, OTHER = NodeId("spare"), NodeId("spare2")
GONE = NodeLost(B, "connection closed")


def with_spares(number: int, *joined: NodeId) -> Job:
    job = training_job(config=replace(CONFIG, spare_nodes=number))
    play(job, *(NodeJoined(node, 2) for node in joined))
    return job


def stop_of(commands: list[Command]) -> str:
    (stop,) = commands
    assert isinstance(stop, Stop), stop
    return stop.reason


@pytest.mark.parametrize(
    ("job", "before"),
    [
        pytest.param(with_spares(0), (), id="none"),
        pytest.param(with_spares(1, SPARE), (NodeLost(SPARE, "killed"),), id="it-was-lost-itself"),
        pytest.param(with_spares(1, SPARE), (NodeLost(A, "killed"),), id="it-was-used"),
    ],
)
def test_without_a_spare_node_that_is_left_the_job_stops_at_once_and_names_the_node(
    job: Job, before: tuple[Event, ...]
) -> None:
    play(job, *before)
    reason = stop_of(play(job, GONE))
    assert reason.startswith("node b with rank 2, 3 is gone: connection closed; no spare node is left: start the job")


def test_a_spare_node_that_has_not_come_yet_is_waited_for() -> None:
    job = with_spares(2, OTHER)
    play(job, NodeLost(OTHER, "killed"))
    assert play(job, GONE) == [Park(1, 1, (2, 3))]
    assert play(job, NodeJoined(SPARE, 2)) == [StartWorkers(SPARE, 1, (2, 3))]


def test_a_node_without_seats_is_lost_without_consequences() -> None:
    job = with_spares(1, SPARE)
    assert play(job, NodeLost(SPARE, "killed")) == []
    assert job.spares == []


def test_two_nodes_that_are_lost_at_the_same_time_need_two_spare_ones() -> None:
    job = with_spares(2, SPARE, OTHER)
    assert play(job, GONE)[1:] == [StartWorkers(SPARE, 1, (2, 3))]
    assert play(job, NodeLost(A, "killed"))[1:] == [StartWorkers(OTHER, 2, (0, 1))]


def test_a_lost_spare_node_is_replaced_like_any_other() -> None:
    job = with_spares(2, SPARE, OTHER)
    play(job, GONE)
    assert play(job, NodeLost(SPARE, "killed")) == [Park(2, 2, (2, 3)), StartWorkers(OTHER, 2, (2, 3))]


def test_copies_that_went_with_a_node_are_no_source_before_they_are_made_again() -> None:
    """Rank 2 kept the mirror of rank 0; whoever sits there now keeps nothing yet."""
    job = with_spares(1, SPARE)
    play(job, GONE, lost(A, 0, kept=()))
    play(job, stood(report(1), epoch=2, number=job.number), ready(SPARE, 2, 3, epoch=2))
    assert "no copy of step 5 is left of rank 0, 2" in stop_of(play(job, ready(A, 0, epoch=2)))


def test_what_the_agent_of_a_survivor_kept_is_a_source_where_the_mirror_went_with_the_node() -> None:
    job = with_spares(1, SPARE)
    play(job, GONE, lost(A, 1, kept=(4, 5)))
    play(job, stood(report(0), epoch=2, number=job.number), ready(SPARE, 2, 3, epoch=2))
    # Rank 3, whose mirror was with rank 1, is lost with it.
    assert "no copy of step 5 is left of rank 3" in stop_of(play(job, ready(A, 1, epoch=2)))


def test_the_ranks_of_a_lost_node_come_back_from_their_hosts() -> None:
    job = with_spares(1, SPARE)
    play(job, GONE, stood(report(0), report(1)))
    plans = play(job, ready(SPARE, 2, 3, epoch=1))
    shares = {share.rank: (share.source, share.giver) for plan in plans for share in plan.shares}
    assert (shares[2], shares[3]) == ((Source.MIRROR, 0), (Source.MIRROR, 1))
    assert {plan.node for plan in plans} == {A, SPARE}


# --- in words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        pytest.param((4,), "rank 4", id="one"),
        pytest.param((4, 5), "ranks 4 and 5", id="two"),
        pytest.param((4, 5, 6, 7), "ranks 4 to 7", id="in-a-row"),
        pytest.param((1, 4, 6), "ranks 1, 4 and 6", id="apart"),
        pytest.param(tuple(range(0, 40, 2)), "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more", id="many"),
    ],
)
def test_ranks_are_named(ranks: tuple[int, ...], says: str) -> None:
    assert names_of([Rank(rank) for rank in ranks]) == says


def told(job: Job, event: Event) -> list[str]:
    before = dict(job.seats.node_of) | dict.fromkeys(job.seats.homeless, B)
    commands = play(job, event)
    return in_words(event, moves_of(before, commands), before, job)


def test_a_node_that_is_lost_is_named_with_where_its_seats_go() -> None:
    assert told(with_spares(1, SPARE), GONE) == [
        "b is lost (connection closed): its ranks 2 and 3 move to spare",
    ]


def test_seats_that_wait_are_told_and_so_is_who_comes_for_them() -> None:
    job = with_spares(1)
    assert told(job, GONE) == ["b is lost (connection closed): its ranks 2 and 3 wait for a spare node"]
    assert told(job, NodeJoined(SPARE, 2)) == ["spare node spare has come: ranks 2 and 3 of b move there"]


def test_spare_nodes_come_and_go() -> None:
    job = with_spares(2, SPARE)
    assert told(job, NodeJoined(OTHER, 2)) == ["spare2 is there as a spare node"]
    assert told(job, NodeLost(SPARE, "killed")) == ["spare is lost (killed): it had no seats; 1 spare node is left"]


def test_the_reason_for_the_end_is_not_told_twice() -> None:
    assert told(with_spares(0), GONE) == []


def test_seats_of_a_node_that_is_left_out_are_told_to_move() -> None:
    assert told(with_spares(1, SPARE), lost_to(Fault.DEVICE_LOST)) == ["ranks 0 and 1 move from a to spare"]


def test_a_process_that_is_replaced_where_it_was_has_not_moved() -> None:
    commands: list[Command] = [Fence(B, (Rank(2),), "slow", 1), StartWorkers(B, 1, (Rank(2),))]
    assert moves_of({Rank(2): B}, commands) == []
    assert moves_of({Rank(2): A}, commands) == [Move((Rank(2),), A, B)]
