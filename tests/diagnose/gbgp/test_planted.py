"""The generators of the bench: what they plant is what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench import planted
from megatron_flashrecovery.diagnose.gbgp import cut
from tests.diagnose.gbgp.small import parts_of


def test_the_supports_of_an_evolving_network_are_connected_and_overlap_by_half():
    made = planted.evolving(mu=3, seed=1)
    supports = [np.flatnonzero(row) for row in made.truth]
    assert [support.size for support in supports] == [0, 100, 200, 300, 200, 100, 0]
    for earlier, later in itertools.pairwise(supports[1:6]):
        assert parts_of(made.network, later) == 1
        shared = np.intersect1d(earlier, later).size
        assert shared >= min(earlier.size, later.size) // 2
    assert len(made.network.edges) == 3 * (3000 - 3)
    assert made.scores[made.truth].mean() == pytest.approx(3, abs=0.15)
    assert made.scores[~made.truth].mean() == pytest.approx(0, abs=0.05)


def test_a_walk_is_connected_and_as_long_as_asked():
    made = planted.static(500, 3, 50, mu=5, seed=2)
    assert made.truth.sum() == 50
    assert parts_of(made.network, np.flatnonzero(made.truth)) == 1


def test_a_seed_makes_the_same_again_and_another_one_something_else():
    one, again, other = (planted.static(200, 3, 20, 5, seed) for seed in (1, 1, 2))
    assert one.scores.tolist() == again.scores.tolist()
    assert one.network.edges.tolist() == again.network.edges.tolist()
    assert one.scores.tolist() != other.scores.tolist()


def test_parts_are_of_about_the_same_size():
    network = planted.preferential(600, 3, seed=0)
    sizes = [part.vertices for part in cut(network, planted.parts(network, 6)).blocks.networks]
    assert len(sizes) == 6
    assert min(sizes) > 80
