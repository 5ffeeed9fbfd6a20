"""One value among many: it stands out only from a tail that cannot explain it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flashrecovery.diagnose.standing_out import p_of_highest


def test_p_is_that_of_the_f_distribution_for_normalized_spacings():
    values = np.array([10.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    # 1 (10 - 2) over the mean of 2 (2 - 1) and 3 (1 - 0.5), two of them; then its half of the level.
    assert p_of_highest(values)[0] == pytest.approx((1 + 8 / 1.75 / 2) ** -2 * 2)


@pytest.mark.parametrize(
    ("draw", "most"),
    [
        pytest.param(lambda rng: rng.exponential(size=200), 34, id="exponential: exact but for the shares"),
        pytest.param(lambda rng: rng.normal(size=200), 34, id="normal"),
        pytest.param(lambda rng: rng.uniform(size=200), 34, id="bounded"),
        pytest.param(lambda rng: np.clip(rng.standard_t(3, size=(5, 200)), -6, 6).mean(axis=0), 34, id="heavy, capped"),
    ],
)
def test_noise_stands_out_as_often_as_was_agreed(draw, most):
    rng = np.random.default_rng(3)
    # At 0.05, 20 of 400 are expected at most; up to 34 with probability 0.999.
    assert sum(p_of_highest(draw(rng)).min() <= 0.05 for _ in range(400)) <= most


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_up_to_four_stand_out_together(number):
    values = np.random.default_rng(1).normal(size=256)
    values[:number] += 12
    p = p_of_highest(values)
    assert (p[:number] < 0.0005).all()
    assert (p[number:] > 0.01).all()


def test_few_values_prove_nothing():
    assert p_of_highest(np.array([50.0, 0.0, 0.1, -0.1])).tolist() == [1, 1, 1, 1]


def test_who_stands_at_the_cap_with_others_does_not_stand_out():
    assert p_of_highest(np.array([6.0] * 8 + [0.1 * k for k in range(30)])).min() == 1


def test_one_stands_out_from_others_that_are_all_alike():
    p = p_of_highest(np.array([6.0] + [0.0] * 63))
    assert p[0] == pytest.approx((1 + 6 / 0.3 / 16) ** -16 * 2)
    assert (p[1:] == 1).all()


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=60))
def test_p_falls_with_the_value_and_is_one_for_almost_all(values):
    p = p_of_highest(np.array(values))
    assert ((p > 0) & (p <= 1)).all()
    assert (p < 1).sum() <= 4
    assert (np.diff(p[np.argsort(-np.array(values), kind="stable")]) >= 0).all()


def test_how_far_others_are_apart_does_not_matter():
    values = 2 * np.random.default_rng(2).normal(size=64)
    values[5] += 6
    assert p_of_highest(values * 1000) == pytest.approx(p_of_highest(values))
