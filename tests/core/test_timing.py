"""Windows of the own time of the ranks of a node, and when they are told."""

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.pace import Spent
from megatron_flashrecovery.core.timing import Timing, Window


class Node:
    """Two ranks that make a step in each second."""

    def __init__(self):
        self.timing = Timing()
        self.spent = {Rank(0): Spent(), Rank(1): Spent()}
        self.now = 100.0
        self.look()

    def look(self):
        return self.timing.look(dict(self.spent), self.now)

    def step(self, computed=0.3, waited=0.2, ranks=(0, 1), seconds=1.0):
        self.now += seconds
        for rank in ranks:
            before = self.spent[Rank(rank)]
            self.spent[Rank(rank)] = Spent(before.steps + 1, before.computed + computed, before.waited + waited)
        return self.look()


def test_a_window_is_the_mean_of_its_steps():
    node = Node()
    assert node.step(computed=0.1, waited=0.0, seconds=0.5) is None
    assert node.step(computed=0.3, waited=0.2, seconds=0.5) == Window({0: 0.2, 1: 0.2}, {0: 0.1, 1: 0.1})


def test_a_window_lasts_until_every_rank_has_completed_a_step():
    node = Node()
    assert node.step(ranks=(0,), seconds=30.0) is None
    assert node.step(ranks=(1,), seconds=0.1) == Window({0: 0.3, 1: 0.3}, {0: 0.2, 1: 0.2})


def test_what_stays_as_it_is_is_told_once_in_a_minute():
    node = Node()
    told = [node.step() is not None for _ in range(200)]
    assert told[:10] == [True] * 10
    assert told[10:].count(True) == 3


def test_what_changes_is_told_at_once_and_for_a_while():
    node = Node()
    for _ in range(60):
        node.step()
    told = [node.step(computed=0.4) is not None for _ in range(10)]
    assert told == [True] * 10
    for _ in range(60):
        node.step(computed=0.4)
    assert node.step(computed=0.3) is not None


def test_a_tenth_more_or_less_is_usual():
    node = Node()
    for _ in range(12):
        node.step()
    assert node.step(computed=0.32) is None


def test_another_process_in_a_seat_begins_at_zero():
    node = Node()
    for _ in range(3):
        node.step()
    node.spent[Rank(1)] = Spent()
    assert node.look() is None
    assert node.step(computed=0.5) == Window({0: 0.5, 1: 0.5}, {0: 0.2, 1: 0.2})


def test_a_node_without_ranks_that_train_tells_nothing():
    timing = Timing()
    assert timing.look({}, 0.0) is None
    assert timing.look({}, 10.0) is None
