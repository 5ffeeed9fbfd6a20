"""Networks whose vertices and edges are numbers, and the blocks that a problem is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

Vector: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Edges: TypeAlias = npt.NDArray[np.int64]
"""Shape (m, 2): each row the two ends of one edge."""


@dataclass(frozen=True, eq=False)
class Network:
    """An undirected graph over the vertices 0 to ``vertices`` - 1. Build it with ``of``, which tidies the edges."""

    vertices: int
    edges: Edges

    @staticmethod
    def of(vertices: int, edges: npt.ArrayLike) -> Network:
        """``edges``: (m, 2) integers. Loops and repetitions are dropped; raises ``ValueError`` for ends that do not
        exist."""
        if vertices < 1:
            raise ValueError(f"a network has at least one vertex, not {vertices}: leave an empty block out")
        return Network(vertices, tidy(vertices, edges))

    @cached_property
    def adjacency(self) -> sparse.csr_array:
        """Symmetric CSR matrix of ones, (vertices, vertices)."""
        return adjacency(self.vertices, self.edges)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The networks of a problem, in order. A vector of the problem has one entry for each vertex, block after block."""

    networks: tuple[Network, ...]

    def __post_init__(self) -> None:
        if not self.networks:
            raise ValueError("a problem has at least one block")

    def __len__(self) -> int:
        return len(self.networks)

    @cached_property
    def offsets(self) -> Indices:
        """Shape (blocks + 1,): block k has the entries from ``offsets[k]`` up to ``offsets[k + 1]``."""
        return np.concatenate(([0], np.cumsum([network.vertices for network in self.networks]))).astype(np.int64)

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def block_of(self) -> Indices:
        """Shape (size,): the block of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def split(self, x: Vector) -> Iterator[Vector]:
        """Views of ``x``, one for each block."""
        return (x[self.offsets[k] : self.offsets[k + 1]] for k in range(len(self)))

    @cached_property
    def edges(self) -> Edges:
        """The edges inside the blocks, as entries of a vector of the problem."""
        return np.concatenate([n.edges + first for n, first in zip(self.networks, self.offsets, strict=False)])


@dataclass(frozen=True, eq=False)
class Cut:
    """One network in parts: ``order[i]`` is the vertex of the uncut network that entry i of a vector stands for, and
    ``between`` the edges that were cut, as entries."""

    blocks: Blocks
    order: Indices
    between: Edges

    def uncut(self, x: Vector) -> Vector:
        """``x`` in the order of the uncut network."""
        found = np.empty_like(x)
        found[self.order] = x
        return found


def cut(network: Network, part_of: npt.ArrayLike) -> Cut:
    """``part_of``: shape (vertices,), the part of each vertex, as a partitioner such as METIS gives it. Parts without
    a vertex are left out."""
    labels = np.asarray(part_of)
    if labels.shape != (network.vertices,):
        raise ValueError(f"{labels.size} labels for {network.vertices} vertices: give one for each")
    _, part = np.unique(labels, return_inverse=True)
    order = np.argsort(part, kind="stable").astype(np.int64)
    entry = np.empty_like(order)
    entry[order] = np.arange(order.size)
    ends, ends_part = entry[network.edges], part[network.edges]
    inside = ends_part[:, 0] == ends_part[:, 1]
    sizes = np.bincount(part)
    first = np.concatenate(([0], np.cumsum(sizes)))
    networks = []
    for k, size in enumerate(sizes):
        mine = ends[inside & (ends_part[:, 0] == k)]
        networks.append(Network.of(int(size), mine - first[k]))
    return Cut(Blocks(tuple(networks)), order, tidy(network.vertices, ends[~inside]))


def tidy(vertices: int, edges: npt.ArrayLike) -> Edges:
    """Each edge once, its smaller end first, without loops."""
    found = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if found.size and not (found.min() >= 0 and found.max() < vertices):
        raise ValueError(f"an edge has an end outside of 0 to {vertices - 1}")
    found = np.sort(found, axis=1)
    keys = np.unique(found[:, 0] * vertices + found[:, 1])
    both = np.stack((keys // vertices, keys % vertices), axis=1)
    return np.ascontiguousarray(both[both[:, 0] != both[:, 1]])


def adjacency(vertices: int, edges: Edges) -> sparse.csr_array:
    ones = np.ones(len(edges))
    half = sparse.coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(vertices, vertices))
    return (half + half.T).tocsr()
