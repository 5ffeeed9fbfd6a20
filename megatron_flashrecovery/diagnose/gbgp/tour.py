"""The best stretch of a forest that is too large: a walk around its trees, and the window of it that holds most."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csgraph

from megatron_flashrecovery.diagnose.gbgp.network import Edges, Indices, Vector, adjacency


def best_stretch(prizes: Vector, edges: Edges, steps: int) -> Indices:
    """Vertices of a part of a forest that is spanned by at most ``steps`` edges, sorted, with no more trees than the
    forest has. ``edges``: those of the forest over the vertices of ``prizes``.

    A walk around trees with E edges has 2E steps, so one of its windows holds at least the fraction 1 / ceil(2E /
    (steps + 1)) of all prizes.
    """
    order, depth, tree = _preorder(prizes.size, edges)
    # Where the walk first meets each vertex: up to the parent of the next one, and down. From tree to tree for nothing.
    climb = np.where(tree[1:] == tree[:-1], depth[:-1] - depth[1:] + 2, 0)
    met = np.concatenate(([0], np.cumsum(climb)))
    last = np.searchsorted(met, met + steps, side="right") - 1
    sums = np.concatenate(([0.0], np.cumsum(prizes[order])))
    first = int(np.argmax(sums[last + 1] - sums[:-1]))
    above = _passed_above(depth, tree, first, int(last[first]))
    return np.sort(np.concatenate((order[above], order[first : last[first] + 1])))


def _preorder(size: int, edges: Edges) -> tuple[Indices, Indices, Indices]:
    """Vertices in the order in which a walk meets them, tree by tree; depth and tree of each."""
    near = adjacency(size, edges)
    _, tree = csgraph.connected_components(near, directed=False)
    _, roots = np.unique(tree, return_index=True)
    depth = csgraph.dijkstra(near, indices=roots, unweighted=True, min_only=True).astype(np.int64)
    walks = [csgraph.depth_first_order(near, root, return_predecessors=False) for root in roots]
    order = np.concatenate(walks).astype(np.int64)
    return order, depth[order], tree[order]


def _passed_above(depth: Indices, tree: Indices, first: int, last: int) -> Indices:
    """Places, in the order of the walk, of what the window passes again above its first vertex."""
    inside = depth[first + 1 : last + 1][tree[first + 1 : last + 1] == tree[first]]
    if not inside.size:
        return np.empty(0, dtype=np.int64)
    # Going back from a vertex, its ancestors are those that lie higher than everything in between.
    back = np.where(tree[: first + 1] == tree[first], depth[: first + 1], depth.max() + 1)[::-1]
    highest = np.minimum.accumulate(back)
    ancestor = np.concatenate(([False], back[1:] < highest[:-1]))
    return first - np.flatnonzero(ancestor & (back >= inside.min() - 1))
