"""Noise is not reported, except as often as was agreed."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.gbgp import Limits, Settings, Trial, detect, evolving
from megatron_flashrecovery.diagnose.gbgp.significance import Calibration, permuted
from tests.diagnose.gbgp.small import f_score, grid

NETWORK = grid(5)
SETTINGS = (Settings(3, limits=Limits(3)), Settings(6, limits=Limits(3)))


def build(scores):
    return evolving(NETWORK, scores, 0.05)


def noise(seed):
    return np.random.default_rng(seed).normal(size=(2, 25))


def found_in(scores, trial, strata=None):
    labels = np.zeros(scores.shape) if strata is None else strata
    return detect(build, scores, labels, SETTINGS, trial)


def test_noise_is_reported_at_the_rate_that_was_asked_for():
    reported = sum(bool(found_in(noise(seed), Trial(permutations=4, level=0.2, seed=seed))) for seed in range(100))
    # 20 are expected; with probability 0.999 it is from 9 to 34.
    assert 9 <= reported <= 34


def test_noise_alone_always_has_a_best_region():
    """So the value proves nothing, which is why there is a trial."""
    assert all(found_in(noise(seed), Trial(permutations=1, level=1.0)) for seed in range(5))


def test_what_is_planted_is_reported_and_the_same_for_the_same_seed():
    scores = noise(3)
    truth = np.zeros((2, 25), dtype=bool)
    truth[:, [6, 7, 11, 12]] = True
    trial = Trial(permutations=39, level=0.05, seed=5)
    found = found_in(scores + 4 * truth, trial)
    assert found[0].p == 1 / 40
    assert f_score(np.isin(np.arange(50), found[0].region.entries), truth.reshape(-1)) > 0.85
    again = found_in(scores + 4 * truth, trial)
    assert [(each.p, each.region.entries.tolist()) for each in again] == [
        (each.p, each.region.entries.tolist()) for each in found
    ]


def test_a_group_that_is_always_different_is_not_an_anomaly():
    """Permuted within their labels, scores of a group that is high by nature stay high."""
    different = np.zeros((2, 25), dtype=bool)
    different[:, [6, 7, 11, 12]] = True
    trial = Trial(permutations=19, level=0.05)
    scores = noise(4) + 6 * different
    assert found_in(scores, trial)
    assert found_in(scores, trial, strata=different) == []


def test_scores_stay_with_their_label():
    scores, labels = np.arange(12.0).reshape(3, 4), np.arange(12).reshape(3, 4) % 3
    other = permuted(scores, labels, np.random.default_rng(0))
    assert other.shape == scores.shape
    assert other.tolist() != scores.tolist()
    for label in range(3):
        assert sorted(other[labels == label]) == sorted(scores[labels == label])
    with pytest.raises(ValueError, match="11 labels for 12 scores"):
        permuted(scores, np.zeros(11), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("rows", "best", "p"),
    [
        pytest.param([[9], [1], [2], [3]], 0, 0.25, id="highest"),
        pytest.param([[2], [1], [2], [3]], 0, 0.75, id="ties-count-against-us"),
        pytest.param([[0], [1], [2], [3]], 0, 1.0, id="lowest"),
        # Only the second statistic is conspicuous. The first row of noise is best in the first, so p is 2 of 4.
        pytest.param([[1, 9], [5, 1], [2, 2], [3, 3]], 1, 0.5, id="choosing-is-paid-for"),
    ],
)
def test_a_p_value_counts_the_rows_that_are_as_conspicuous(rows, best, p):
    calibration = Calibration(np.array(rows, dtype=float))
    assert calibration.best == best
    assert calibration.p(best, rows[0][best]) == p


def test_the_p_of_noise_is_uniform_even_with_several_statistics_to_choose_from():
    rng = np.random.default_rng(8)
    found = []
    for _ in range(400):
        rows = rng.normal(size=(20, 5)) + rng.normal(size=(20, 1))
        calibration = Calibration(rows)
        found.append(calibration.p(calibration.best, rows[0][calibration.best]))
    for level in (0.05, 0.1, 0.2):
        # Never more often than agreed, up to three standard deviations of 400 draws.
        assert np.mean(np.array(found) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 400)
    assert np.mean(np.array(found) <= 0.2) > 0.05


def test_too_few_permutations_for_a_level_are_refused():
    with pytest.raises(ValueError, match="can prove nothing"):
        Trial(permutations=9, level=0.05)
