"""What the bench makes of answers, and that its cluster is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from bench import localize, planted_faults
from bench.answers import Answer
from bench.generated_cluster import SHAPES, Cluster
from bench.planted_faults import CAP, Fault, Noise
from megatron_flashrecovery.diagnose.elements import Kind

SMALL = SHAPES[0]
CLUSTER = Cluster.of(SMALL, seed=0)


def answer(reaches, ranks):
    return Answer(tuple(reaches), np.array(ranks), True, 0.0)


def test_an_answer_is_judged_by_its_first_elements_and_all_of_its_ranks():
    found = answer([b"host", b"leaf"], [1, 2, 3])
    assert [found.named([b"leaf"], first) for first in (1, 2)] == [0, 1]
    assert found.named([b"leaf", b"power"], 2) == 0.5
    assert found.f(np.array([2, 3, 4])) == pytest.approx(2 / 3)
    assert found.f(np.array([7])) == 0


def test_a_power_domain_cuts_across_leaves():
    topology = CLUSTER.topology
    reach = {
        kind: [set(topology.ranks_of(k)) for k, each in enumerate(topology.elements) if each.kind is kind]
        for kind in (Kind.POWER, Kind.LEAF)
    }
    for domain in reach[Kind.POWER]:
        assert len(domain) == 32
        assert sum(bool(domain & leaf) for leaf in reach[Kind.LEAF]) == 2


@pytest.mark.parametrize("kind", [Kind.DEVICE, Kind.HOST, Kind.LEAF, Kind.PIPELINE])
def test_a_fault_is_in_the_reach_of_its_element(kind):
    fault = planted_faults.of_kind(CLUSTER, kind, 0.5, np.random.default_rng(0))
    assert CLUSTER.topology.elements[fault.element].kind is kind
    assert np.isin(fault.ranks, CLUSTER.topology.ranks_of(fault.element)).all()


@pytest.mark.parametrize("noise", list(Noise))
def test_healthy_scores_are_about_normal_and_capped(noise):
    values = planted_faults.scores(CLUSTER, [], 0.0, 6, noise, np.random.default_rng(0)).values
    assert abs(np.median(values)) < 0.05
    assert np.median(np.abs(values)) == pytest.approx(0.6745, abs=0.05)
    assert np.abs(values).max() <= CAP


def test_a_fault_that_hits_half_of_a_stage_hides_in_part():
    half = Fault(np.arange(32), None)
    values = planted_faults.scores(CLUSTER, [half], 3.0, 6, Noise.NORMAL, np.random.default_rng(0)).values
    assert values[:, :32].mean() < 2


def test_a_topology_that_is_out_of_date_has_the_same_elements_elsewhere():
    wrong = CLUSTER.with_swapped_hosts(0.1, np.random.default_rng(0)).topology
    assert wrong.elements == CLUSTER.topology.elements
    assert wrong.ranks.size == CLUSTER.topology.ranks.size
    assert not np.array_equal(wrong.ranks, CLUSTER.topology.ranks)


def test_what_is_not_known_cannot_be_named():
    fault = planted_faults.of_kind(CLUSTER, Kind.LEAF, 1.0, np.random.default_rng(0))
    partial = localize._believed(CLUSTER, "partial", np.random.default_rng(0))
    assert localize._reach(CLUSTER, partial, fault) is None
    assert localize._reach(CLUSTER, CLUSTER.topology, fault) == fault.ranks.tobytes()
    assert {each.kind for each in localize._believed(CLUSTER, "missing", np.random.default_rng(0)).elements} == {
        Kind.DEVICE,
        Kind.HOST,
    }
