"""Planted regions are found, in the time that is given, and always the same ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.gbgp import (
    Blocks,
    Coupling,
    Ended,
    Limits,
    Network,
    OneRatio,
    Problem,
    Settings,
    SumOfRatios,
    Variant,
    evolving,
    in_processes,
    layered,
    limits,
    network_of_networks,
    regions,
    solve,
)
from megatron_flashrecovery.diagnose.gbgp.greedy import Greedy
from megatron_flashrecovery.diagnose.gbgp.projector import OneByOne
from tests.diagnose.gbgp.small import f_score, grid, line, parts_of


def moving_square(mu=5.0, seed=0, side=12, snapshots=5):
    """A square of 4 by 4 that moves by one column; quiet at the beginning and at the end."""
    truth = np.zeros((snapshots, side, side), dtype=bool)
    for snapshot in range(1, snapshots - 1):
        truth[snapshot, 3:7, 2 + snapshot : 6 + snapshot] = True
    truth = truth.reshape(snapshots, side * side)
    noise = np.random.default_rng(seed).normal(size=truth.shape)
    return evolving(grid(side), noise + mu * truth, 0.01), truth.reshape(-1)


ROUNDS = {Variant.MP: 10, Variant.IHT: 300, Variant.GHTP: 100}


@pytest.mark.parametrize("variant", Variant, ids=lambda variant: variant.value)
def test_a_planted_region_that_moves_is_found(variant):
    found = []
    for seed in range(3):
        problem, truth = moving_square(seed=seed)
        solution = solve(problem, Settings(10, variant, limits=Limits(ROUNDS[variant])))
        best = regions(problem, solution.x)[0]
        found.append(f_score(np.isin(np.arange(truth.size), best.entries), truth))
    assert min(found) > (0.95 if variant is Variant.MP else 0.85)


def test_a_planted_region_of_a_network_in_parts_is_found():
    truth = np.zeros((12, 12), dtype=bool)
    truth[4:8, 3:9] = True
    scores = np.random.default_rng(1).normal(size=144) + 4 * truth.reshape(-1)
    columns = np.arange(144) % 12 // 6
    problem, parts = network_of_networks(grid(12), scores, columns, 0.01)
    solution = solve(problem, Settings(8))
    best = regions(problem, solution.x)[0]
    assert f_score(np.isin(np.arange(144), parts.order[best.entries]), truth.reshape(-1)) > 0.9


def test_the_greedy_projection_finds_it_too():
    problem, truth = moving_square()
    solution = solve(problem, Settings(10), OneByOne(problem.blocks, Greedy()))
    best = regions(problem, solution.x)[0]
    assert f_score(np.isin(np.arange(truth.size), best.entries), truth) > 0.9


def test_what_is_not_measured_connects_what_is():
    """Four devices on each of three hosts: a star each, over a vertex that nothing is measured of, in two moments."""
    star = Network.of(15, [(host, 3 + 4 * host + device) for host in range(3) for device in range(4)])
    blocks = Blocks((star, star))
    measured = np.tile(np.arange(15) >= 3, 2)
    bad = np.tile(np.isin(np.arange(15), [7, 8, 9, 10]), 2)
    scores = np.where(measured, np.random.default_rng(0).normal(size=30) + 4 * bad, 0.0)
    moments = Coupling(np.stack((np.arange(15), np.arange(15, 30)), axis=1), 0.05)
    problem = layered(blocks, scores, measured, [moments])
    solution = solve(problem, Settings(5))
    assert set(np.flatnonzero(solution.x > 0.5)) >= set(np.flatnonzero(bad))
    assert not (solution.x > 0.5)[measured & ~bad].any()
    assert set(np.flatnonzero(solution.hull)) >= {1, 16}


def test_without_couplings_a_sum_of_ratios_is_each_block_by_itself():
    rng = np.random.default_rng(7)
    networks = (grid(6), line(20), grid(4))
    blocks = Blocks(networks)
    gains = rng.normal(size=blocks.size)
    together = solve(Problem(blocks, SumOfRatios(blocks, gains)), Settings((6, 4, 3)))
    alone = [
        solve(Problem(Blocks((network,)), OneRatio(part)), Settings(sparsity))
        for network, part, sparsity in zip(networks, blocks.split(gains), (6, 4, 3), strict=True)
    ]
    assert together.x.tolist() == np.concatenate([each.x for each in alone]).tolist()
    assert together.value == pytest.approx(sum(each.value for each in alone))


def test_couplings_that_are_not_there_change_nothing_and_those_that_are_do():
    problem, _ = moving_square(mu=2.0)
    gains = problem.objective.gains
    none, weak = (
        solve(Problem(problem.blocks, OneRatio(gains, [Coupling(problem.joined, strength)])), Settings(10))
        for strength in (0.0, 0.2)
    )
    assert none.x.tolist() == solve(Problem(problem.blocks, OneRatio(gains)), Settings(10)).x.tolist()

    def apart(solution):
        u, v = problem.joined.T
        return np.square(solution.x[u] - solution.x[v]).sum()

    assert apart(weak) < apart(none)


def test_a_solution_lies_in_connected_sets_and_its_value_is_that_of_its_best_round():
    problem, _ = moving_square(mu=1.5, seed=3)
    solution = solve(problem, Settings(10))
    assert ((solution.x >= 0) & (solution.x <= 1)).all()
    assert not solution.x[~solution.hull].any()
    for network, part in zip(problem.blocks.networks, problem.blocks.split(solution.hull), strict=True):
        assert parts_of(network, np.flatnonzero(part)) <= 1
    assert solution.value == problem.objective.value(solution.x) == max(solution.trace)


@pytest.mark.parametrize("variant", Variant, ids=lambda variant: variant.value)
def test_processes_find_exactly_what_one_finds(variant):
    problem, _ = moving_square()
    settings = Settings(10, variant, limits=Limits(5))
    with in_processes(problem.blocks, 2) as projector:
        spread = [solve(problem, settings, projector) for _ in range(2)]
    alone = solve(problem, settings)
    for each in spread:
        assert each.x.tolist() == alone.x.tolist()
        assert each.trace == alone.trace


class Watched(OneByOne):
    """Keeps what it is asked to project."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.asked = []

    def project(self, side, vectors, models, deadline):
        self.asked.append((side, np.concatenate(vectors)))
        return super().project(side, vectors, models, deadline)


def test_the_head_is_sought_only_where_a_step_stays_in_the_box():
    problem, _ = moving_square()
    watched = Watched(problem.blocks)
    solve(problem, Settings(10, limits=Limits(rounds=2)), watched)
    (_, _), (_, raised), (side, slope), (_, _) = watched.asked
    assert side == "head"
    assert (raised == 1).any()
    assert not (slope[raised == 1] > 0).any()
    assert not (slope[raised == 0] < 0).any()


def test_rounds_are_limited():
    problem, _ = moving_square()
    solution = solve(problem, Settings(10, Variant.IHT, limits=Limits(rounds=4)))
    assert len(solution.trace) == 4
    assert solution.ended is Ended.ROUNDS
    with pytest.raises(ValueError, match="no round"):
        Limits(rounds=0)


def test_a_solution_that_does_not_move_any_more_has_converged():
    problem, _ = moving_square()
    solution = solve(problem, Settings(10, limits=Limits(rounds=100)))
    assert solution.ended is Ended.CONVERGED
    assert len(solution.trace) < 20


def test_without_time_nothing_is_found_and_with_some_the_best_so_far(monkeypatch):
    problem, _ = moving_square()
    settings = Settings(10, Variant.IHT, limits=Limits(rounds=100_000, seconds=0.0))
    late = solve(problem, settings)
    assert late.ended is Ended.SECONDS
    assert not late.x.any()
    assert late.trace == ()
    # Every look at the clock takes a second.
    ticks = itertools.count()
    monkeypatch.setattr(limits.time, "monotonic", lambda: float(next(ticks)))
    settings = Settings(10, Variant.IHT, limits=Limits(rounds=100_000, seconds=500.0))
    some = solve(problem, settings)
    assert some.ended is Ended.SECONDS
    assert next(ticks) <= 510
    assert 1 <= len(some.trace) < 500
    assert some.value == max(some.trace)


def test_the_time_is_limited_in_other_processes_too():
    problem, _ = moving_square()
    with in_processes(problem.blocks, 2) as projector:
        late = solve(problem, Settings(10, limits=Limits(seconds=0.0)), projector)
    assert late.ended is Ended.SECONDS


def test_where_nothing_is_gained_nothing_is_found():
    problem = Problem(Blocks((grid(4),)), OneRatio(-np.ones(16)))
    solution = solve(problem, Settings(4))
    assert not solution.x.any()
    assert regions(problem, solution.x) == []


class Broken:
    def value(self, x):
        return float(x.sum())

    def gradient(self, x):
        return x[:2] if x.size == 4 else np.full(x.size, np.nan)


@pytest.mark.parametrize("vertices", [4, 5])
def test_an_objective_that_is_broken_is_named(vertices):
    with pytest.raises(ValueError, match="gradient of the objective"):
        solve(Problem(Blocks((line(vertices),)), Broken()), Settings(2))


def test_sparsities_are_one_for_each_block():
    problem, _ = moving_square()
    with pytest.raises(ValueError, match="2 sparsities for 5 blocks"):
        solve(problem, Settings((3, 4)))
    with pytest.raises(ValueError, match="nothing can be found"):
        solve(problem, Settings(0))


def test_regions_are_connected_over_blocks_and_the_highest_score_comes_first():
    blocks = Blocks((line(4), line(4)))
    joined = np.array([(0, 4)])
    problem = Problem(blocks, OneRatio([3, 1, 0, 9, 2, 9, 9, 0]), joined)
    x = np.array([1, 0.6, 0.5, 1, 0.9, 0.1, 1, 0])
    found = regions(problem, x)
    assert [region.entries.tolist() for region in found] == [[3], [6], [0, 1, 4]]
    assert [region.score for region in found] == pytest.approx([9, 9, 6 / np.sqrt(3)])
    with pytest.raises(ValueError, match="without gains"):
        regions(Problem(blocks, Broken()), x)
