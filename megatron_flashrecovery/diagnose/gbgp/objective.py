"""What is maximized: elevated-mean scores with a price on differences between coupled vertices.

The score of a set S of independent standard normal values, sum(S) / sqrt(|S|), is standard normal again, whatever the
size; a shift of the mean by mu makes it mu * sqrt(|S|). Its *maximum* over sets grows with their number, so it proves
nothing by itself: ``significance``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy import sparse

from megatron_flashrecovery.diagnose.gbgp.coupling import Coupling, laplacian
from megatron_flashrecovery.diagnose.gbgp.network import Blocks, Indices, Mask, Vector

_LEAST = 1e-12
"""What a sum in a denominator is at least: near x = 0 the gradient points along the gains, and nothing divides by 0."""


class Objective(Protocol):
    """A function over the box [0, 1]^size. Must be finite in all of it."""

    def value(self, x: Vector) -> float: ...

    def gradient(self, x: Vector) -> Vector: ...


@runtime_checkable
class WithStart(Protocol):
    """An objective that knows where an ascent on ``allowed`` entries should begin. Without, it begins at x."""

    def start(self, allowed: Mask) -> Vector: ...


@runtime_checkable
class Scored(Protocol):
    """An objective whose solutions can be taken apart into regions: (size,) the score of each vertex, and (size,) 1
    where there is one, else 0."""

    @property
    def gains(self) -> Vector: ...

    @property
    def counted(self) -> Vector: ...


class OneRatio:
    """(gains'x) / sqrt(counted'x) - x'Lx: one ratio over all blocks, so that those without signal may stay empty."""

    def __init__(
        self, gains: npt.ArrayLike, couplings: Sequence[Coupling] = (), counted: npt.ArrayLike | None = None
    ) -> None:
        """``gains``: (size,), the score of each vertex. ``counted``: (size,) of 0 and 1, all 1 if left out; a vertex
        that nothing is measured of has gain 0 and is not counted."""
        self.gains = _finite(gains)
        self.counted = np.ones_like(self.gains) if counted is None else _finite(counted)
        if self.counted.shape != self.gains.shape:
            raise ValueError(f"{self.counted.size} marks of what is counted for {self.gains.size} gains")
        self._laplacian = laplacian(self.gains.size, couplings)

    def value(self, x: Vector) -> float:
        count = max(float(self.counted @ x), _LEAST)
        return float(self.gains @ x) / math.sqrt(count) - float(x @ (self._laplacian @ x))

    def gradient(self, x: Vector) -> Vector:
        count = max(float(self.counted @ x), _LEAST)
        gain = float(self.gains @ x)
        found: Vector = (self.gains - (0.5 * gain / count) * self.counted) / math.sqrt(count) - 2 * (
            self._laplacian @ x
        )
        return found

    def start(self, allowed: Mask) -> Vector:
        """The best set of the form "the entries of highest gain", couplings included. Without couplings that is the
        maximum over the box: between two such sets the ratio has no maximum."""
        order = _by_gain(self.gains, allowed)
        cost = _cost_of_prefixes(self._laplacian, order, self.gains.size)
        return _best_prefix(self.gains, self.counted, order, cost)


class SumOfRatios:
    """For each block its own gains'x / sqrt(1'x), added up, - x'Lx. Rewards something in *every* block."""

    def __init__(self, blocks: Blocks, gains: npt.ArrayLike, couplings: Sequence[Coupling] = ()) -> None:
        self.gains = _finite(gains)
        if self.gains.size != blocks.size:
            raise ValueError(f"{self.gains.size} gains for {blocks.size} vertices")
        self.counted = np.ones_like(self.gains)
        self._blocks = blocks
        self._laplacian = laplacian(self.gains.size, couplings)

    def value(self, x: Vector) -> float:
        gain, count = self._sums(x)
        return float(np.sum(gain / np.sqrt(count))) - float(x @ (self._laplacian @ x))

    def gradient(self, x: Vector) -> Vector:
        gain, count = self._sums(x)
        block = self._blocks.block_of
        own = (self.gains - (0.5 * gain / count)[block]) / np.sqrt(count)[block]
        found: Vector = own - 2 * (self._laplacian @ x)
        return found

    def start(self, allowed: Mask) -> Vector:
        """In each block the entries of highest gain; without couplings that is the maximum over the box."""
        x = np.zeros_like(self.gains)
        for k in range(len(self._blocks)):
            first, last = self._blocks.offsets[k : k + 2]
            order = first + _by_gain(self.gains[first:last], allowed[first:last])
            x += _best_prefix(self.gains, self.counted, order, np.zeros(order.size))
        return x

    def _sums(self, x: Vector) -> tuple[Vector, Vector]:
        first = self._blocks.offsets[:-1]
        return np.add.reduceat(self.gains * x, first), np.maximum(np.add.reduceat(x, first), _LEAST)


def _finite(values: npt.ArrayLike) -> Vector:
    found = np.array(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(found).all():
        raise ValueError("a gain is not finite: replace what was not measured by 0, and do not count it")
    return found


def _by_gain(gains: Vector, allowed: Mask) -> Indices:
    among = np.flatnonzero(allowed)
    return among[np.argsort(-gains[among], kind="stable")]


def _best_prefix(gains: Vector, counted: Vector, order: Indices, cost: Vector) -> Vector:
    """``cost``: of each prefix of ``order``. All 0 if none is worth more than nothing."""
    x = np.zeros_like(gains)
    if not order.size:
        return x
    worth = np.cumsum(gains[order]) / np.sqrt(np.maximum(np.cumsum(counted[order]), 1)) - cost
    best = int(np.argmax(worth))
    if worth[best] > 0:
        x[order[: best + 1]] = 1
    return x


def _cost_of_prefixes(coupled: sparse.csr_array, order: Indices, size: int) -> Vector:
    """x'Lx for the indicator of each prefix: a pair costs from when its first end is in until its second one is."""
    place = np.full(size, order.size)
    place[order] = np.arange(order.size)
    entries = coupled.tocoo()
    upper = entries.row < entries.col
    strength, ends = -entries.data[upper], np.stack((place[entries.row[upper]], place[entries.col[upper]]))
    change = np.bincount(ends.min(axis=0), strength, order.size + 1) - np.bincount(
        ends.max(axis=0), strength, order.size + 1
    )
    found: Vector = np.cumsum(change)[: order.size]
    return found
