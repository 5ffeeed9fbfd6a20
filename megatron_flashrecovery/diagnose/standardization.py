"""Scores from telemetry: each metric against peers or a rank's own past, then all metrics in one number.

Peers are the ranks of the same role in the same window, so whatever changes for all of them (a larger batch) does not
count. z = (x - median of the peers) / s, where s is 1.4826 times the median deviation over all windows of the role, and
at least the floor of the metric (``telemetry.NATURE``). One scale for all windows: a window that happens to be quiet
does not make small things large. The median bears that less than half of the peers are hit; a fault that hits half of a
role or more is not seen by this.

A median among two or three says nothing of who is to blame. Where a role has fewer than four ranks, a rank is compared
with its own past (eight windows at least, which also give the spread) and with what has become of all such ranks
meanwhile; such ranks are exchangeable with each other whatever their role. Without a past they have no score.

Several metrics: the largest z of m counts, as what it is worth among m: F^-1(F(z)^m), F the normal distribution. If all
is well and the metrics are independent that is N(0, 1) again, and less if they are not. A counter that did not move, as
with all others, is no news, and none of the m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.scores import CAP, Scores
from megatron_flashrecovery.diagnose.telemetry import NATURE, Metric, Nature, Telemetry

Floats = npt.NDArray[np.float64]
FEWEST_PEERS = 4
FEWEST_WINDOWS = 8
"""Of a past, as for the slow-rank alarm (``core.slowness``)."""
_NORMAL = 1.4826
_ENOUGH = 32
"""Deviations that tell a spread by themselves; with fewer it is at least that over all roles."""
_OF_A_WHOLE = 2.0
"""Counts vary more than Poisson numbers do: 0 and 2, or 100 and 140, are hardly apart then. With 1, somebody was blamed
at p <= 0.01 in 16 of 300 healthy jobs of 32 hosts with 0.3 errors each on average, and in 40 of those whose rates
differ by a gamma distribution of the shape 0.3; with 2 in none, and 2 of 250. It also finds more, for scores are cut
off, and the others are closer together."""
_NOTHING = 1e-9
_GRID = np.linspace(-CAP, CAP, 1201)


@dataclass(frozen=True, eq=False)
class Standardized:
    """``scores``: all metrics in one. ``z``: of each metric, capped, NaN where it has none; ``usual``: what it was
    compared with, in the unit of the metric; both (windows, ranks). ``telemetry``: what they are made of."""

    scores: Scores
    z: Mapping[Metric, Floats]
    usual: Mapping[Metric, Floats]
    telemetry: Telemetry


def standardize(telemetry: Telemetry, past: Telemetry | None = None, is_whole: bool = False) -> Standardized:
    """``past``: earlier windows of the same ranks, for those without enough peers. ``is_whole``: a count is one over
    all the time, so no other window says how far such counts are apart by nature. O(windows * ranks log ranks).

    Raises ``ValueError`` if the past is one of another number of ranks."""
    if past is not None and past.roles.shape != telemetry.roles.shape:
        raise ValueError(f"a past of {past.roles.size} ranks for {telemetry.roles.size}: they have to be the same")
    shape = (telemetry.windows, telemetry.roles.size)
    labels, role, sizes = np.unique(telemetry.roles, return_inverse=True, return_counts=True)
    has_peers = (sizes >= FEWEST_PEERS)[role]
    strata = np.where(has_peers, role, labels.size)
    z, usual, is_news = {}, {}, {}
    for metric, values in telemetry.values.items():
        nature, before = NATURE[metric], None if past is None else past.values.get(metric)
        expected, distances = np.full(shape, np.nan), np.full((0, shape[1]), np.nan)
        for own in (np.flatnonzero(role == k) for k in np.flatnonzero(sizes >= FEWEST_PEERS)):
            expected[:, own] = _median(values[:, own], axis=1)[:, None]
        if before is not None and not has_peers.all():
            expected[:, ~has_peers] = _from_past(values[:, ~has_peers], before[:, ~has_peers], nature)
            distances = _comparable(before, nature) - _median(_comparable(before, nature), axis=0)
        deviation = _comparable(values, nature) - _comparable(expected, nature)
        distances = np.vstack([np.where(has_peers, deviation, np.nan), np.where(has_peers, np.nan, distances)])
        if nature.is_count and is_whole:
            nature = replace(nature, absolute=_OF_A_WHOLE)
        spread, scale = _scales(distances, _comparable(expected, nature), strata, nature)
        z[metric], usual[metric] = np.clip(deviation / scale, -CAP, CAP), expected
        is_news[metric] = np.isfinite(deviation) & ((spread > 0) | (deviation != 0))
    return Standardized(Scores(_combined(z, is_news, shape), strata), z, usual, telemetry)


def _from_past(values: Floats, before: Floats, nature: Nature) -> Floats:
    """(windows, ranks) what each rank used to have, times what has become of all."""
    known = np.isfinite(before).sum(axis=0) >= FEWEST_WINDOWS
    usual = np.where(known, _median(before, axis=0), np.nan)
    drift = np.ones(len(values))
    if not nature.is_count and known.sum() >= FEWEST_PEERS:
        change = _median(values / np.where(usual > 0, usual, np.nan), axis=1)
        drift = np.where(np.isfinite(change), change, 1.0)
    return drift[:, None] * usual


def _comparable(values: Floats, nature: Nature) -> Floats:
    return 2 * np.sqrt(values + 0.375) if nature.is_count else values


def _scales(
    distances: Floats, expected: Floats, strata: npt.NDArray[np.int64], nature: Nature
) -> tuple[Floats, Floats]:
    """(ranks,) the spread of each rank's stratum by (any, ranks) distances to what was usual, and what deviations are
    divided by."""
    level = _median(expected, axis=0)
    over_all = _NORMAL * _over(np.abs(distances) / np.where(level > _NOTHING, level, np.nan))
    spread = np.zeros(strata.size)
    scale = np.zeros(strata.size)
    for label in np.unique(strata):
        own = np.flatnonzero(strata == label)
        near = np.abs(distances[:, own])
        spread[own] = np.nan_to_num(_NORMAL * _over(near))
        scale[own] = np.fmax(spread[own], over_all * level[own] if np.isfinite(near).sum() < _ENOUGH else 0.0)
    return spread, np.fmax(np.fmax(scale, nature.relative * level), nature.absolute)


def _over(values: Floats) -> float:
    """The median of everything."""
    return float(_median(values.reshape(-1, 1), axis=0)[0])


def _combined(
    z: Mapping[Metric, Floats], is_news: Mapping[Metric, npt.NDArray[np.bool_]], shape: tuple[int, int]
) -> Floats:
    highest, number, is_measured = np.full(shape, -np.inf), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for metric, each in z.items():
        highest = np.where(is_news[metric], np.fmax(highest, each), highest)
        number += is_news[metric]
        is_measured |= np.isfinite(each)
    found = np.where(is_measured, 0.0, np.nan)
    for m in range(1, len(z) + 1):
        chosen = number == m
        found[chosen] = np.interp(highest[chosen], _GRID, _GRID if m == 1 else _highest_of(m))
    return found


def _highest_of(m: int) -> Floats:
    """On the grid: z as the highest of m, in terms of one."""
    normal = NormalDist()
    # From the upper tail: 1 - (1 - q)^m, which is exact where F is 1 to all digits.
    tails = -np.expm1(m * np.log1p(-np.array([normal.cdf(-z) for z in _GRID])))
    return np.clip([-normal.inv_cdf(min(max(q, 1e-300), 1 - 1e-16)) for q in tails], -CAP, CAP)


def _median(values: Floats, axis: int) -> Floats:
    """As ``numpy.nanmedian``, which is twenty times slower; NaN where there is nothing."""
    ordered = np.moveaxis(np.sort(values, axis=axis), axis, 0)
    number = np.isfinite(ordered).sum(axis=0)
    if not len(ordered):
        return np.full(ordered.shape[1:], np.nan)
    low, high = np.maximum(number - 1, 0) // 2, number // 2
    take = np.minimum(np.array([low, high]), len(ordered) - 1)
    found = np.take_along_axis(ordered, take, axis=0).mean(axis=0)
    return np.where(number > 0, found, np.nan)
