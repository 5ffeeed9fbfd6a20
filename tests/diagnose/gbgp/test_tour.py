"""The best stretch of a forest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.gbgp import Network
from megatron_flashrecovery.diagnose.gbgp.tour import best_stretch
from tests.diagnose.gbgp.small import parts_of


def random_forest(rng, vertices, trees):
    """Each vertex behind the first ``trees`` hangs on an earlier one."""
    parents = [(v, int(rng.integers(v))) for v in range(trees, vertices)]
    relabel = rng.permutation(vertices)
    return relabel[np.array(parents, dtype=np.int64).reshape(-1, 2)]


@pytest.mark.parametrize("trees", [1, 3])
def test_a_stretch_is_connected_within_its_budget_and_holds_its_share(trees):
    rng = np.random.default_rng(1)
    for _ in range(300):
        vertices = int(rng.integers(trees, 40))
        edges = random_forest(rng, vertices, trees)
        prizes, steps = rng.exponential(size=vertices), int(rng.integers(1, 15))
        found = best_stretch(prizes, edges, steps)
        parts = parts_of(Network.of(vertices, edges), found)
        assert list(found) == sorted(set(found.tolist()))
        assert parts <= trees
        assert found.size - parts <= steps
        assert prizes[found].sum() >= prizes.sum() / math.ceil((2 * len(edges) + 1) / (steps + 1)) - 1e-12


def test_the_way_between_two_branches_belongs_to_the_stretch():
    star_of_lines = np.array([(0, 1), (1, 2), (0, 3), (3, 4)])
    found = best_stretch(np.array([0.0, 0.0, 5.0, 0.0, 5.0]), star_of_lines, 4)
    assert list(found) == [0, 1, 2, 3, 4]
