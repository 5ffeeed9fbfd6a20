"""Networks with a planted anomaly, from the generator settings of the GBGP authors' public code.

A support is what a random walk visits; in an evolving network the next one keeps a connected part of the one before and
grows outwards. Scores are N(mu, 1) on it and N(0, 1) elsewhere. How many edges a new vertex of the evolving networks
brings along is not known of the original; here it is 3, as in its other experiments.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt
import pymetis

from megatron_flashrecovery.diagnose.gbgp import Network

ATTACHMENT = 3
SNAPSHOTS, FIRST, LAST = 7, 1, 5
SMALLEST, LARGEST, OVERLAP = 100, 300, 0.5
VERTICES = 3000


@dataclass(frozen=True, eq=False)
class Planted:
    """``scores`` and ``truth``: (snapshots, vertices), or (vertices,) for one moment."""

    network: Network
    scores: npt.NDArray[np.float64]
    truth: npt.NDArray[np.bool_]


def evolving(mu: float, seed: int) -> Planted:
    """Sizes rise from 100 to 300 vertices and fall back, in snapshots 1 to 5 of 7."""
    rng = np.random.default_rng(seed)
    network = preferential(VERTICES, ATTACHMENT, seed)
    middle = (FIRST + LAST) / 2
    truth = np.zeros((SNAPSHOTS, VERTICES), dtype=bool)
    before: list[int] = []
    for snapshot in range(FIRST, LAST + 1):
        size = round(LARGEST - (LARGEST - SMALLEST) * abs(snapshot - middle) / (middle - FIRST))
        if before:
            kept = min(len(before), size) * OVERLAP
            core = _grown(network, [before[rng.integers(len(before))]], int(kept), rng, set(before))
            before = _grown(network, core, size, rng)
        else:
            before = _walked(network, size, rng)
        truth[snapshot, before] = True
    return Planted(network, rng.normal(size=truth.shape) + mu * truth, truth)


def static(vertices: int, attachment: int, planted: int, mu: float, seed: int) -> Planted:
    rng = np.random.default_rng(seed)
    network = preferential(vertices, attachment, seed)
    truth = np.zeros(vertices, dtype=bool)
    truth[_walked(network, planted, rng)] = True
    return Planted(network, rng.normal(size=vertices) + mu * truth, truth)


def preferential(vertices: int, attachment: int, seed: int) -> Network:
    """Barabasi and Albert: each new vertex joins ``attachment`` others, the likelier the more neighbours they have."""
    return Network.of(vertices, np.array(nx.barabasi_albert_graph(vertices, attachment, seed=seed).edges))


def parts(network: Network, number: int) -> npt.NDArray[np.int64]:
    """The part of each vertex, by METIS."""
    near = network.adjacency
    _, part_of = pymetis.part_graph(number, pymetis.CSRAdjacency(near.indptr.tolist(), near.indices.tolist()))
    return np.array(part_of, dtype=np.int64)


def _walked(network: Network, size: int, rng: np.random.Generator) -> list[int]:
    """A random walk until it has seen ``size`` vertices."""
    at = int(rng.integers(network.vertices))
    seen = {at: None}
    while len(seen) < size:
        at = _neighbour(network, at, rng)
        seen[at] = None
    return list(seen)


def _grown(
    network: Network, core: list[int], size: int, rng: np.random.Generator, inside: set[int] | None = None
) -> list[int]:
    """``core`` and random neighbours of random members, within ``inside`` if there is one, which is connected."""
    found, has = list(core), set(core)
    while len(found) < size:
        reached = _neighbour(network, found[rng.integers(len(found))], rng)
        if reached not in has and (inside is None or reached in inside):
            has.add(reached)
            found.append(reached)
    return found


def _neighbour(network: Network, vertex: int, rng: np.random.Generator) -> int:
    first, last = network.adjacency.indptr[vertex : vertex + 2]
    return int(network.adjacency.indices[rng.integers(first, last)])
