"""The scan blames the element whose reach is unusual, and nobody if all is well."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.scan import scan
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.trial import Trial
from tests.diagnose.clusters import number_of, topology_of

TOPOLOGY = topology_of()
QUICK = Trial(level=0.1, rows=20)


def noise(seed, windows=4, topology=TOPOLOGY):
    return np.random.default_rng(seed).normal(size=(windows, topology.world))


def scanned(values, trial=Trial(), topology=TOPOLOGY):  # noqa: B008
    return scan(topology, Scores(values, np.zeros(topology.world, dtype=np.int64)), trial)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(Kind.DEVICE, "n5/3", id="device"),
        pytest.param(Kind.NIC, "n5/mlx5_1", id="NIC"),
        pytest.param(Kind.HOST, "n5", id="host"),
        pytest.param(Kind.LEAF, "leaf1", id="leaf"),
        pytest.param(Kind.SPINE, "spine1", id="spine"),
        pytest.param(Kind.POWER, "pdu5", id="power"),
        pytest.param(Kind.TENSOR, "44-47", id="tensor"),
        pytest.param(Kind.PIPELINE, "5-101/32", id="pipeline"),
        pytest.param(Kind.DATA, "35-63/4", id="data"),
    ],
)
def test_an_element_of_every_kind_is_found(kind, name):
    values = noise(1)
    number = number_of(TOPOLOGY, kind, name)
    values[:, TOPOLOGY.ranks_of(number)] += 5 if kind in (Kind.DEVICE, Kind.NIC) else 3
    found = scanned(values)
    assert TOPOLOGY.elements[int(found.score.argmax())] == Element(kind, name)
    assert found.p[number] <= 0.001


def test_a_score_is_the_contrast_of_those_in_reach_to_all_others():
    values = np.zeros((1, TOPOLOGY.world))
    values[0, :4] = 2.0
    found = scanned(values, QUICK)
    host = number_of(TOPOLOGY, Kind.HOST, "n0")
    assert found.score[host] == pytest.approx((8 - 8 * 8 / 128) / np.sqrt(8 * (1 - 8 / 128)))


def test_healthy_jobs_are_blamed_for_something_at_the_agreed_rate():
    blamed = sum(scanned(noise(seed, 2), Trial(0.1, 40, seed)).p.min() <= 0.1 for seed in range(300))
    # 30 are agreed. Standing out is rare in normal noise, so 15 are expected from sums alone, 4 to 28 with 0.999.
    assert 4 <= blamed <= 28


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda rng: rng.standard_t(3, size=(4, 128)), id="heavy tails"),
        pytest.param(lambda rng: np.cumsum(rng.normal(size=(4, 128)), axis=0), id="windows that depend on each other"),
        pytest.param(lambda rng: rng.normal(size=(4, 128)) + 2 * rng.normal(size=128), id="ranks that differ for good"),
    ],
)
def test_noise_that_is_neither_normal_nor_independent_blames_nobody_more_often(draw):
    rng = np.random.default_rng(9)
    blamed = sum(scanned(draw(rng), Trial(0.1, 40, seed)).p.min() <= 0.1 for seed in range(100))
    # 10 are agreed, up to 20 happen with probability 0.999.
    assert blamed <= 20


def test_what_reaches_everybody_or_nobody_measured_cannot_be_blamed():
    topology = topology_of(hosts=8)  # one spine
    values = noise(2, topology=topology)
    values[:, :8] = np.nan
    found = scanned(values, QUICK, topology)
    for kind, name in ((Kind.SPINE, "spine0"), (Kind.HOST, "n0")):
        assert found.score[number_of(topology, kind, name)] == -np.inf
        assert found.p[number_of(topology, kind, name)] == 1


def test_nothing_measured_blames_nobody():
    found = scanned(np.full((3, TOPOLOGY.world), np.nan), QUICK)
    assert set(found.p) == {1.0}
    assert set(scanned(np.empty((0, TOPOLOGY.world)), QUICK).p) == {1.0}


def test_a_fault_that_has_just_begun_is_seen_in_the_newest_windows():
    values = noise(4, 8)
    values[-2:, 40:48] += 3
    found = scanned(values)
    host = number_of(TOPOLOGY, Kind.HOST, "n5")
    assert found.score.argmax() == host
    assert Trial().lengths(8)[found.length[host]] == 2


@pytest.mark.parametrize("windows", [1, 2])
def test_one_or_two_windows_blame_no_single_rank(windows):
    values = noise(6, windows)
    values[:, 43] = 6
    assert scanned(values).p[number_of(TOPOLOGY, Kind.DEVICE, "n5/3")] == 1


def test_what_is_all_of_a_stratum_has_nobody_to_be_compared_with():
    values = noise(5)
    values[:, 32:64] += 5
    found = scan(TOPOLOGY, Scores(values, np.arange(128) // 32), Trial())
    assert found.p[number_of(TOPOLOGY, Kind.LEAF, "leaf1")] == 1


def test_the_same_scores_and_seed_give_the_same():
    first, second = scanned(noise(3)), scanned(noise(3))
    assert (first.p == second.p).all()
    assert (first.score == second.score).all()


def test_scores_of_other_ranks_are_refused():
    with pytest.raises(ValueError, match="one column for each"):
        scanned(np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        pytest.param({"level": 0.001, "rows": 999}, "at least 2 / level", id="few rows"),
        pytest.param({"windows": (0,)}, "at least 1", id="no window"),
    ],
)
def test_a_trial_that_can_prove_nothing_is_refused(trial, words):
    with pytest.raises(ValueError, match=words):
        Trial(**trial)


def test_lengths_are_powers_of_two_and_all_there_are():
    assert Trial().lengths(30) == (1, 3, 10, 30)
    assert Trial(windows=(3, 9)).lengths(6) == (3, 6)
    assert Trial().lengths(0) == ()
