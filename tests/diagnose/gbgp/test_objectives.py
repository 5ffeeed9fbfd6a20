"""Values, gradients and starts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.gbgp import Blocks, Coupling, OneRatio, SumOfRatios, evolving, layered
from megatron_flashrecovery.diagnose.gbgp.ascent import best_within
from megatron_flashrecovery.diagnose.gbgp.limits import Deadline, OutOfTime
from tests.diagnose.gbgp.small import line

BLOCKS = Blocks((line(4), line(3), line(3)))
GAINS = np.random.default_rng(5).normal(1.0, 1.0, size=10)
PAIRS = [
    Coupling(np.array([(0, 4), (1, 5), (5, 9)]), 0.3),
    Coupling(np.array([(0, 9), (4, 8)]), 0.05),
]
COUNTED = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1])
OBJECTIVES = [
    pytest.param(OneRatio(GAINS), id="one-ratio"),
    pytest.param(OneRatio(GAINS, PAIRS), id="one-ratio-coupled"),
    pytest.param(OneRatio(GAINS * COUNTED, PAIRS, COUNTED), id="one-ratio-masked"),
    pytest.param(SumOfRatios(BLOCKS, GAINS), id="sum-of-ratios"),
    pytest.param(SumOfRatios(BLOCKS, GAINS, PAIRS), id="sum-of-ratios-coupled"),
    pytest.param(evolving(line(5), GAINS.reshape(2, 5), 0.2).objective, id="evolving"),
]
CORNERS = np.array(list(itertools.product([0.0, 1.0], repeat=10)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_is_the_slope_of_the_value(objective):
    rng = np.random.default_rng(2)
    for _ in range(20):
        x, step = rng.uniform(0.05, 0.95, size=10), 1e-6
        ahead = np.array([objective.value(x + step * e) - objective.value(x - step * e) for e in np.eye(10)])
        assert objective.gradient(x) == pytest.approx(ahead / (2 * step), abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_nothing_the_value_is_nothing_and_the_gradient_points_along_the_gains(objective):
    nothing = np.zeros(10)
    assert objective.value(nothing) == 0
    slope = objective.gradient(nothing)
    assert np.isfinite(slope).all()
    assert (np.sign(slope) == np.sign(objective.gains)).all()


def test_the_value_of_one_ratio_written_out():
    x = np.array([1, 1, 0, 0.5, 0, 0, 0, 0, 0, 1.0])
    objective = OneRatio(GAINS, PAIRS, COUNTED)
    cost = 0.3 * (1 + 1 + 1) + 0.05 * (0 + 0)
    expected = (GAINS[0] + GAINS[1] + 0.5 * GAINS[3] + GAINS[9]) / np.sqrt(3.5) - cost
    assert objective.value(x) == pytest.approx(expected)


def test_a_sum_of_ratios_is_a_ratio_for_each_block():
    rng = np.random.default_rng(3)
    x = rng.random(10)
    each = [OneRatio(g).value(part) for g, part in zip(BLOCKS.split(GAINS), BLOCKS.split(x), strict=True)]
    assert SumOfRatios(BLOCKS, GAINS).value(x) == pytest.approx(sum(each))


@pytest.mark.parametrize("objective", [OneRatio(GAINS), SumOfRatios(BLOCKS, GAINS)], ids=["one", "sum"])
def test_without_couplings_the_start_is_the_maximum_over_the_box(objective):
    allowed = np.array([1, 1, 1, 0, 1, 1, 0, 1, 1, 0], dtype=bool)
    start = objective.start(allowed)
    assert not start[~allowed].any()
    assert objective.value(start) == pytest.approx(max(objective.value(c) for c in CORNERS * allowed))
    inside = np.random.default_rng(4).random((500, 10)) * allowed
    assert objective.value(start) >= max(objective.value(x) for x in inside)


def test_with_couplings_the_start_is_the_best_set_of_highest_gains():
    objective = OneRatio(GAINS, PAIRS)
    order = np.argsort(-GAINS)
    prefixes = [np.isin(np.arange(10), order[:size]).astype(float) for size in range(11)]
    best = max(objective.value(prefix) for prefix in prefixes)
    assert objective.value(objective.start(np.ones(10, dtype=bool))) == pytest.approx(best)


def test_where_nothing_is_gained_the_start_is_nothing():
    objective = SumOfRatios(BLOCKS, -np.ones(10))
    assert not objective.start(np.ones(10, dtype=bool)).any()
    assert not OneRatio(-np.ones(10)).start(np.zeros(10, dtype=bool)).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_ascent_ends_no_lower_than_it_began_and_stays_where_it_may(objective):
    rng = np.random.default_rng(6)
    for _ in range(10):
        x, allowed = rng.random(10), rng.random(10) < 0.7
        found = best_within(objective, x, allowed, 200, Deadline())
        assert not found[~allowed].any()
        assert ((found >= 0) & (found <= 1)).all()
        assert objective.value(found) >= objective.value(x * allowed)
        assert objective.value(found) >= objective.value(objective.start(allowed))


class Bowl:
    """An objective of somebody else, without a start: highest at a point that may lie outside of the box."""

    def __init__(self, top):
        self.top = np.array(top)
        self.stretch = np.array([1.0, 30.0, 0.1])

    def value(self, x):
        return -float(self.stretch @ np.square(x - self.top))

    def gradient(self, x):
        return -2 * self.stretch * (x - self.top)


def test_an_ascent_finds_the_maximum_of_a_concave_objective():
    everywhere = np.ones(3, dtype=bool)
    found = best_within(Bowl([0.25, 0.75, 7.0]), np.zeros(3), everywhere, 200, Deadline())
    assert found == pytest.approx([0.25, 0.75, 1.0], abs=1e-4)
    with pytest.raises(OutOfTime):
        best_within(Bowl([0.25, 0.75, 7.0]), np.zeros(3), everywhere, 200, Deadline(at=0.0))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: OneRatio([1.0, np.nan]), id="not-finite"),
        pytest.param(lambda: OneRatio([1.0, 2.0], counted=[1.0]), id="marks"),
        pytest.param(lambda: SumOfRatios(BLOCKS, [1.0]), id="gains"),
        pytest.param(lambda: evolving(line(3), np.zeros((2, 4)), 0.1), id="scores"),
        pytest.param(lambda: layered(BLOCKS, GAINS[:3], COUNTED, []), id="layers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build):
    with pytest.raises(ValueError, match=r"not finite|marks|gains for|scores of shape"):
        build()
