"""When a diagnosis is worth its time."""

from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.core.occasions import (
    EVERY,
    LEAST_INCIDENTS,
    SETTLED_AFTER,
    SETTLED_WITHIN,
    Occasions,
    share_of_look,
)


def training():
    """A job that has trained for long."""
    occasions = Occasions()
    assert occasions.look(True, 0.0) is None
    return occasions


def test_a_slow_rank_is_one_once_others_have_had_the_time_to_be_named():
    occasions = training()
    occasions.note_slow({2}, 100.0)
    assert occasions.look(True, 100.0 + SETTLED_AFTER - 0.1) is None
    assert occasions.look(True, 100.0 + SETTLED_AFTER) == "rank 2 is slow"
    assert occasions.look(True, 1000.0) is None


def test_whoever_is_slow_still_is_no_new_one_and_another_is():
    occasions = training()
    occasions.note_slow({2}, 100.0)
    assert occasions.look(True, 200.0)
    occasions.note_slow({2}, 201.0)
    assert occasions.look(True, 400.0) is None
    occasions.note_slow({2, 5, 7}, 401.0)
    assert occasions.look(True, 500.0) == "rank 5, 7 are slow"


def test_a_cascade_is_waited_for_no_longer_than_a_while_from_the_first():
    occasions = training()
    for rank in range(40):
        occasions.note_slow(range(rank + 1), 100.0 + 5.0 * rank)
        due = occasions.look(True, 100.0 + 5.0 * rank)
        assert (due is not None) == (5.0 * rank == SETTLED_WITHIN)
        if due is not None:
            occasions.end(1000.0)


def lose(occasions, number, now=100.0):
    """One here, one there."""
    for node in range(number):
        occasions.note_incident(NodeId(f"node{node}"), now)


def test_some_incidents_are_one_and_two_are_none():
    occasions = training()
    lose(occasions, LEAST_INCIDENTS - 1)
    assert occasions.look(True, 200.0) is None
    lose(occasions, 1, 201.0)
    assert occasions.look(True, 202.0) == "3 incidents so far"


def test_incidents_are_looked_at_the_less_often_the_more_there_were():
    occasions = training()
    due = []
    for number in range(1, 41):
        now = 1000.0 * number
        lose(occasions, 1, now)
        if occasions.look(True, now):
            due.append(number)
            occasions.end(now)
    assert due == [3, 5, 8, 12, 18, 27]


def test_what_a_host_loses_at_one_moment_is_one_incident():
    occasions = training()
    for worker in range(8):
        occasions.note_incident(NodeId("node1"), 100.0 + worker)
    assert occasions.look(True, 200.0) is None
    for now in (300.0, 400.0):
        occasions.note_incident(NodeId("node1"), now)
    assert occasions.look(True, 500.0) == "3 incidents so far"


def test_while_a_job_recovers_and_a_moment_longer_it_is_left_alone():
    occasions = training()
    lose(occasions, LEAST_INCIDENTS)
    assert occasions.look(False, 101.0) is None
    assert occasions.look(True, 105.0) is None
    assert occasions.look(True, 105.0 + SETTLED_AFTER) is not None


def test_one_follows_another_only_after_a_while():
    occasions = training()
    lose(occasions, LEAST_INCIDENTS)
    assert occasions.look(True, 100.0)
    occasions.end(130.0)
    lose(occasions, 2, 131.0)
    assert occasions.look(True, 130.0 + EVERY - 0.1) is None
    assert occasions.look(True, 130.0 + EVERY) == "5 incidents so far"


def test_each_look_at_more_incidents_has_a_smaller_share_of_the_level():
    at = (3, 5, 8, 12, 18, 27, 41)  # as looked at, see above
    assert [round(1 / share_of_look(number)) for number in at] == [2, 3, 4, 5, 6, 7, 8]
    # Of fewer: others happened that do not count.
    assert [share_of_look(number) for number in (1, 2, 4)] == [1 / 2, 1 / 2, 1 / 3]
