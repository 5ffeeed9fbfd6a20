"""What GBGP makes of a cluster: causes that no element stands for, and nothing of noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench import planted_faults
from bench.generated_cluster import Cluster, Shape
from bench.planted_faults import Fault, Noise
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.regions import find_regions
from megatron_flashrecovery.diagnose.search import Look, Search
from tests.diagnose.gbgp.small import f_score

CLUSTER = Cluster.of(Shape(512, pipeline=4, leaf=4, spines=2), seed=1)
QUICK = Search(permutations=39, level=0.025, seconds=60.0)
HEALTHY = Fault(np.empty(0, dtype=np.int64), None)


def scores_of(faults, mu, seed, noise=Noise.NORMAL, cluster=CLUSTER):
    return planted_faults.scores(cluster, faults, mu, 6, noise, np.random.default_rng(seed))


def f_of(searched, *faults):
    ranks = np.arange(CLUSTER.shape.devices)
    found = [region.ranks for region in searched.regions]
    return f_score(np.isin(ranks, np.concatenate([[-1], *found])), np.isin(ranks, [f.ranks for f in faults]))


def test_a_cause_that_no_element_stands_for_is_found():
    fault = planted_faults.unknown(CLUSTER, True, np.random.default_rng(0))
    searched = find_regions(CLUSTER.topology, scores_of([fault], 2.0, seed=0), QUICK)
    assert searched.regions[0].p == 1 / 40
    assert f_of(searched, fault) > 0.8
    assert searched.cut_off is None


def test_two_faults_at_once_are_found():
    faults = [planted_faults.of_kind(CLUSTER, kind, 1.0, np.random.default_rng(3)) for kind in (Kind.HOST, Kind.LEAF)]
    searched = find_regions(CLUSTER.topology, scores_of(faults, 2.0, seed=1), QUICK)
    found = np.concatenate([region.ranks for region in searched.regions])
    assert np.unique(found).size == found.size
    assert np.isin(faults[0].ranks, found).mean() > 0.8
    assert np.isin(faults[1].ranks, found).mean() > 0.8


def test_the_same_seed_gives_the_same_regions():
    scores = scores_of([planted_faults.unknown(CLUSTER, True, np.random.default_rng(0))], 2.0, seed=0)
    first, again = (find_regions(CLUSTER.topology, scores, QUICK) for _ in range(2))
    assert first.regions
    assert [(r.p, r.ranks.tolist()) for r in first.regions] == [(r.p, r.ranks.tolist()) for r in again.regions]


@pytest.mark.parametrize("noise", list(Noise))
def test_noise_is_reported_no_more_often_than_agreed(noise):
    cluster = Cluster.of(Shape(128, pipeline=2, leaf=4, spines=2), seed=0)
    search = dataclasses.replace(QUICK, permutations=4, level=0.2, hosts=Look(sparsities=(2,), most=10))
    seeds = range(40)
    reported = sum(
        bool(find_regions(cluster.topology, scores_of([], 0.0, seed, noise, cluster), search).regions) for seed in seeds
    )
    # 8 are expected; with probability 0.999 it is from 1 to 17.
    assert 1 <= reported <= 17
