"""Which elements have unusual ranks in their reach, and whether that is more than chance.

For each element the scores in its reach are summed up and contrasted with those of all others: S = (sum - n mean) /
sqrt(n (1 - n / N)), for all windows, their newest third, and so on. Of nested elements the one that is to blame has the
highest S: with half of the ranks unusual it is less by sqrt(2), and S^2 / 2 is the logarithm of the likelihood ratio of
a shift. Nothing is assumed of the scores but that ranks of a stratum are alike if all is well:

- of a single rank, or few, it is asked whether they stand out from the tail of the others (``standing_out``). That is
  a question of how much: where they are says nothing, for any rank is an element.
- of sums over several ranks it is asked whether such scores come together in one element by chance: the highest S of
  all elements and lengths is compared with the highest in other arrangements of the scores (``arrangements``). That
  is a question of where, and it finds many that are each no more than a little unusual.

Each gets half of the level. Ranks may differ for good (a slower part, a warmer rack) more than windows let expect, and
so may hosts more than ranks: both spreads are measured over all elements of a kind, and S is divided by them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.arrangements import arrange
from megatron_flashrecovery.diagnose.scores import CAP, Scores
from megatron_flashrecovery.diagnose.standing_out import p_of_highest
from megatron_flashrecovery.diagnose.templates import KINDS, Templates, standardized
from megatron_flashrecovery.diagnose.topology import Indices, Topology
from megatron_flashrecovery.diagnose.trial import Trial

Floats = npt.NDArray[np.float64]
_NORMAL = 1.4826
_ENOUGH = 8
"""Fewer have no spread that could be measured."""
_DEVIATION = 1.16
"""Of the spread of n values from N(0, 1), times sqrt(n)."""
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Scanned:
    """``score``, ``p``, ``length``: (elements,). ``score``: S, -inf where nothing in reach or nothing outside of it is
    measured. ``p``: the probability that a healthy job has an element as conspicuous. ``length``: the windows that S
    is highest in, as an index into ``summed``: (lengths, ranks), about N(0, 1), NaN where nothing is measured.
    ``independent``: (lengths,) how many independent windows the sums are worth, by how far ranks are apart in them.
    ``reach``: which elements reach the same measured ranks."""

    score: Floats
    p: Floats
    length: Indices
    summed: Floats
    independent: Floats
    reach: Templates

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """(ranks,) whether anything of it is measured."""
        return np.isfinite(self.summed).any(axis=0).reshape(-1)


def scan(topology: Topology, scores: Scores, trial: Trial) -> Scanned:
    """Milliseconds for the scores of 10,000 ranks; the rows of ``trial`` cost more, in proportion to rows * members.

    Raises ``ValueError`` if scores are not those of the ranks of this topology."""
    found = contrast(topology, scores, trial)
    counted = found.counted
    if not counted.any():
        return found
    summed = np.where(np.isfinite(found.summed), found.summed, 0.0)
    strata = np.where(counted, scores.strata, -1)
    long = [k for k, length in enumerate(trial.lengths(len(scores.values))) if length >= trial.fewest]
    p = np.minimum(_p_of_standing_out(found, summed, counted, long), _p_of_sums(found, summed, counted, strata, trial))
    return replace(found, p=np.minimum(1.0, 2 * p)[found.reach.of_element])


def contrast(topology: Topology, scores: Scores, trial: Trial) -> Scanned:
    """As ``scan``, without p: it is 1 for all. Raises ``ValueError`` likewise."""
    if scores.values.shape[1:] != (topology.world,) or scores.strata.shape != (topology.world,):
        raise ValueError(f"scores of shape {scores.values.shape} for {topology.world} ranks: one column for each")
    lengths = trial.lengths(len(scores.values))
    sums = [_summed(scores.values, length) for length in lengths]
    summed = np.array([values for values, _ in sums]).reshape(-1, topology.world)
    counted = np.isfinite(summed).any(axis=0)
    reach = Templates.of(topology, counted)
    score = np.full((max(1, len(lengths)), reach.sizes.size), -np.inf)
    if counted.any():
        neutral = np.where(np.isfinite(summed), summed, 0.0)
        score = _spread_out(np.array([_contrasts(reach, each, counted) for each in neutral]), reach)
    which = reach.of_element
    return Scanned(
        score=score.max(axis=0)[which],
        p=np.ones(which.size),
        length=score.argmax(axis=0)[which],
        summed=summed,
        independent=np.array([worth for _, worth in sums]),
        reach=reach,
    )


def _summed(values: Floats, length: int) -> tuple[Floats, float]:
    """(ranks,) of (windows, ranks): the newest windows of each rank as one deviation, in units of the ranks' spread;
    and how many independent windows that is worth."""
    newest = np.clip(values[-length:], -CAP, CAP)
    number = np.isfinite(newest).sum(axis=0)
    total = np.where(number > 0, np.nansum(newest, axis=0) / np.sqrt(np.maximum(number, 1)), np.nan)
    spread = max(1.0, _spread(total[number > 0]))
    return total / spread, length / spread**2


def _spread(values: Floats) -> float:
    if values.size < _ENOUGH:
        return 1.0
    return _NORMAL * float(np.median(np.abs(values - np.median(values))))


def _contrasts(templates: Templates, values: Floats, counted: npt.NDArray[np.bool_]) -> Floats:
    """(sets,) S, of sets that have an inside and an outside."""
    number, sizes = int(counted.sum()), templates.sizes
    has_both = (sizes > 0) & (sizes < number)
    safe = np.where(has_both, sizes, 1)
    found = standardized(templates.sums(values), safe, float(values[counted].mean()), max(number, 2))
    return np.where(has_both, found, -np.inf)


def _spread_out(score: Floats, templates: Templates) -> Floats:
    """(lengths, sets) S in units of the spread of its kind, where that is more than noise makes it. What is made of
    other hardware (a leaf of hosts) has at least their spread: there may be too few of it to measure its own."""
    found = score.copy()
    spread_below = np.ones(len(score))
    usable = (templates.sizes > 1) & np.isfinite(score[0])
    for number, kind in enumerate(KINDS):
        chosen = np.flatnonzero(usable & (templates.kinds == number))
        if not chosen.size:
            continue
        own = np.array([_spread(each[chosen]) / (1 + _DEVIATION / np.sqrt(chosen.size)) for each in score])
        own = np.maximum(1.0, own)
        if kind.is_hardware:
            own = spread_below = np.maximum(own, spread_below)
        found[:, chosen] /= own[:, None]
    return found


def _p_of_standing_out(found: Scanned, summed: Floats, counted: npt.NDArray[np.bool_], long: list[int]) -> Floats:
    """(sets,) 1 unless all of its ranks stand out; all lengths that are ``long`` enough are tried, and paid for."""
    templates = found.reach
    p = np.ones(templates.sizes.size)
    of_rank = np.ones(counted.size)
    for k in long:
        claimed = p_of_highest(summed[k, counted], float(found.independent[k])) * len(long)
        of_rank[counted] = np.minimum(of_rank[counted], claimed)
    filled = templates.sizes > 0
    p[filled] = np.maximum.reduceat(of_rank[templates.ranks], templates.start[:-1][filled])
    return p


def _p_of_sums(
    found: Scanned, summed: Floats, counted: npt.NDArray[np.bool_], strata: npt.NDArray[np.int64], trial: Trial
) -> Floats:
    """(sets,) 1 for sets of one rank."""
    templates = found.reach
    own = np.full(templates.sizes.size, -np.inf)
    own[templates.of_element] = found.score
    chosen = np.flatnonzero((templates.sizes > 1) & np.isfinite(own))
    p = np.ones(own.size)
    if chosen.size:
        rows = arrange(strata, trial.rows, np.random.default_rng(trial.seed))
        highest = np.full(trial.rows, -np.inf)
        for values in summed:
            mean = float(values[counted].mean())
            parts = [templates.highest(chosen, part, mean, int(counted.sum())) for part in rows.of(values)]
            np.maximum(highest, np.concatenate(parts), out=highest)
        at_least = trial.rows - np.searchsorted(np.sort(highest), own[chosen] - _ROUNDING, side="left")
        p[chosen] = np.maximum(at_least, 1) / trial.rows
    return p
