"""The seats of one node, which come and go, and what is kept for whoever takes them."""

from __future__ import annotations

from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.messages import RestartAll
from megatron_flashrecovery.runtime.dialogue import Seat
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_seats import NodeSeats
from megatron_flashrecovery.runtime.seat import FROM_CHECKPOINT

RANKS = (Rank(2), Rank(3))


def seats_of(node_rank: int) -> NodeSeats:
    """Of a job of two nodes of two ranks, and a spare one."""
    config = LaunchConfig(
        script="t.py", nnodes=2, spare_nodes=1, nproc_per_node=2, node_rank=node_rank, master_port=1, token="x"
    )
    return NodeSeats(config)


def take(seats: NodeSeats, rank: Rank, epoch: int = 1, joining: bool = True) -> Seat:
    return seats.seat(rank, Epoch(epoch), joining, ())


def test_a_spare_node_has_no_seats_and_nobody_is_waited_for_there() -> None:
    seats = seats_of(2)
    assert (seats.ranks, seats.are_ready()) == ((), False)


def test_seats_that_have_moved_look_to_their_script_as_they_did() -> None:
    seats = seats_of(2)
    seats.add(RANKS)
    there = take(seats, Rank(3)).environment
    at_home = take(seats_of(1), Rank(3)).environment
    assert there == at_home
    assert (there["LOCAL_RANK"], there["GROUP_RANK"], there["WORLD_SIZE"]) == ("1", "1", "4")


def test_workers_of_one_rank_on_two_nodes_have_different_names() -> None:
    """By its name an end is known that was told before."""
    assert take(seats_of(1), Rank(3)).worker == "rank3.1"
    assert take(seats_of(2), Rank(3)).worker == "rank3.1@node2"


def test_seats_are_kept_in_order_and_given_up() -> None:
    seats = seats_of(2)
    seats.add([Rank(3)])
    seats.add([Rank(2)])
    assert seats.ranks == RANKS
    seats.note_ready(Rank(2), b"")
    assert not seats.are_ready()
    seats.note_ready(Rank(3), b"")
    assert seats.are_ready()
    seats.give_up(RANKS)
    assert (seats.ranks, seats.are_ready()) == ((), False)


def test_a_record_of_the_start_goes_to_replacements_until_everything_starts_anew() -> None:
    seats = seats_of(1)
    seats.add(RANKS)
    seats.note_ready(Rank(2), b"record")
    seats.note_reported(Rank(2), "log", Step(4))
    seats.note_ready(Rank(2), b"")
    assert (take(seats, Rank(2)).startup, take(seats, Rank(2)).reported) == (b"record", {"log": 4})
    assert take(seats, Rank(2), joining=False).startup == b""
    seats.begin_anew(RestartAll(Epoch(2), "no copy", from_checkpoint=True, skip=(Step(7),)))
    anew = take(seats, Rank(2), epoch=2, joining=False)
    assert (take(seats, Rank(2)).startup, anew.reported, anew.skip) == (b"", {}, (7,))
    assert anew.environment[FROM_CHECKPOINT] == "1"
    assert seats.begun_in == 2


def test_who_joins_replaces_somebody_who_could_run() -> None:
    """Its end is a loss, and not the end of the script, also before it has said anything."""
    seats = seats_of(2)
    seats.add(RANKS)
    joining, first = take(seats, Rank(2)), take(seats, Rank(2), joining=False)
    assert seats.takes_part(joining)
    assert seats.has_started(joining)
    assert not seats.takes_part(first)
    assert not seats.has_started(first)
    seats.note_ready(Rank(2), b"record")
    assert seats.has_started(first)
