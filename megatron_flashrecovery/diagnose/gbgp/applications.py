"""Ready problems: the two applications of the paper, and layers with what is measured only at some vertices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.gbgp.coupling import Coupling, in_succession
from megatron_flashrecovery.diagnose.gbgp.network import Blocks, Cut, Network, cut
from megatron_flashrecovery.diagnose.gbgp.objective import OneRatio, SumOfRatios
from megatron_flashrecovery.diagnose.gbgp.solver import Problem


def evolving(network: Network, scores: npt.ArrayLike, strength: float) -> Problem:
    """An anomaly that moves slowly. ``scores``: (snapshots, vertices); one block for each snapshot, one ratio over all
    of them, and ``strength`` on every difference between a vertex and itself in the next snapshot."""
    w = np.asarray(scores, dtype=np.float64)
    if w.ndim != 2 or w.shape[1] != network.vertices:
        raise ValueError(f"scores of shape {w.shape} for {network.vertices} vertices: (snapshots, vertices) is needed")
    pairs = in_succession(network.vertices, w.shape[0])
    objective = OneRatio(w, [Coupling(pairs, strength)])
    return Problem(Blocks((network,) * w.shape[0]), objective, pairs)


def network_of_networks(
    network: Network, scores: npt.ArrayLike, part_of: npt.ArrayLike, strength: float
) -> tuple[Problem, Cut]:
    """One network in parts, a ratio for each, and ``strength`` on the edges between them. ``scores``, ``part_of``:
    (vertices,). Vectors of the problem are in the order of the cut."""
    parts = cut(network, part_of)
    w = np.asarray(scores, dtype=np.float64).reshape(-1)
    if w.size != network.vertices:
        raise ValueError(f"{w.size} scores for {network.vertices} vertices")
    objective = SumOfRatios(parts.blocks, w[parts.order], [Coupling(parts.between, strength)])
    return Problem(parts.blocks, objective, parts.between), parts


def layered(blocks: Blocks, gains: npt.ArrayLike, counted: npt.ArrayLike, couplings: Sequence[Coupling]) -> Problem:
    """Layers and moments of one system: one ratio over all that is measured, and couplings of several kinds, such as
    "this rank sits on that device" and "the same a moment later"."""
    pairs = [np.empty((0, 2), dtype=np.int64), *(np.asarray(coupling.pairs) for coupling in couplings)]
    return Problem(blocks, OneRatio(gains, couplings, counted), np.concatenate(pairs))
