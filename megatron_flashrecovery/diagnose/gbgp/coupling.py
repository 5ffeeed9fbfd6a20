"""Couplings: pairs of vertices that are expected to belong to the anomaly together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from megatron_flashrecovery.diagnose.gbgp.network import Edges, adjacency, tidy


@dataclass(frozen=True, eq=False)
class Coupling:
    """Pairs of entries, shape (m, 2), and what a difference between the two of a pair costs: ``strength`` * (x_u -
    x_v)^2. Pairs of another kind are another coupling."""

    pairs: Edges
    strength: float

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"the strength of a coupling is at least 0, not {self.strength}")


def laplacian(size: int, couplings: Sequence[Coupling]) -> sparse.csr_array:
    """The CSR matrix L, (size, size), with x'Lx = the sum of what all pairs cost. A pair counts once in each coupling
    that names it, in whichever order."""
    total = sparse.csr_array((size, size))
    for coupling in couplings:
        near = adjacency(size, tidy(size, coupling.pairs))
        total = total + coupling.strength * (sparse.diags_array(near.sum(axis=0)) - near)
    return total.tocsr()


def in_succession(vertices: int, snapshots: int) -> Edges:
    """Each vertex with itself in the next snapshot, where the blocks are snapshots of one network."""
    earlier = np.arange(vertices * (snapshots - 1), dtype=np.int64)
    return np.stack((earlier, earlier + vertices), axis=1)
