"""When a diagnosis is worth its time."""

from megatron_flashrecovery.core.occasions import EVERY, LEAST_INCIDENTS, SETTLED_AFTER, Occasions


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


def test_some_incidents_are_one_and_two_are_none():
    occasions = training()
    occasions.note_incidents(LEAST_INCIDENTS - 1, 100.0)
    assert occasions.look(True, 200.0) is None
    occasions.note_incidents(1, 201.0)
    assert occasions.look(True, 202.0) == "3 incidents so far"


def test_while_a_job_recovers_and_a_moment_longer_it_is_left_alone():
    occasions = training()
    occasions.note_incidents(LEAST_INCIDENTS, 100.0)
    assert occasions.look(False, 101.0) is None
    assert occasions.look(True, 105.0) is None
    assert occasions.look(True, 105.0 + SETTLED_AFTER) is not None


def test_one_follows_another_only_after_a_while():
    occasions = training()
    occasions.note_incidents(LEAST_INCIDENTS, 100.0)
    assert occasions.look(True, 100.0)
    occasions.end(130.0)
    occasions.note_incidents(1, 131.0)
    assert occasions.look(True, 130.0 + EVERY - 0.1) is None
    assert occasions.look(True, 130.0 + EVERY) == "4 incidents so far"
