"""Which nodes are heard late."""

from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.core.punctuality import EVERY, Gaps, Punctuality

A, B = NodeId("a"), NodeId("b")


def heard(*moments):
    punctuality = Punctuality(0.4)
    for moment in moments:
        punctuality.hear(A, moment)
    return punctuality


def test_gaps_of_more_than_two_intervals_are_counted_and_told_together():
    punctuality = heard(0.0, 0.4, 1.3, 1.7, 2.9)
    assert punctuality.look(EVERY) == {A: Gaps(2, 1.2)}
    assert punctuality.look(2 * EVERY) == {}


def test_who_comes_in_time_is_not_told():
    assert heard(*(number * 0.4 for number in range(50))).look(EVERY) == {}


def test_it_is_told_at_most_once_in_ten_seconds():
    punctuality = heard(0.0, 1.0)
    assert punctuality.look(EVERY)
    punctuality.hear(A, EVERY + 3.0)
    assert punctuality.look(EVERY + 4.0) == {}
    assert punctuality.look(2 * EVERY) == {A: Gaps(1, 12.0)}


def test_while_the_controller_itself_stood_still_nobody_was_late():
    punctuality = heard(0.0)
    punctuality.excuse(5.0)
    punctuality.hear(A, 5.3)
    assert punctuality.look(EVERY) == {}


def test_if_most_are_late_at_once_it_is_the_controller_and_none_of_them():
    punctuality = Punctuality(0.4)
    for node in "abc":
        punctuality.hear(NodeId(node), 0.0)
    for node in "ab":
        punctuality.hear(NodeId(node), 1.0)
    assert punctuality.look(EVERY) == {}
    punctuality.hear(A, EVERY + 1.0)
    assert punctuality.look(2 * EVERY) == {A: Gaps(1, EVERY)}


def test_a_node_that_was_given_up_begins_anew():
    punctuality = heard(0.0)
    punctuality.forget(A)
    punctuality.hear(A, 9.0)
    assert punctuality.look(EVERY) == {}
