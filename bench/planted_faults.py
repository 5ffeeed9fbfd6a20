"""Scores of a job on a generated cluster in which something is wrong, or nothing.

A rank that is harmed takes ``mu`` standard deviations longer in every window. As in a job, all ranks of a pipeline
stage are then compared with their median and spread, so a fault that reaches many of a stage hides in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from bench.generated_cluster import PER_HOST, Cluster, Indices
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.scores import Scores

CAP = 8.0
"""What a single score is at most, as in what is made of telemetry."""
_MAD = 1.4826


class Noise(StrEnum):
    NORMAL = "normal"
    AUTOCORRELATED = "autocorrelated"
    """Half of a deviation is still there in the next window."""
    HEAVY = "heavy-tailed"
    """Student's t with three degrees of freedom."""


@dataclass(frozen=True, eq=False)
class Fault:
    """``ranks``: those that it harms. ``element``: None for a cause that no topology knows."""

    ranks: Indices
    element: int | None


def of_kind(cluster: Cluster, kind: Kind, part: float, rng: np.random.Generator) -> Fault:
    """``part`` of what a random element of this kind can harm."""
    topology = cluster.topology
    among = [k for k, element in enumerate(topology.elements) if element.kind is kind]
    element = int(rng.choice(among))
    reach = topology.ranks_of(element)
    return Fault(np.sort(rng.choice(reach, size=max(1, round(part * reach.size)), replace=False)), element)


def unknown(cluster: Cluster, adjacent: bool, rng: np.random.Generator) -> Fault:
    """Half of the devices of five hosts: anywhere, or next to each other in the racks, across two leaves."""
    hosts = cluster.shape.hosts
    if adjacent:
        at_place = np.argsort(cluster.place_of)
        leaf = cluster.shape.leaf
        first = leaf * int(rng.integers(1, hosts // leaf)) - 2
        chosen = at_place[first : first + 5]
    else:
        chosen = rng.choice(hosts, size=5, replace=False)
    each = [host * PER_HOST + rng.choice(PER_HOST, size=PER_HOST // 2, replace=False) for host in chosen]
    return Fault(np.sort(np.concatenate(each)).astype(np.int64), None)


def two(cluster: Cluster, kinds: Sequence[Kind], rng: np.random.Generator) -> tuple[Fault, Fault]:
    """Two elements of different kinds that harm nobody in common."""
    while True:
        first, second = rng.choice(len(kinds), size=2, replace=False)
        both = of_kind(cluster, kinds[first], 1.0, rng), of_kind(cluster, kinds[second], 1.0, rng)
        if not np.intersect1d(both[0].ranks, both[1].ranks).size:
            return both


def scores(
    cluster: Cluster, faults: Sequence[Fault], mu: float, windows: int, noise: Noise, rng: np.random.Generator
) -> Scores:
    raw = _noise((windows, cluster.shape.devices), noise, rng)
    for fault in faults:
        raw[:, fault.ranks] += mu
    return Scores(_against_peers(raw, cluster.shape.pipeline), cluster.strata)


def _noise(shape: tuple[int, int], noise: Noise, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    if noise is Noise.HEAVY:
        heavy: npt.NDArray[np.float64] = rng.standard_t(3, size=shape) / np.sqrt(3)
        return heavy
    found = rng.normal(size=shape)
    if noise is Noise.AUTOCORRELATED:
        for window in range(1, shape[0]):
            found[window] = 0.5 * found[window - 1] + np.sqrt(0.75) * found[window]
    return found


def _against_peers(raw: npt.NDArray[np.float64], stages: int) -> npt.NDArray[np.float64]:
    # Stages are as many ranks in a row each.
    peers = raw.reshape(raw.shape[0], stages, -1)
    middle = np.median(peers, axis=2, keepdims=True)
    spread = _MAD * np.median(np.abs(peers - middle), axis=2, keepdims=True)
    found: npt.NDArray[np.float64] = np.clip((peers - middle) / spread, -CAP, CAP).reshape(raw.shape)
    return found
