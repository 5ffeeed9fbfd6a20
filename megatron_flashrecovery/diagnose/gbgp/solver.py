"""GBGP: find in each block the connected part that together score highest.

From x = 0, each round: project the gradient of each block on a connected set (head), raise the objective within these
sets, project what came out on a connected set again (tail). Jie, Wang, Chen, Li, Wu: Block-Structured Optimization for
Subgraph Detection in Interdependent Networks, ICDM 2019. Which of the three variants that paper means is not known
here.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_flashrecovery.diagnose.gbgp.ascent import best_within
from megatron_flashrecovery.diagnose.gbgp.limits import Deadline, Limits, OutOfTime
from megatron_flashrecovery.diagnose.gbgp.network import Blocks, Edges, Indices, Mask, Vector
from megatron_flashrecovery.diagnose.gbgp.objective import Objective
from megatron_flashrecovery.diagnose.gbgp.projection import Model
from megatron_flashrecovery.diagnose.gbgp.projector import OneByOne, Projector, Side

_SMALL = 1e-6
"""Every entry at first, and treated as 0: in 0 itself a ratio has no gradient."""
_PATIENCE, _LITTLE = 3, 1e-6
"""So many rounds in a row that do not raise the best value by this part of it are the last."""


class Variant(enum.Enum):
    """What is done with the head."""

    MP = "mp"
    """Matching pursuit: the objective is raised over the head and the present support."""
    IHT = "iht"
    """Iterative hard thresholding: one gradient step inside the head. Many rounds, and still behind the others."""
    GHTP = "ghtp"
    """Hard thresholding pursuit: the objective is raised over the support that such a step leads to."""


class Ended(enum.Enum):
    CONVERGED = "converged"
    ROUNDS = "rounds"
    SECONDS = "seconds"


@dataclass(frozen=True)
class Settings:
    """``sparsity``: see ``Model``, the same for all blocks or one for each. ``step``: of the gradient, in ``IHT`` and
    ``GHTP``. ``tolerance``: a round that moves x by less, as a norm, is the last."""

    sparsity: int | Sequence[int]
    variant: Variant = Variant.MP
    trees: int = 1
    limits: Limits = field(default_factory=Limits)
    step: float = 1.0
    tolerance: float = 1e-3

    def models(self, blocks: Blocks) -> list[Model]:
        each = [self.sparsity] * len(blocks) if isinstance(self.sparsity, int) else list(self.sparsity)
        if len(each) != len(blocks):
            raise ValueError(f"{len(each)} sparsities for {len(blocks)} blocks: give one number, or one for each")
        return [Model(sparsity, self.trees) for sparsity in each]


@dataclass(frozen=True, eq=False)
class Problem:
    """``joined``: pairs of entries in different blocks that belong together in a region; the solver does not use
    them."""

    blocks: Blocks
    objective: Objective
    joined: Edges = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Solution:
    """``x``: (size,) in [0, 1], the best of all rounds; ``value``: its objective. ``hull``: (size,), the connected sets
    that hold its support; of the sets, what x leaves at 0 only connects. ``trace``: the objective after each round."""

    x: Vector
    value: float
    hull: Mask
    trace: tuple[float, ...]
    ended: Ended
    seconds: float


def solve(problem: Problem, settings: Settings, projector: Projector | None = None) -> Solution:
    """The same arguments give the same solution, whatever the number of processes; unless it runs out of seconds.

    ``projector``: in this process without one. Where not even a round was completed, x is 0. Raises ``ValueError`` for
    sizes that do not fit and for a gradient that is not finite.
    """
    began = time.monotonic()
    search = _Search(problem, settings, projector or OneByOne(problem.blocks))
    deadline = settings.limits.deadline()
    ended = Ended.ROUNDS
    try:
        for number in range(settings.limits.rounds):
            if search.round(number, deadline):
                ended = Ended.CONVERGED
                break
    except OutOfTime:
        ended = Ended.SECONDS
    return Solution(search.best, search.value, search.hull, tuple(search.trace), ended, time.monotonic() - began)


class _Search:
    def __init__(self, problem: Problem, settings: Settings, projector: Projector) -> None:
        self._problem, self._settings, self._projector = problem, settings, projector
        self._models = settings.models(problem.blocks)
        self._x = np.full(problem.blocks.size, _SMALL)
        self.trace: list[float] = []
        self.best = np.zeros_like(self._x)
        self.hull = np.zeros(self._x.size, dtype=bool)
        self.value = problem.objective.value(self.best)
        self._since_better = 0

    def round(self, number: int, deadline: Deadline) -> bool:
        """True if another one would change nothing."""
        support = self._x > (_SMALL if number == 0 else 0)
        slope = self._slope(support)
        head = self._project("head", slope, deadline)
        raised = self._raised(support, slope, head, deadline)
        hull = self._project("tail", raised, deadline)
        before, self._x = self._x, np.where(hull, np.clip(raised, 0.0, 1.0), 0.0)
        self._keep_if_better(hull)
        moved = float(np.linalg.norm(self._x - before))
        return moved < self._settings.tolerance or self._since_better >= _PATIENCE

    def _slope(self, support: Mask) -> Vector:
        """The gradient without what would lead out of the box."""
        slope = self._problem.objective.gradient(self._x)
        if slope.shape != self._x.shape or not np.isfinite(slope).all():
            raise ValueError("the gradient of the objective has not one finite entry for each vertex")
        leads_out = ((self._x >= 1) & (slope > 0)) | (~support & (slope < 0))
        return np.where(leads_out, 0.0, slope)

    def _raised(self, support: Mask, slope: Vector, head: Mask, deadline: Deadline) -> Vector:
        x = np.where(support, self._x, 0.0)
        stepped = x + self._settings.step * np.where(head, slope, 0.0)
        match self._settings.variant:
            case Variant.IHT:
                return stepped
            case Variant.GHTP:
                allowed = stepped > 0
            case Variant.MP:
                allowed = head | support
        return best_within(self._problem.objective, x, allowed, self._settings.limits.ascent_steps, deadline)

    def _project(self, side: Side, vector: Vector, deadline: Deadline) -> Mask:
        blocks = self._problem.blocks
        parts = self._projector.project(side, list(blocks.split(vector)), self._models, deadline)
        found = np.zeros(blocks.size, dtype=bool)
        entries: list[Indices] = [part + first for part, first in zip(parts, blocks.offsets, strict=False)]
        found[np.concatenate(entries)] = True
        return found

    def _keep_if_better(self, hull: Mask) -> None:
        value = self._problem.objective.value(self._x)
        self.trace.append(value)
        self._since_better = 0 if value > self.value + _LITTLE * abs(self.value) else self._since_better + 1
        if value > self.value:
            self.best, self.hull, self.value = self._x, hull, value
