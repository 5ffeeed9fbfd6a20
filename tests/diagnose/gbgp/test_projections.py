"""Head and tail against every admissible set of small networks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.gbgp import Model, Network, best_available, projection
from megatron_flashrecovery.diagnose.gbgp.greedy import Greedy
from megatron_flashrecovery.diagnose.gbgp.limits import Deadline, OutOfTime
from megatron_flashrecovery.diagnose.gbgp.steiner import SteinerTrees
from tests.diagnose.gbgp.small import all_sets, line, parts_of, random_network, random_vector

NO_DEADLINE = Deadline()
HEAD, TAIL = 1 / 4.3, 5.4
"""Squares of the constants that `steiner` claims; the published ones are 1/14 and 7."""
BOTH = [pytest.param(SteinerTrees(), id="steiner"), pytest.param(Greedy(), id="greedy")]
SIDES = ["head", "tail"]


def project(projection, side, network, vector, model):
    return getattr(projection, side)(network, np.asarray(vector, dtype=float), model, NO_DEADLINE)


def cases(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        network = random_network(rng)
        model = Model(int(rng.integers(1, 7)), int(rng.integers(1, 3)))
        yield network, random_vector(rng, network.vertices), model


@pytest.mark.parametrize("trees", [1, 2])
def test_head_and_tail_keep_what_they_promise_of_the_best_set(trees):
    worst_head, worst_tail = 1.0, 1.0
    for network, vector, drawn in cases(150):
        model = Model(drawn.sparsity, trees)
        energy = np.square(vector)
        most = max(energy[list(chosen)].sum() for chosen in all_sets(network, model.sparsity, trees))
        head = energy[project(SteinerTrees(), "head", network, vector, model)].sum()
        lost = energy.sum() - energy[project(SteinerTrees(), "tail", network, vector, model)].sum()
        rounding = 1e-9 * energy.sum()
        assert head >= HEAD * most - rounding
        assert lost <= TAIL * (energy.sum() - most) + rounding
        worst_head = min(worst_head, head / most if most else 1.0)
        worst_tail = max(worst_tail, lost / (energy.sum() - most + rounding) if most else 1.0)
    # Much better than promised, on networks of this size at least: a bug would show here first.
    assert worst_head > 0.7
    assert worst_tail < 1.5


@pytest.mark.parametrize("tried", BOTH)
@pytest.mark.parametrize("side", SIDES)
def test_what_is_found_is_connected_and_no_larger_than_promised(tried, side):
    for network, vector, model in cases(200):
        found = project(tried, side, network, vector, model)
        assert found.dtype == np.int64
        assert list(found) == sorted(set(found.tolist()))
        assert found.size <= (model.head_size if side == "head" else model.tail_size)
        assert parts_of(network, found) <= model.trees


def test_the_sizes_are_those_of_the_documents():
    assert (Model(150).head_size, Model(150).tail_size) == (299, 373)
    assert (Model(1).head_size, Model(1).tail_size) == (1, 1)
    assert (Model(3, trees=5).head_size, Model(10, trees=4).head_size) == (3, 16)


@pytest.mark.parametrize("tried", BOTH)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        pytest.param([0.0, 0.0, 0.0, 0.0], [], id="zeros"),
        pytest.param([0.0, 0.0, 3.0, 0.0], [2], id="one-entry"),
        pytest.param([1.0, 1e-160, 1e-160, 1e-160], [0], id="prizes-that-pcst-does-not-end-on"),
        pytest.param([1e-300, 1e-300, 0.0, 0.0], [0, 1], id="tiny-all-over"),
        pytest.param([1e300, -1e300, 0.0, 0.0], [0, 1], id="squares-that-overflow"),
        pytest.param([1.0, 0.0, 0.0, 1.0], [0, 1, 2, 3], id="through-vertices-without-a-prize"),
    ],
)
def test_vectors_at_the_edge(tried, side, vector, expected):
    assert list(project(tried, side, line(4), vector, Model(4))) == expected


@pytest.mark.parametrize("tried", BOTH)
@pytest.mark.parametrize("side", SIDES)
def test_without_edges_the_largest_entry_remains(tried, side):
    alone = Network.of(5, [])
    assert list(project(tried, side, alone, [1.0, 2.0, -7.0, 3.0, 0.0], Model(3))) == [2]
    assert list(project(tried, side, Network.of(1, []), [0.5], Model(3))) == [0]


@pytest.mark.parametrize("tried", BOTH)
@pytest.mark.parametrize("side", SIDES)
def test_two_trees_reach_two_places(tried, side):
    vector = np.zeros(60)
    vector[[3, 4, 5, 50, 51, 52]] = 1
    found = project(tried, side, line(60), vector, Model(6, trees=2))
    assert set(found) >= {3, 4, 5, 50, 51, 52}
    assert len(project(tried, side, line(60), vector, Model(6))) < 20


@pytest.mark.parametrize("tried", BOTH)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", [[1.0, math.nan], [math.inf, 1.0], [1.0, 2.0, 3.0]])
def test_what_cannot_be_projected_is_refused(tried, side, vector):
    with pytest.raises(ValueError, match=r"not finite|entries for"):
        project(tried, side, line(2), vector, Model(2))


@pytest.mark.parametrize("tried", BOTH)
@pytest.mark.parametrize("side", SIDES)
def test_a_deadline_ends_a_projection(tried, side):
    with pytest.raises(OutOfTime):
        getattr(tried, side)(line(9), np.arange(9.0), Model(4), Deadline(at=0.0))


def test_the_greedy_one_takes_over_where_the_library_is_missing(monkeypatch):
    assert best_available() == SteinerTrees()
    monkeypatch.setattr(projection.util, "find_spec", lambda _: None)
    assert best_available() == Greedy()
