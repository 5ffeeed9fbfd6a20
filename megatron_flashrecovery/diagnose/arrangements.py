"""Scores as they could have fallen as well: exchanged at random between ranks of the same role.

A rank keeps its windows together, so whatever its scores have to do with those a moment ago is kept too, and nothing
is assumed of their distribution. What has to hold is that all is the same for ranks of the same role if all is well.

The permutations g_1 .. g_m are drawn without looking at the scores, and so is one of them, g_k. The rows are
g_i (g_k^-1 x): row k is what was observed, and if permuted scores have the same distribution, each row is as likely to
be it. So p from the place of row k among all is exact whatever set the g are, no group and no independence is needed
(Ramdas, Barber, Candes, Tibshirani, "Permutation tests using arbitrary permutation distributions", 2023). Therefore
they may be cheap: rotations of a random order of each stratum, as many as its smallest has ranks, then another order.
All rotations of one order are windows into one small array, which is a tenth of the cost of drawing each permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.topology import Indices

_SMALL = 1 << 22
"""Scores, over all rows: so many are stored rather than made in pieces."""


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Some rows of scores. ``windows[begin[rank]]`` are those of a rank."""

    windows: npt.NDArray[np.float32]
    begin: Indices

    def __getitem__(self, ranks: Indices) -> npt.NDArray[np.float32]:
        """(ranks..., rows)"""
        taken: npt.NDArray[np.float32] = self.windows[self.begin[ranks]]
        return taken

    @property
    def rows(self) -> int:
        return int(self.windows.shape[1])


@dataclass(frozen=True, eq=False)
class _Rotations:
    """Of one order: in row b, the rank at place p has the score of ``source[begin + b]``."""

    source: Indices
    begin: Indices
    rows: int


@dataclass(frozen=True, eq=False)
class Arrangements:
    """``observed``: the row that is as it was."""

    rows: int
    observed: int
    _parts: tuple[_Rotations, ...]

    def of(self, values: npt.NDArray[np.float64]) -> Iterator[Shuffled]:
        """All rows of (ranks,) values, in parts."""
        taken = values.astype(np.float32)
        parts = (Shuffled(_windows(taken[each.source], each.rows), each.begin) for each in self._parts)
        if values.size * self.rows > _SMALL:
            yield from parts
        else:
            yield Shuffled(np.hstack([part.windows[part.begin] for part in parts]), np.arange(values.size))


def arrange(strata: npt.NDArray[np.int64], rows: int, rng: np.random.Generator) -> Arrangements:
    """``strata``: (ranks,) those with the same label are exchanged; a label below 0 stays where it is."""
    labels = np.where(strata < 0, strata.max(initial=0) + 1 + np.arange(strata.size), strata)
    sizes = np.unique(labels, return_counts=True)[1]
    begin_of_stratum = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    at_once = int(min(rows, sizes[sizes > 1].min(initial=rows)))
    orders = [np.lexsort((rng.random(labels.size), labels)) for _ in range(0, rows, at_once)]
    observed = int(rng.integers(rows))
    # What is arranged is not what was observed, but what becomes it in that row.
    back = np.empty(labels.size, dtype=np.int64)
    order = orders[observed // at_once]
    place = np.arange(labels.size) - np.repeat(begin_of_stratum, sizes)
    turned = (place - observed % at_once) % np.repeat(sizes, sizes) + np.repeat(begin_of_stratum, sizes)
    back[order] = order[turned]
    parts = [_rotations(back[order], order, sizes, min(at_once, rows - k * at_once)) for k, order in enumerate(orders)]
    return Arrangements(rows, observed, tuple(parts))


def _rotations(scores: Indices, order: Indices, sizes: Indices, rows: int) -> _Rotations:
    """Each stratum is followed by its beginning, so that windows need not turn round."""
    extended = sizes + rows - 1
    stratum = np.repeat(np.arange(sizes.size), extended)
    offset = np.arange(extended.sum()) - np.repeat(np.concatenate([[0], np.cumsum(extended)[:-1]]), extended)
    source = scores[np.concatenate([[0], np.cumsum(sizes)[:-1]])[stratum] + offset % sizes[stratum]]
    begin = np.empty(order.size, dtype=np.int64)
    begin[order] = np.arange(order.size) + np.repeat(np.arange(sizes.size) * (rows - 1), sizes)
    return _Rotations(source, begin, rows)


def _windows(values: npt.NDArray[np.float32], length: int) -> npt.NDArray[np.float32]:
    return np.lib.stride_tricks.sliding_window_view(values, length)
