"""Whether a region is more than the best that noise has to offer: p-values from permuted scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.gbgp.network import Indices, Vector
from megatron_flashrecovery.diagnose.gbgp.projector import Projector
from megatron_flashrecovery.diagnose.gbgp.region import Region, regions
from megatron_flashrecovery.diagnose.gbgp.solver import Problem, Settings, solve


@dataclass(frozen=True)
class Trial:
    """Regions are reported at p <= ``level``; no p is less than 1 / (``permutations`` + 1)."""

    permutations: int = 99
    level: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level * (self.permutations + 1) < 1:
            raise ValueError(f"{self.permutations} permutations can prove nothing at the level of {self.level}: more!")


@dataclass(frozen=True, eq=False)
class Found:
    """``p``: the probability that scores without structure have a region as conspicuous, anywhere."""

    region: Region
    p: float


def detect(
    build: Callable[[Vector], Problem],
    scores: Vector,
    strata: npt.ArrayLike,
    settings: Sequence[Settings],
    trial: Trial,
    projector: Projector | None = None,
) -> list[Found]:
    """The regions that are significant, by p; none for noise in 1 - level of all cases.

    ``build``: the problem for scores of any shape. ``strata``: a label for each score; permutations exchange scores
    inside a label, so give one for each group of vertices and kind of measurement that are alike when healthy.
    ``settings``: several sparsities, say; the choice among them is paid for in p, and the regions are those of
    the best. Costs (permutations + 1) * len(settings) solutions. With limits in seconds p depends on the machine.
    """
    rng = np.random.default_rng(trial.seed)
    ours = [_regions_of(build(scores), each, projector) for each in settings]
    noise = [
        [_highest(_regions_of(build(other), each, projector)) for each in settings]
        for other in (permuted(scores, strata, rng) for _ in range(trial.permutations))
    ]
    calibration = Calibration(np.array([[_highest(each) for each in ours], *noise]))
    found = [Found(region, calibration.p(calibration.best, region.score)) for region in ours[calibration.best]]
    return [each for each in found if each.p <= trial.level]


class Calibration:
    """What a value is worth that is one of several statistics, given all of them for what noise could have made.

    ``values``: (rows, statistics); the first row is observed. All rows are treated alike, so the p of what is observed
    is exact if rows are exchangeable, and choosing the best statistic is paid for.
    """

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        self._ordered = np.sort(values, axis=0)
        ranks = np.array([[self._rank(k, value) for k, value in enumerate(row)] for row in values])
        self._best_ranks = ranks.min(axis=1)
        self._middle = np.median(values, axis=0)
        self._spread = np.maximum(np.median(np.abs(values - self._middle), axis=0), np.finfo(float).tiny)
        self.best = self.best_of(values[0])

    def best_of(self, row: npt.ArrayLike) -> int:
        """The statistic that is most conspicuous in a row: by how few rows have as much, and where their number cannot
        tell, by how far it is above them."""
        values = np.asarray(row, dtype=np.float64)
        ranks = [self._rank(k, value) for k, value in enumerate(values)]
        return int(np.lexsort(((self._middle - values) / self._spread, ranks))[0])

    def p(self, statistic: int, value: float) -> float:
        """Of a value of that statistic, not above the one that was observed."""
        return float(np.mean(self._best_ranks <= self._rank(statistic, value)))

    def _rank(self, statistic: int, value: float) -> int:
        """How many rows have at least this much."""
        column = self._ordered[:, statistic]
        return int(column.size - np.searchsorted(column, value, side="left"))


def permuted(scores: Vector, strata: npt.ArrayLike, rng: np.random.Generator) -> Vector:
    """The scores in their shape, exchanged at random inside each label."""
    labels = np.asarray(strata).reshape(-1)
    if labels.size != scores.size:
        raise ValueError(f"{labels.size} labels for {scores.size} scores: give one for each")
    return scores.reshape(-1)[exchange(labels, rng)].reshape(scores.shape)


def exchange(labels: npt.NDArray[np.int64], rng: np.random.Generator) -> Indices:
    """(size,) for each place the one whose value it gets, which has the same label."""
    place = np.argsort(labels, kind="stable")
    found = np.empty(labels.size, dtype=np.int64)
    found[place] = np.lexsort((rng.random(labels.size), labels))
    return found


def _regions_of(problem: Problem, settings: Settings, projector: Projector | None) -> list[Region]:
    return regions(problem, solve(problem, settings, projector).x)


def _highest(found: Sequence[Region]) -> float:
    return found[0].score if found else 0.0
