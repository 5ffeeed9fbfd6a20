"""Connected regions of a solution, the most conspicuous first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csgraph

from megatron_flashrecovery.diagnose.gbgp.network import Indices, Vector, adjacency
from megatron_flashrecovery.diagnose.gbgp.objective import Scored
from megatron_flashrecovery.diagnose.gbgp.solver import Problem

_HALF = 0.5


@dataclass(frozen=True, eq=False)
class Region:
    """``entries``: sorted; connected through edges of the blocks and pairs that are joined. ``score``: sum of gains /
    sqrt(number counted): standard normal had the region been chosen without a look at the gains, which it was not."""

    entries: Indices
    score: float


def regions(problem: Problem, x: Vector) -> list[Region]:
    """Of the entries above 0.5: what is less, but not 0, is mostly the slope of the couplings. The objective has to be
    ``Scored``."""
    objective = problem.objective
    if not isinstance(objective, Scored):
        raise ValueError("an objective without gains and counted has no regions")
    chosen = np.flatnonzero(x > _HALF)
    if not chosen.size:
        return []
    edges = np.concatenate((problem.blocks.edges, problem.joined))
    near = adjacency(x.size, edges)[chosen][:, chosen]
    number, part = csgraph.connected_components(near, directed=False)
    gain = np.bincount(part, objective.gains[chosen], number)
    count = np.bincount(part, objective.counted[chosen], number)
    score = gain / np.sqrt(np.maximum(count, 1))
    # A stable sort by part keeps the entries of each in order.
    entries = np.split(chosen[np.argsort(part, kind="stable")], np.cumsum(np.bincount(part))[:-1])
    return [Region(entries[k], float(score[k])) for k in np.argsort(-score, kind="stable")]
