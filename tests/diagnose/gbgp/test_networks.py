"""Networks, cuts and couplings."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.gbgp import Blocks, Coupling, Network, cut, in_succession
from megatron_flashrecovery.diagnose.gbgp.coupling import laplacian
from tests.diagnose.gbgp.small import grid, line


def edges_of(edges):
    return {tuple(sorted(edge)) for edge in edges.tolist()}


def test_loops_and_repeated_edges_are_dropped():
    assert Network.of(3, [(1, 0), (0, 1), (2, 2), (2, 1)]).edges.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("edges", [[(0, 3)], [(-1, 0)]])
def test_an_edge_to_nowhere_is_refused(edges):
    with pytest.raises(ValueError, match="an end outside of 0 to 2"):
        Network.of(3, edges)


def test_a_cut_loses_no_edge():
    whole = grid(5)
    labels = np.random.default_rng(0).integers(3, size=25)
    parts = cut(whole, labels)
    back = edges_of(parts.order[parts.blocks.edges]) | edges_of(parts.order[parts.between])
    assert back == edges_of(whole.edges)
    assert len(parts.blocks.edges) + len(parts.between) == len(whole.edges)
    for k in range(3):
        assert set(labels[parts.order[parts.blocks.block_of == k]]) == {k}
    assert all(labels[u] != labels[v] for u, v in parts.order[parts.between].tolist())
    assert list(parts.uncut(parts.order.astype(float))) == list(range(25))


def test_parts_without_a_vertex_are_left_out_and_labels_are_counted():
    assert [network.vertices for network in cut(line(4), [7, 7, 2, 2]).blocks.networks] == [2, 2]
    with pytest.raises(ValueError, match="3 labels for 4 vertices"):
        cut(line(4), [0, 0, 1])


def test_a_vector_is_split_where_the_blocks_meet():
    blocks = Blocks((line(2), line(3)))
    assert [part.tolist() for part in blocks.split(np.arange(5.0))] == [[0, 1], [2, 3, 4]]
    assert blocks.edges.tolist() == [[0, 1], [2, 3], [3, 4]]
    with pytest.raises(ValueError, match="at least one block"):
        Blocks(())


def test_a_coupling_costs_the_squares_of_differences_each_pair_once():
    x = np.array([1.0, 0.25, 0.5, 0.0])
    near = Coupling(np.array([(0, 1), (1, 0)]), 2.0)
    far = Coupling(np.array([(0, 3), (1, 2), (2, 2)]), 0.5)
    expected = 2 * 0.75**2 + 0.5 * (1 + 0.25**2)
    assert x @ (laplacian(4, [near, far]) @ x) == pytest.approx(expected)
    with pytest.raises(ValueError, match="strength"):
        Coupling(near.pairs, -1.0)


def test_snapshots_in_succession():
    assert in_succession(2, 3).tolist() == [[0, 2], [1, 3], [2, 4], [3, 5]]
    assert in_succession(2, 1).shape == (0, 2)
