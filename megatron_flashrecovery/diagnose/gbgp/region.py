"""Connected regions of a solution, the most conspicuous first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csgraph

from megatron_flashrecovery.diagnose.gbgp.network import Indices, Mask, Vector, adjacency
from megatron_flashrecovery.diagnose.gbgp.objective import Scored
from megatron_flashrecovery.diagnose.gbgp.solver import Problem

_HALF = 0.5


@dataclass(frozen=True, eq=False)
class Region:
    """``entries``: sorted; connected through edges of the blocks and pairs that are joined. ``score``: sum of gains /
    sqrt(number counted): standard normal had the region been chosen without a look at the gains, which it was not."""

    entries: Indices
    score: float


def regions(problem: Problem, x: Vector, connecting: Mask | None = None) -> list[Region]:
    """Of the entries above 0.5: what is less, but not 0, is mostly the slope of the couplings. The objective has to be
    ``Scored``.

    ``connecting``: (size,) entries that join what is chosen and belong to the region then, chosen or not. What is not
    counted gains nothing, so a solution may leave it at 0 in the middle of a region: its ``hull`` has it."""
    objective = problem.objective
    if not isinstance(objective, Scored):
        raise ValueError("an objective without gains and counted has no regions")
    is_chosen = x > _HALF
    chosen = np.flatnonzero(is_chosen if connecting is None else is_chosen | connecting)
    if not is_chosen.any():
        return []
    edges = np.concatenate((problem.blocks.edges, problem.joined))
    near = adjacency(x.size, edges)[chosen][:, chosen]
    number, part = csgraph.connected_components(near, directed=False)
    gain = np.bincount(part, objective.gains[chosen], number)
    count = np.bincount(part, objective.counted[chosen], number)
    score = gain / np.sqrt(np.maximum(count, 1))
    # A stable sort by part keeps the entries of each in order.
    entries = np.split(chosen[np.argsort(part, kind="stable")], np.cumsum(np.bincount(part))[:-1])
    holds = np.bincount(part, is_chosen[chosen], number) > 0
    return [Region(entries[k], float(score[k])) for k in np.argsort(-score, kind="stable") if holds[k]]
