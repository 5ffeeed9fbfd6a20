"""A small generated cluster, and scores of jobs on it in which something is wrong."""

from __future__ import annotations

import numpy as np

from bench import planted_faults
from bench.generated_cluster import Cluster, Shape
from bench.planted_faults import Noise
from megatron_flashrecovery.diagnose.search import Search

CLUSTER = Cluster.of(Shape(512, pipeline=4, leaf=4, spines=2), seed=1)
QUICK = Search(permutations=19, level=0.05, seconds=600.0)


def unknown(seed=0):
    return planted_faults.unknown(CLUSTER, True, np.random.default_rng(seed))


def of_kind(kind, seed=3):
    return planted_faults.of_kind(CLUSTER, kind, 1.0, np.random.default_rng(seed))


def scores_of(*faults, mu=2.0, seed=0, noise=Noise.NORMAL, cluster=CLUSTER):
    return planted_faults.scores(cluster, faults, mu, 6, noise, np.random.default_rng(seed))
