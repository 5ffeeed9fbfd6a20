"""What GBGP makes of a cluster: causes that no element stands for, and nothing of noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench.generated_cluster import Cluster, Shape
from bench.planted_faults import Noise
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.regions import find_regions
from megatron_flashrecovery.diagnose.search import Look, Search
from tests.diagnose.faulty import CLUSTER, QUICK, of_kind, scores_of, unknown
from tests.diagnose.gbgp.small import f_score

RANKS = np.arange(CLUSTER.shape.devices)


def found_in(scores, topology=CLUSTER.topology, search=QUICK):
    regions = find_regions(topology, scores, search).regions
    ranks = np.concatenate([np.empty(0, dtype=np.int64), *(region.ranks for region in regions)])
    assert np.unique(ranks).size == ranks.size
    return ranks


def test_a_cause_that_no_element_stands_for_is_found():
    fault = unknown()
    searched = find_regions(CLUSTER.topology, scores_of(fault), QUICK)
    assert searched.regions[0].p == 1 / 20
    found = np.concatenate([region.ranks for region in searched.regions])
    assert f_score(np.isin(RANKS, found), np.isin(RANKS, fault.ranks)) > 0.8
    assert searched.cut_off is None


def test_two_faults_at_once_are_found():
    faults = of_kind(Kind.HOST), of_kind(Kind.LEAF)
    found = found_in(scores_of(*faults, seed=1))
    assert all(np.isin(fault.ranks, found).mean() > 0.8 for fault in faults)


def test_where_no_host_is_known_ranks_are_looked_at():
    known = CLUSTER.known(frozenset({Kind.DEVICE, Kind.NIC, Kind.LEAF}))
    fault = of_kind(Kind.LEAF)
    assert np.isin(fault.ranks, found_in(scores_of(fault), known)).mean() > 0.3


def test_ranks_that_are_not_measured_are_in_no_region():
    fault = unknown()
    scores = scores_of(fault)
    scores.values[:, fault.ranks[:4]] = np.nan
    found = found_in(scores)
    assert found.size
    assert not np.isin(fault.ranks[:4], found).any()


def test_the_same_seed_gives_the_same_regions():
    search = dataclasses.replace(QUICK, permutations=4, level=0.2)
    first, again = (find_regions(CLUSTER.topology, scores_of(unknown()), search) for _ in range(2))
    assert first.regions
    assert [(r.p, r.ranks.tolist()) for r in first.regions] == [(r.p, r.ranks.tolist()) for r in again.regions]


def test_nothing_can_be_significant_before_the_time_that_is_over_and_that_is_said():
    search = dataclasses.replace(QUICK, seconds=1e-9)
    searched = find_regions(CLUSTER.topology, scores_of(unknown()), search)
    assert (searched.regions, searched.permutations) == ((), 0)
    assert searched.cut_off == "stopped after 0 of 19 permutations, at 1e-09 s"


def test_too_few_permutations_for_a_level_are_refused():
    with pytest.raises(ValueError, match="can prove nothing"):
        Search(permutations=9, level=0.05)


@pytest.mark.parametrize("noise", list(Noise))
def test_noise_is_reported_no_more_often_than_agreed(noise):
    cluster = Cluster.of(Shape(128, pipeline=2, leaf=4, spines=2), seed=0)
    search = dataclasses.replace(QUICK, permutations=4, level=0.2, hosts=Look(sparsities=(2,), most=10))
    reported = sum(
        bool(find_regions(cluster.topology, scores_of(mu=0.0, seed=k, noise=noise, cluster=cluster), search).regions)
        for k in range(40)
    )
    # 8 are expected; with probability 0.999 it is from 1 to 17.
    assert 1 <= reported <= 17
