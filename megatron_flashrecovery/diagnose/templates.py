"""The sets of ranks that elements reach, each once, laid out for sums over many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.arrangements import Shuffled
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.topology import Indices, Topology

_AT_ONCE = 1 << 20
"""Scores that are summed up at once: four megabytes stay in a cache."""


KINDS = tuple(Kind)
_NUMBER = {kind: k for k, kind in enumerate(KINDS)}


@dataclass(frozen=True, eq=False)
class Templates:
    """``of_element``: (elements,) the number of the set that each element reaches. Set k holds ``ranks`` from
    ``start[k]`` to ``start[k + 1]``. ``kinds``: (sets,) places in ``KINDS``, of the first element that reaches each."""

    of_element: Indices
    start: Indices
    ranks: Indices
    kinds: Indices

    @classmethod
    def of(cls, topology: Topology, counted: npt.NDArray[np.bool_]) -> Templates:
        """Only ranks that are ``counted``: elements that differ in others only cannot be told apart by them.

        Sets are the same if sums of random numbers of 64 bits over their ranks are: among 40,000 sets there are two
        that differ and have the same sum with probability 4e-11."""
        kept = np.concatenate([[0], np.cumsum(counted[topology.ranks])])
        start, ranks = kept[topology.start], topology.ranks[counted[topology.ranks]]
        signs = np.random.default_rng(0).integers(1 << 64, size=topology.world, dtype=np.uint64)
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(signs[ranks])])
        _, first, which = np.unique(total[start[1:]] - total[start[:-1]], return_index=True, return_inverse=True)
        sizes = np.diff(start)[first]
        own = np.concatenate([[0], np.cumsum(sizes)])
        kinds = np.array([_NUMBER[element.kind] for element in topology.elements], dtype=np.int64)
        return cls(
            of_element=which.astype(np.int64),
            start=own,
            ranks=ranks[np.arange(own[-1]) - np.repeat(own[:-1] - start[first], sizes)],
            kinds=kinds[first],
        )

    @property
    def sizes(self) -> Indices:
        return np.diff(self.start)

    def sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(sets,) of (ranks,); 0 for an empty set. One pass over all members."""
        total = np.concatenate([[0.0], np.cumsum(values[self.ranks])])
        found: npt.NDArray[np.float64] = total[self.start[1:]] - total[self.start[:-1]]
        return found

    def in_batches(self, chosen: Indices) -> Iterator[tuple[Indices, Indices]]:
        """Of these sets, as many of one size as fit: their numbers, and their ranks (sets, size)."""
        sizes = self.sizes[chosen]
        for size in np.unique(sizes):
            yield chosen[sizes == size], self.ranks[self.start[chosen[sizes == size], None] + np.arange(size)]

    def highest(self, chosen: Indices, shuffled: Shuffled, mean: float, counted: int) -> npt.NDArray[np.float64]:
        """(rows,) the highest of the standardized sums of the chosen sets in each row (see ``standardized``)."""
        best = np.full(shuffled.rows, -np.inf)
        for _, members in self.in_batches(chosen):
            size = members.shape[1]
            top = np.full(shuffled.rows, -np.inf, dtype=np.float32)
            step = max(1, _AT_ONCE // (shuffled.rows * size))
            for k in range(0, len(members), step):
                np.maximum(top, shuffled[members[k : k + step]].sum(axis=1).max(axis=0), out=top)
            np.maximum(best, standardized(top, size, mean, counted), out=best)
        return best


def standardized(
    sums: npt.NDArray[np.floating], sizes: Indices | int, mean: float, counted: int
) -> npt.NDArray[np.float64]:
    """How far sums over ``sizes`` of ``counted`` scores are from what their ``mean`` makes of a random set, in standard
    deviations if scores have one of 1: N(0, 1) for large sets, and the contrast to all others. Sizes below
    ``counted``."""
    found: npt.NDArray[np.float64] = (sums - sizes * mean) / np.sqrt(sizes * (1 - sizes / counted))
    return found
