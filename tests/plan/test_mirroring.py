"""Second copies are elsewhere, evenly spread, and beside peers where that costs nothing."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.layout import megatron_layout
from megatron_flashrecovery.core.mirroring import NoHost, Placement, place_mirrors, ring


def peers_of(groups):
    return {Rank(rank): tuple(group) for group in groups for rank in group}


def nodes(*sizes):
    names = [NodeId(f"n{at}") for at, size in enumerate(sizes) for _ in range(size)]
    return {Rank(rank): name for rank, name in enumerate(names)}


@st.composite
def jobs(draw):
    """Any ranks per node, in any order, and any partition into data-parallel groups."""
    node_of = nodes(*draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)))
    order = draw(st.permutations(list(node_of)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(order) - 1)))))
    bounds = [0, *[cut for cut in cuts if cut < len(order)], len(order)]
    groups = [order[start:end] for start, end in itertools.pairwise(bounds)]
    return peers_of(groups), node_of


@given(jobs(), st.sampled_from(["node", "process"]))
@settings(max_examples=500)
def test_any_job_of_two_ranks_has_balanced_hosts_in_other_domains(job, failure_domain):
    peers, node_of = job
    placement = place_mirrors(peers, node_of, failure_domain)
    if len(node_of) == 1:
        assert isinstance(placement, NoHost)
        return
    assert isinstance(placement, Placement)
    assert placement.host_of.keys() == node_of.keys()
    assert all(guest != host for guest, host in placement.host_of.items())
    largest = max(Counter(node_of.values()).values())
    elsewhere = len(node_of) - largest
    across = elsewhere > 0 and (failure_domain == "node" or largest <= elsewhere)
    if across:
        assert all(node_of[guest] != node_of[host] for guest, host in placement.host_of.items())
    fewest = max(1, -(-largest // elsewhere)) if across else 1
    assert max(Counter(placement.host_of.values()).values()) == fewest


@given(jobs())
def test_a_host_is_a_peer_wherever_every_group_can_close_its_own_ring(job):
    peers, node_of = job
    rings = {group: ring(group, node_of.__getitem__) for group in set(peers.values())}
    if all(rings.values()):
        placement = place_mirrors(peers, node_of)
        assert isinstance(placement, Placement)
        assert placement.host_of == {guest: host for pairs in rings.values() for guest, host in pairs.items()}
        assert all(host in peers[guest] for guest, host in placement.host_of.items())


def test_one_node_is_a_ring_of_peers_with_a_warning():
    placement = place_mirrors(peers_of(megatron_layout(8, tensor=2, pipeline=2).groups("dp")), nodes(8))
    assert isinstance(placement, Placement)
    assert placement.host_of[Rank(5)] == 7
    assert "node of the first" in placement.warnings[0]


def test_peers_that_share_a_node_are_hosted_on_another_one():
    placement = place_mirrors(peers_of([(0, 1), (2, 3)]), nodes(2, 2))
    assert isinstance(placement, Placement)
    assert placement.warnings == ()
    assert {guest // 2 != host // 2 for guest, host in placement.host_of.items()} == {True}


def test_an_odd_group_is_a_ring_of_three():
    placement = place_mirrors(peers_of([(0, 1, 2)]), nodes(1, 1, 1))
    assert placement == Placement({Rank(0): Rank(1), Rank(1): Rank(2), Rank(2): Rank(0)})


def test_without_peers_any_other_node_does_and_the_whole_state_is_said_to_be_mirrored():
    placement = place_mirrors(peers_of([(0,), (1,)]), nodes(1, 1))
    assert isinstance(placement, Placement)
    assert placement.host_of == {0: 1, 1: 0}
    assert "no data-parallel peer" in placement.warnings[0]


def test_a_crowded_node_is_shared_out_evenly_with_a_warning():
    placement = place_mirrors(peers_of([(0, 4), (1, 5), (2,), (3,)]), nodes(4, 2))
    assert isinstance(placement, Placement)
    assert Counter(placement.host_of[Rank(rank)] for rank in range(4)) == {4: 2, 5: 2}
    assert placement.host_of[Rank(0)] == 4
    assert any("keep 2 guests" in warning for warning in placement.warnings)


def test_a_single_rank_has_no_host_and_is_told_why():
    placement = place_mirrors({Rank(0): (Rank(0),)}, nodes(1))
    assert isinstance(placement, NoHost)
    assert "one rank" in placement.reason


@pytest.mark.parametrize("size", [4800])
def test_a_large_job_is_placed_in_a_blink(size):
    layout = megatron_layout(size, tensor=8, pipeline=4)
    node_of = {Rank(rank): NodeId(f"n{rank // 8}") for rank in range(size)}
    placement = place_mirrors(peers_of(layout.groups("dp")), node_of)
    assert isinstance(placement, Placement)
    assert placement.warnings == ()
