"""A cluster seen in units of ranks, or of hosts: the problem of finding those that are conspicuous together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.gbgp import Ended, Limits, Settings, regions, solve
from megatron_flashrecovery.diagnose.gbgp.limits import OutOfTime
from megatron_flashrecovery.diagnose.histories import Histories, Values, in_units_of_spread
from megatron_flashrecovery.diagnose.layers import Layers, Posed
from megatron_flashrecovery.diagnose.search import Look
from megatron_flashrecovery.diagnose.topology import Indices, Topology


@dataclass(frozen=True, eq=False)
class Part:
    """``ranks``: sorted. ``score``: the sum of what exceeds tau / sqrt(number of units)."""

    ranks: Indices
    score: float


@dataclass(frozen=True, eq=False)
class Candidates:
    """``units``: sorted, those that may be part of something; ``excess``: (units,) by how much each exceeds tau."""

    units: Indices
    excess: Values
    posed: Posed


class Grain:
    """``units``: (world,) the unit of each rank."""

    def __init__(self, topology: Topology, units: Indices, look: Look) -> None:
        self.look = look
        self._unit_of = units
        self._layers = Layers(topology, units)

    def candidates(self, histories: Histories) -> Candidates | None:
        """None if no unit is above tau."""
        look = self.look
        whole = np.minimum(self._of_units(histories.whole), look.cap)
        among = np.argsort(-whole, kind="stable")[: look.most]
        units = np.sort(among[whole[among] > look.tau])
        if not units.size:
            return None
        moments = np.stack([self._of_units(each)[units] for each in histories.moments])
        posed = self._layers.posed(units, np.minimum(moments, look.cap) - look.tau, look.strengths)
        return Candidates(units, whole[units] - look.tau, posed)

    def best(self, candidates: Candidates | None, histories: Histories, sparsity: int, seconds: float) -> Part | None:
        """Raises ``OutOfTime``."""
        if candidates is None:
            return None
        if seconds <= 0:
            raise OutOfTime
        problem, unit_of = candidates.posed.problem, candidates.posed.unit_of
        look = self.look
        solution = solve(problem, Settings(sparsity, limits=Limits(look.rounds, seconds)))
        if solution.ended is Ended.SECONDS:
            raise OutOfTime
        # A unit is part of something if it is so in one layer at one moment, and counts once.
        found = [
            np.unique(unit_of[each.entries]) for each in regions(problem, solution.x, solution.hull & (unit_of < 0))
        ]
        found = [units[units >= 0] for units in found]
        scores = [float(candidates.excess[units].sum() / np.sqrt(units.size)) for units in found]
        if not scores:
            return None
        best = int(np.argmax(scores))
        return Part(self._ranks(candidates.units[found[best]], histories.whole), scores[best])

    def _of_units(self, values: Values) -> Values:
        """(units,) the sum of their ranks as one deviation; -inf where nothing is known."""
        known = np.isfinite(values)
        number = np.bincount(self._unit_of[known], minlength=int(self._unit_of.max()) + 1)
        total = np.bincount(self._unit_of[known], values[known], minlength=number.size)
        found = np.full(number.size, -np.inf)
        measured = number > 0
        found[measured] = in_units_of_spread(total[measured] / np.sqrt(number[measured]))
        return found

    def _ranks(self, units: Indices, whole: Values) -> Indices:
        """Of the ranks of these units those that are conspicuous: the highest, as many as have the best sum /
        sqrt(number)."""
        ranks = np.flatnonzero(np.isin(self._unit_of, units) & np.isfinite(whole))
        if ranks.size == units.size:
            return ranks
        order = ranks[np.argsort(-whole[ranks], kind="stable")]
        worth = np.cumsum(whole[order]) / np.sqrt(np.arange(1, order.size + 1))
        return np.sort(order[: int(np.argmax(worth)) + 1])


def hosts_of(topology: Topology) -> Indices | None:
    """(world,) a number for the host of each rank, ranks without one by themselves; None if no host has two ranks."""
    host = np.full(topology.world, -1, dtype=np.int64)
    for k, element in enumerate(topology.elements):
        if element.kind is Kind.HOST:
            host[topology.ranks_of(k)] = k
    alone = np.flatnonzero(host < 0)
    host[alone] = len(topology.elements) + alone
    _, found = np.unique(host, return_inverse=True)
    return found if int(found.max(initial=-1)) + 1 < topology.world else None
