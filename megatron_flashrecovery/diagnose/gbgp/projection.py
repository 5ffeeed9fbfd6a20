"""What a projection is: the best connected part of a vector, or almost."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util
from typing import Protocol

import numpy as np

from megatron_flashrecovery.diagnose.gbgp.limits import Deadline
from megatron_flashrecovery.diagnose.gbgp.network import Indices, Network, Vector

_FLOOR = 1e-13
"""A prize below this part of the largest one counts as 0. PCST code does not end on prizes near 1e-300."""


@dataclass(frozen=True)
class Model:
    """The sets that are looked for: at most ``sparsity`` vertices in at most ``trees`` connected parts.

    A projection may return more vertices than that: up to ``head_size`` and ``tail_size``. With one tree these are
    2s - 1 and 2.5s - 1.5, so choose half the size that is expected.
    """

    sparsity: int
    trees: int = 1

    def __post_init__(self) -> None:
        if self.sparsity < 1 or self.trees < 1:
            raise ValueError(f"nothing can be found with {self}")

    @property
    def edges(self) -> int:
        """Those of the largest forest that spans such a set."""
        return max(self.sparsity - self.trees, 0)

    @property
    def head_size(self) -> int:
        return self._size(2)

    @property
    def tail_size(self) -> int:
        return self._size(2.5)

    def _size(self, factor: float) -> int:
        return int(factor * self.edges) + min(self.sparsity, self.trees)


class Projection(Protocol):
    """Both return vertices, sorted, in at most ``model.trees`` connected parts of ``network``; none for a vector of
    zeros. Raises ``OutOfTime``."""

    def head(self, network: Network, vector: Vector, model: Model, deadline: Deadline) -> Indices:
        """Keeps much: at most ``model.head_size`` vertices, whose part of ``vector`` is large."""

    def tail(self, network: Network, vector: Vector, model: Model, deadline: Deadline) -> Indices:
        """Loses little: at most ``model.tail_size`` vertices, outside of which ``vector`` is small."""


def best_available() -> Projection:
    """Over Steiner trees if ``pcst_fast`` is installed (the extra ``diagnose``), else the greedy one."""
    # Here: neither should be imported for the other.
    if util.find_spec("pcst_fast") is not None:
        from megatron_flashrecovery.diagnose.gbgp.steiner import SteinerTrees

        return SteinerTrees()
    from megatron_flashrecovery.diagnose.gbgp.greedy import Greedy

    return Greedy()


def prizes_of(network: Network, vector: Vector) -> Vector:
    """Squares, the largest one 1; all 0 for a vector of zeros. ``ValueError`` if one is not finite."""
    if vector.shape != (network.vertices,):
        raise ValueError(f"{vector.size} entries for {network.vertices} vertices")
    largest = np.abs(vector).max()
    if not np.isfinite(largest):
        raise ValueError("an entry of the vector to project is not finite")
    if largest == 0:
        return np.zeros(network.vertices)
    prizes = np.square(vector / largest)
    return np.where(prizes < _FLOOR, 0.0, prizes)


def largest(prizes: Vector, count: int) -> Indices:
    """At most ``count`` vertices of the largest prizes, none of prize 0."""
    order = np.argsort(-prizes, kind="stable")[:count]
    return np.sort(order[prizes[order] > 0])
