"""The windows of each rank summed up, and measured against the others: what a region is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.scores import Scores

Values = npt.NDArray[np.float64]
_MAD = 1.4826
_LEAST_SPREAD = 1.0
"""What sums of independent windows have. Windows that depend on each other make it more; many that are equal, as
counters at 0 are, must not make it nothing."""


@dataclass(frozen=True, eq=False)
class Histories:
    """``whole``: (ranks,) over all windows; ``moments``: (moments, ranks) over stretches of them. About N(0, 1) if all
    is well, -inf where nothing was measured."""

    whole: Values
    moments: Values

    @classmethod
    def of(cls, scores: Scores, moments: int) -> Histories:
        """At most as many ``moments`` as there are windows. Sums are compared with those of the same stratum once
        more: how far they spread tells how much windows depend on each other, so that need not be known."""
        parts = np.array_split(scores.values, max(1, min(moments, len(scores.values))))
        return cls(_summed(scores.values, scores.strata), np.stack([_summed(part, scores.strata) for part in parts]))

    def exchanged(self, taken: npt.NDArray[np.int64]) -> Histories:
        """As if rank r had been what ``taken[r]`` was. Histories stay whole."""
        return Histories(self.whole[taken], self.moments[:, taken])

    def without(self, ranks: npt.NDArray[np.int64]) -> Histories:
        whole, moments = self.whole.copy(), self.moments.copy()
        whole[ranks] = -np.inf
        moments[:, ranks] = -np.inf
        return Histories(whole, moments)


def _summed(values: Values, strata: npt.NDArray[np.int64]) -> Values:
    known = np.isfinite(values)
    count = known.sum(axis=0)
    summed = np.where(known, values, 0.0).sum(axis=0) / np.sqrt(np.maximum(count, 1))
    found = np.full(summed.size, -np.inf)
    for stratum in np.unique(strata[count > 0]):
        mine = (strata == stratum) & (count > 0)
        found[mine] = in_units_of_spread(summed[mine])
    return found


def in_units_of_spread(values: Values) -> Values:
    """Deviations from the median, in robust standard deviations."""
    off = values - np.median(values)
    found: Values = off / max(_MAD * float(np.median(np.abs(off))), _LEAST_SPREAD)
    return found
