"""Which ranks each element of the cluster can harm, and which elements are next to each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.elements import Element

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Topology:
    """``ranks`` are those of element k from ``start[k]`` to ``start[k + 1]``, sorted: what a fault of it can make slow,
    fail or unreachable (its blast radius). ``edges``: (m, 2) elements that depend on each other or are wired together,
    hardware only. ``device_of``: (world,) the element that is the device of each rank, -1 where none is known."""

    elements: tuple[Element, ...]
    start: Indices
    ranks: Indices
    edges: Indices
    device_of: Indices

    @property
    def world(self) -> int:
        return int(self.device_of.size)

    def ranks_of(self, element: int) -> Indices:
        return self.ranks[self.start[element] : self.start[element + 1]]
