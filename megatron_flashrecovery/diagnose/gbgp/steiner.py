"""Head and tail projections over prize-collecting Steiner forests.

A prize-collecting Steiner forest leaves out vertices (and loses their prizes) or connects them (and pays for edges).
The method of Goemans and Williamson, ``pcst_fast``, finds in nearly linear time a forest F of at most g trees with

    cost(F) + 2 lam * lost(F)  <=  2 cost(F') + 2 lam * lost(F')     for every forest F' of at most g trees.

Prizes are squares of the vector, every edge costs 1, and ``lam`` is searched so that the cost meets a budget
(Hegde, Indyk, Schmidt: A Nearly-Linear Time Framework for Graph-Structured Sparsity, ICML 2015). Let C = s - g be the
edges of the largest forest that is looked for, and take for F' the best one of them:

- its loss is at least lost(F) - (C - cost(F) / 2) / lam, and its prize at most prize(F) + (C - cost(F) / 2) / lam. Each
  forest gives such a bound, and the search ends early once the best forest at hand is close to it;
- tail: with 2C <= cost(F) <= 2.5 C the loss of F is at most the best. Else two neighbouring values of lam, apart by a
  factor r, have cost < 2C and cost > 2.5 C, and the cheaper one loses at most 1 + 4r times the best: c_T^2 <= 5.4;
- head: a forest with cost(F) <= 2C is returned as it is. Of the next dearer one the best stretch of 2C edges is, and
  the better of both has at least 1 / (3r + 1) of the best prize: c_H^2 >= 1 / 4.3 here.

The published constants are c_T^2 = 7 and c_H^2 = 1 / 14 for any weights. None of them is near the c_H^2 > 1 - 1 / (1 +
c_T)^2 that the theory of convergence asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pcst_fast import pcst_fast

from megatron_flashrecovery.diagnose.gbgp.limits import Deadline
from megatron_flashrecovery.diagnose.gbgp.network import Indices, Network, Vector
from megatron_flashrecovery.diagnose.gbgp.projection import Model, largest, prizes_of
from megatron_flashrecovery.diagnose.gbgp.tour import best_stretch

_NEAR = 1.1
"""Two values of lam that are neighbours."""
_STRIDE = 4.0
_CLOSE = 0.95
"""A forest this close to its bound is good enough to end the search."""


@dataclass(frozen=True)
class SteinerTrees:
    """A ``Projection`` with guarantees. One call finds two or three forests as a rule, up to eight in our runs."""

    def head(self, network: Network, vector: Vector, model: Model, deadline: Deadline) -> Indices:
        prizes = prizes_of(network, vector)
        if not model.edges or not prizes.any():
            return largest(prizes, model.sparsity)
        search = _Search(prizes, model.edges)
        best, bound, dearer = _NOTHING, math.inf, None
        while search.lam is not None:
            deadline.check()
            found = _forest(network, prizes, search.lam, model.trees)
            bound = min(bound, found.prize + (model.edges - found.cost / 2) / search.lam)
            if found.cost > 2 * model.edges:
                dearer = found
                search.lower()
                continue
            best = max(best, found, key=lambda forest: forest.prize)
            if best.prize >= _CLOSE * bound:
                return best.vertices
            search.raise_()
        if dearer is None:
            return best.vertices
        stretch = _stretch_of(network, prizes, dearer, 2 * model.edges)
        return stretch if prizes[stretch].sum() > best.prize else best.vertices

    def tail(self, network: Network, vector: Vector, model: Model, deadline: Deadline) -> Indices:
        prizes = prizes_of(network, vector)
        if not model.edges or not prizes.any():
            return largest(prizes, model.sparsity)
        search = _Search(prizes, model.edges)
        total = float(prizes.sum())
        best, bound = _NOTHING, 0.0
        while search.lam is not None:
            deadline.check()
            found = _forest(network, prizes, search.lam, model.trees)
            bound = max(bound, total - found.prize - (model.edges - found.cost / 2) / search.lam)
            if found.cost > 2.5 * model.edges:
                search.lower()
                continue
            best = max(best, found, key=lambda forest: forest.prize)
            if (total - best.prize) * _CLOSE <= bound:
                break
            search.raise_()
        return best.vertices


@dataclass(frozen=True, eq=False)
class _Forest:
    vertices: Indices
    edges: Indices
    prize: float

    @property
    def cost(self) -> int:
        return self.edges.size


_NOTHING = _Forest(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0.0)


def _forest(network: Network, prizes: Vector, lam: float, trees: int) -> _Forest:
    # "strong": the inequality above is not known to hold for the stronger pruning, which cuts by worth.
    vertices, edges = pcst_fast(network.edges, lam * prizes, np.ones(len(network.edges)), -1, trees, "gw", 0)
    found = np.sort(vertices.astype(np.int64))
    return _Forest(found, edges.astype(np.int64), float(prizes[found].sum()))


def _stretch_of(network: Network, prizes: Vector, forest: _Forest, steps: int) -> Indices:
    inside = np.searchsorted(forest.vertices, network.edges[forest.edges])
    return forest.vertices[best_stretch(prizes[forest.vertices], inside, steps)]


class _Search:
    """The next ``lam`` to try: outwards by strides until it is enclosed, then between, on a scale of ratios."""

    def __init__(self, prizes: Vector, edges: int) -> None:
        positive = np.sort(prizes[prizes > 0])[::-1]
        # At the least the cost is within any budget. At the most every prize that can be had is worth its edges.
        self._least = edges / float(positive.sum())
        self._most = 2 * edges / float(positive[-1])
        self._cheap: float | None = None
        self._dear: float | None = None
        # A vertex is connected once its prize is worth about an edge.
        self.lam: float | None = min(max(1 / float(positive[min(edges, positive.size - 1)]), self._least), self._most)

    def lower(self) -> None:
        """What was found costs too much."""
        self._dear = self.lam
        self._next()

    def raise_(self) -> None:
        """What was found costs little."""
        self._cheap = self.lam
        self._next()

    def _next(self) -> None:
        if self._dear is None:
            assert self._cheap is not None
            self.lam = None if self._cheap >= self._most else min(self._cheap * _STRIDE, self._most)
        elif self._cheap is None:
            self.lam = None if self._dear <= self._least else max(self._dear / _STRIDE, self._least)
        else:
            self.lam = None if self._dear <= self._cheap * _NEAR else math.sqrt(self._dear * self._cheap)
