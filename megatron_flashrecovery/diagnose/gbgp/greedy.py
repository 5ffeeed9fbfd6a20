"""Projections that grow a connected set, for where ``pcst_fast`` is not installed: no guarantee, and slower."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_flashrecovery.diagnose.gbgp.limits import Deadline
from megatron_flashrecovery.diagnose.gbgp.network import Indices, Mask, Network, Vector
from megatron_flashrecovery.diagnose.gbgp.projection import Model, largest, prizes_of


@dataclass(frozen=True)
class Greedy:
    """Adds the path of at most ``reach`` vertices with the highest mean prize, again and again, and tries the ``seeds``
    largest prizes as a beginning. Every addition looks at all edges once for each step of its reach, without a loop in
    Python: O(seeds * size * reach * edges)."""

    seeds: int = 3
    reach: int = 4

    def head(self, network: Network, vector: Vector, model: Model, deadline: Deadline) -> Indices:
        return self._largest_part(network, prizes_of(network, vector), model.head_size, model, deadline)

    def tail(self, network: Network, vector: Vector, model: Model, deadline: Deadline) -> Indices:
        return self._largest_part(network, prizes_of(network, vector), model.tail_size, model, deadline)

    def _largest_part(self, network: Network, prizes: Vector, size: int, model: Model, deadline: Deadline) -> Indices:
        best, most = np.empty(0, dtype=np.int64), 0.0
        for seed in largest(prizes, self.seeds):
            found = np.flatnonzero(self._grown(network, prizes, int(seed), (size, model.trees), deadline))
            if prizes[found].sum() > most:
                best, most = found, float(prizes[found].sum())
        return best

    def _grown(self, network: Network, prizes: Vector, seed: int, most: tuple[int, int], deadline: Deadline) -> Mask:
        size, trees = most
        inside = np.zeros(network.vertices, dtype=bool)
        inside[seed] = True
        trees, left = trees - 1, prizes.copy()
        left[seed] = 0
        while (room := size - int(inside.sum())) > 0:
            deadline.check()
            near = (network.adjacency @ inside > 0) & ~inside
            path = _best_path(network, left, near if not trees else ~inside, min(self.reach, room))
            if not path:
                break
            trees -= bool(trees) and not near[path[0]]
            inside[path] = True
            left[path] = 0
        return inside


def _best_path(network: Network, prizes: Vector, starts: Mask, reach: int) -> list[int]:
    """Of the paths that begin in ``starts`` the one of highest mean prize; none if nothing has a prize."""
    if not starts.any():
        return []
    # worth[l]: the best sum over a walk of l + 1 vertices. One that comes back counts a prize again, which is never
    # better than to stop before, up to three vertices; beyond, it is a heuristic.
    worth = [prizes]
    for _ in range(reach - 1):
        worth.append(prizes + _best_neighbour(network, worth[-1]))
    means = np.stack([each / (length + 1) for length, each in enumerate(worth)])
    means[:, ~starts] = 0
    length, at = np.unravel_index(int(np.argmax(means)), means.shape)
    if means[length, at] <= 0:
        return []
    path = [int(at)]
    for level in range(int(length) - 1, -1, -1):
        first, last = network.adjacency.indptr[path[-1] : path[-1] + 2]
        neighbours = network.adjacency.indices[first:last]
        path.append(int(neighbours[np.argmax(worth[level][neighbours])]))
    return path


def _best_neighbour(network: Network, worth: Vector) -> Vector:
    """For each vertex the most that a neighbour is worth; 0 without one."""
    near = network.adjacency
    padded = np.append(worth[near.indices], 0.0)
    found: Vector = np.maximum.reduceat(padded, near.indptr[:-1])
    return np.where(np.diff(near.indptr) > 0, found, 0.0)
