"""Which losses are survived follows from where the copies are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import Placement, place_mirrors
from megatron_flashrecovery.core.survival import survivable


def job(dp, per_node, ranks):
    node_of = {Rank(rank): NodeId(f"n{rank // per_node:02}") for rank in range(ranks)}
    stride = ranks // dp
    peers = {rank: tuple(Rank(other) for other in range(rank % stride, ranks, stride)) for rank in node_of}
    placement = place_mirrors(peers, node_of)
    assert isinstance(placement, Placement)
    return placement, peers, node_of


def fatal(placement, peers, sharded, dead):
    """By definition: the dead ranks' nodes are gone with all they held."""
    for rank in dead:
        group = peers[rank]
        copied_live = not sharded and len(group) > 1
        if placement.host_of[rank] in dead or (copied_live and set(group) <= dead):
            return True
    return False


@given(dp=st.integers(1, 4), per_node=st.integers(1, 4), stride=st.integers(1, 6), sharded=st.booleans())
def test_the_fatal_nodes_and_pairs_are_those_of_the_definition(dp, per_node, stride, sharded):
    ranks = dp * stride
    if ranks < 2:
        return
    placement, peers, node_of = job(dp, per_node, ranks)
    found = survivable(placement, peers, node_of, sharded)
    on = {node: {rank for rank in node_of if node_of[rank] == node} for node in node_of.values()}
    alone = {node for node in on if fatal(placement, peers, sharded, on[node])}
    pairs = [
        pair
        for pair in itertools.combinations(sorted(set(on) - alone), 2)
        if fatal(placement, peers, sharded, on[pair[0]] | on[pair[1]])
    ]
    assert set(found.fatal_nodes) == alone
    assert found.node_pairs.count == len(pairs)
    assert set(found.node_pairs.examples) <= set(pairs)


def test_two_ranks_at_once_are_fatal_only_where_they_are_all_the_peers_of_a_plain_optimizer():
    arrangement = job(dp=2, per_node=2, ranks=4)
    assert survivable(*arrangement, sharded=True).rank_pairs.count == 0
    found = survivable(*arrangement, sharded=False).rank_pairs
    assert (found.count, found.total) == (2, 6)
    assert found.examples == (("rank 0", "rank 2"), ("rank 1", "rank 3"))
