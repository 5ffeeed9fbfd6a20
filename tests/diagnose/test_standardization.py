"""Scores are deviations from peers in units of their spread, whatever is measured."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megatron_flashrecovery.diagnose.scores import CAP
from megatron_flashrecovery.diagnose.standardization import standardize
from megatron_flashrecovery.diagnose.telemetry import Metric, Telemetry

COMPUTE, SENT_AGAIN = Metric.COMPUTE, Metric.RETRANSMITS


def of(values, metric=COMPUTE, roles=None):
    values = np.array(values, dtype=float)
    return Telemetry({metric: values}, np.zeros(values.shape[1], int) if roles is None else np.array(roles))


def scores_of(telemetry, past=None):
    return standardize(telemetry, past).scores.values


def test_a_score_is_the_distance_to_the_median_in_units_of_the_median_distance():
    # Medians 1.0 and 2.0, distances 0.5 0 0 0.1 0.1 and 0.1 0.2 0 0.1 0.2, their median 0.1.
    telemetry = of([[1.5, 1.0, 1.0, 0.9, 1.1], [2.1, 2.2, 2.0, 1.9, 1.8]])
    unit = 1.4826 * 0.1
    assert scores_of(telemetry)[0] == pytest.approx(np.array([0.5, 0, 0, -0.1, 0.1]) / unit)
    assert scores_of(telemetry)[1] == pytest.approx(np.array([0.1, 0.2, 0, -0.1, -0.2]) / unit)


@pytest.mark.parametrize(
    ("metric", "usual", "unusual", "score"),
    [
        pytest.param(COMPUTE, 1.0, 1.05, 0.05 / 0.02, id="two percent of what is usual"),
        pytest.param(COMPUTE, 0.001, 0.002, 0.001 / 0.0005, id="half a millisecond"),
        pytest.param(Metric.LATENESS, 0.0, 0.003, 3.0, id="a millisecond late"),
        pytest.param(Metric.SILENCE, 0.5, 2.0, 3.0, id="half a second of silence"),
        pytest.param(SENT_AGAIN, 0, 4, 2 * (4.375**0.5 - 0.375**0.5), id="the root of a count"),
        pytest.param(Metric.ERRORS, 0, 1000, CAP, id="capped"),
    ],
)
def test_where_peers_are_all_alike_a_floor_is_the_unit(metric, usual, unusual, score):
    found = scores_of(of([[unusual] + [usual] * 7], metric))[0]
    assert found[0] == pytest.approx(score)
    assert (found[1:] == 0).all()


def test_a_quiet_window_does_not_make_small_things_large():
    rng = np.random.default_rng(0)
    loud, quiet = 1 + 0.1 * rng.normal(size=(9, 16)), np.ones((1, 16))
    quiet[0, 3] = 1.1
    assert scores_of(of(np.vstack([loud, quiet])))[-1, 3] < 1.5


def test_only_ranks_of_the_same_role_are_compared():
    found = scores_of(of([[1.0] * 4 + [3.0] * 4], roles=[0] * 4 + [1] * 4))
    assert (found == 0).all()


def test_what_changes_for_all_peers_is_nobodys():
    values = 1 + 0.01 * np.random.default_rng(1).normal(size=(4, 12))
    larger = values.copy()
    larger[2] += 5
    assert np.abs(scores_of(of(larger)) - scores_of(of(values))).max() < 1.5


def test_without_enough_peers_a_rank_is_compared_with_its_own_past():
    past = of([[1.0, 2.0]] * 8, roles=[0, 1])
    measured = standardize(of([[1.5, 2.0]] * 3, roles=[0, 1]), past)
    assert measured.scores.values[:, 0] == pytest.approx(CAP)
    assert (measured.scores.values[:, 1] == 0).all()
    assert measured.usual[COMPUTE][0].tolist() == [1.0, 2.0]
    assert measured.scores.strata.tolist() == [2, 2]


def test_what_has_become_of_all_without_peers_is_nobodys_either():
    roles = list(range(6))
    past = of([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0]] * 8, roles=roles)
    found = scores_of(of([[1.2, 2.4, 1.2, 1.2, 3.6, 2.4]] * 2, roles=roles), past)
    assert found[0, :5] == pytest.approx(0, abs=1e-9)
    assert found[0, 5] == CAP


@pytest.mark.parametrize("windows", [0, 7])
def test_without_peers_and_past_there_is_no_score(windows):
    past = of(np.ones((windows, 3))) if windows else None
    assert np.isnan(scores_of(of([[1.0, 1.0, 9.0]]), past)).all()


def test_what_is_not_measured_has_no_score_and_counts_for_nobody():
    values = np.full((2, 6), 1.0)
    values[:, 0], values[1, 1], values[:, 2] = np.nan, np.nan, 2.0
    found = scores_of(of(values))
    assert np.isnan(found[:, 0]).all()
    assert np.isnan(found[1, 1])
    assert (found[:, 2] == CAP).all()


def test_several_metrics_count_as_the_highest_of_so_many():
    normal = NormalDist()
    rng = np.random.default_rng(2)
    times, late = 1 + 0.1 * rng.normal(size=(3, 64)), 1 + 0.1 * rng.normal(size=(3, 64))
    measured = standardize(Telemetry({COMPUTE: times, Metric.LATENESS: late}, np.zeros(64, int)))
    highest = max(measured.z[COMPUTE][1, 5], measured.z[Metric.LATENESS][1, 5])
    assert measured.scores.values[1, 5] == pytest.approx(normal.inv_cdf(normal.cdf(highest) ** 2), abs=1e-3)


def test_several_metrics_of_a_healthy_job_are_normal_again():
    rng = np.random.default_rng(3)
    metrics = {each: 10 + rng.normal(size=(20, 256)) for each in (COMPUTE, Metric.LATENESS, Metric.SILENCE)}
    found = scores_of(Telemetry(metrics, np.zeros(256, int)))
    assert abs(found.mean()) < 0.05
    assert 0.95 < found.std() < 1.05
    assert np.mean(found > 2) == pytest.approx(0.023, abs=0.006)


def test_a_counter_that_does_not_move_is_no_news():
    times = 1 + 0.1 * np.random.default_rng(4).normal(size=(2, 16))
    still = Telemetry({COMPUTE: times, Metric.ERRORS: np.zeros((2, 16))}, np.zeros(16, int))
    assert (scores_of(still) == scores_of(of(times))).all()
    assert (scores_of(of(np.zeros((2, 16)), Metric.ERRORS)) == 0).all()


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(float, (3, 7), elements=st.floats(0, 1e6)), st.permutations(range(7)))
def test_scores_go_with_their_ranks_and_stay_within_the_cap(values, order):
    found = scores_of(of(values))
    assert np.abs(found).max() <= CAP
    assert scores_of(of(values[:, order])) == pytest.approx(found[:, order])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({COMPUTE: np.ones((2, 3))}, r"\(2, 3\) for 4 ranks", id="ranks"),
        pytest.param({COMPUTE: np.ones((2, 4)), Metric.ERRORS: np.ones((3, 4))}, "for 4 ranks", id="windows"),
        pytest.param({COMPUTE: -np.ones((2, 4))}, "compute is negative", id="negative"),
    ],
)
def test_telemetry_that_cannot_be_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Telemetry(values, np.zeros(4, int))


def test_a_past_of_other_ranks_is_refused():
    with pytest.raises(ValueError, match="a past of 3 ranks for 4"):
        standardize(of(np.ones((1, 4))), of(np.ones((8, 3))))
