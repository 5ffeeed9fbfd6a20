"""Small networks, and everything that can be found in one by trying all."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np

from megatron_flashrecovery.diagnose.gbgp import Network


def random_network(rng: np.random.Generator, most: int = 12) -> Network:
    """Trees, dense ones, and some in several parts."""
    vertices = int(rng.integers(1, most + 1))
    pairs = np.array(list(itertools.combinations(range(vertices), 2))).reshape(-1, 2)
    return Network.of(vertices, pairs[rng.random(len(pairs)) < rng.choice([0.15, 0.3, 0.6])])


def random_vector(rng: np.random.Generator, vertices: int) -> np.ndarray:
    """Dense, sparse, equal entries, and entries that are many powers of ten apart."""
    kind = rng.integers(4)
    noise = rng.normal(size=vertices)
    if kind == 1:
        noise[rng.random(vertices) < 0.6] = 0
    elif kind == 2:
        noise = np.round(noise)
    elif kind == 3:
        noise *= 10.0 ** rng.uniform(-5, 0, size=vertices)
    return noise


def parts_of(network: Network, chosen) -> int:
    graph = nx.Graph()
    graph.add_nodes_from(range(network.vertices))
    graph.add_edges_from(network.edges.tolist())
    return nx.number_connected_components(graph.subgraph([int(v) for v in chosen]))


def all_sets(network: Network, most: int, trees: int) -> list[tuple[int, ...]]:
    """Every set of at most ``most`` vertices in at most ``trees`` connected parts, the empty one first."""
    near = [0] * network.vertices
    for u, v in network.edges.tolist():
        near[u] |= 1 << v
        near[v] |= 1 << u
    found = []
    for size in range(most + 1):
        for chosen in itertools.combinations(range(network.vertices), size):
            if _parts(sum(1 << v for v in chosen), near, trees) <= trees:
                found.append(chosen)
    return found


def _parts(left: int, near: list[int], most: int) -> int:
    count = 0
    while left and count <= most:
        edge = left & -left
        while edge:
            left &= ~edge
            vertex = (edge & -edge).bit_length() - 1
            edge = (edge | near[vertex] & left) & ~(1 << vertex)
        count += 1
    return count


def line(vertices: int) -> Network:
    return Network.of(vertices, [(v, v + 1) for v in range(vertices - 1)])


def grid(side: int) -> Network:
    of = np.arange(side * side).reshape(side, side)
    across = np.stack((of[:, :-1].ravel(), of[:, 1:].ravel()), axis=1)
    down = np.stack((of[:-1].ravel(), of[1:].ravel()), axis=1)
    return Network.of(side * side, np.concatenate((across, down)))


def f_score(chosen: np.ndarray, truth: np.ndarray) -> float:
    both = np.count_nonzero(chosen & truth)
    return 2 * both / (np.count_nonzero(chosen) + np.count_nonzero(truth))
