"""How ranks are arranged along the axes of parallelism.

An axis that comes earlier in ``axes`` changes faster with the rank: in ``(("tp", 2), ("dp", 2), ("pp", 2))`` ranks 0
and 1 are tensor-parallel neighbours, and ranks 0 and 4 are on successive pipeline stages. Both frameworks describe
their order so: Megatron as text with the fastest first (``tp-cp-ep-dp-pp``), DeepSpeed as a list with the fastest last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank

MEGATRON_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True)
class ParallelLayout:
    """A grid of ranks; every axis has a size of at least 1 and a name of its own."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ConfigError(f"axes {'-'.join(names)}: an axis is named twice, name each once")
        for name, size in self.axes:
            if size < 1:
                raise ConfigError(f"axis {name} has size {size}: must be at least 1")

    @property
    def world_size(self) -> int:
        return math.prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        """Raises ``KeyError`` for an axis that this layout does not have."""
        return dict(self.axes)[axis]

    def coords(self, rank: Rank) -> dict[str, int]:
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"there is no rank {rank} in a layout of {self.world_size} ranks")
        rest, coords = int(rank), {}
        for name, size in self.axes:
            rest, coords[name] = divmod(rest, size)
        return coords

    def rank_at(self, coords: Mapping[str, int]) -> Rank:
        """The inverse of ``coords``."""
        strides = self._strides()
        return Rank(sum(coords[name] * strides[name] for name, _ in self.axes))

    def group_of(self, rank: Rank, *axes: str) -> tuple[Rank, ...]:
        """The ranks that differ from ``rank`` along these axes only, in the order of the group; it is one of them."""
        here, strides = self.coords(rank), self._strides()
        base = rank - sum(here[axis] * strides[axis] for axis in axes)
        return tuple(Rank(base + offset) for offset in self._offsets(axes))

    def groups(self, *axes: str) -> tuple[tuple[Rank, ...], ...]:
        """All groups along these axes. Every rank is in one; along no axis, each rank is a group of its own."""
        self._check(axes)
        others = tuple(name for name, _ in self.axes if name not in axes)
        offsets = self._offsets(axes)
        return tuple(tuple(Rank(base + offset) for offset in offsets) for base in self._offsets(others))

    def _offsets(self, axes: tuple[str, ...]) -> list[int]:
        """How far the members of a group are from its first one, the fastest axis first."""
        self._check(axes)
        strides = self._strides()
        ranges = [range(0, size * strides[name], strides[name]) for name, size in self.axes if name in axes]
        return [sum(steps) for steps in itertools.product(*reversed(ranges))]

    def _strides(self) -> dict[str, int]:
        strides, stride = {}, 1
        for name, size in self.axes:
            strides[name] = stride
            stride *= size
        return strides

    def _check(self, axes: tuple[str, ...]) -> None:
        known = [name for name, _ in self.axes]
        for axis in axes:
            if axis not in known:
                raise ConfigError(f"there is no axis {axis}: this layout has {' '.join(known)}")


def megatron_layout(
    world_size: int, *, tensor: int = 1, pipeline: int = 1, context: int = 1, order: str = MEGATRON_ORDER
) -> ParallelLayout:
    """The layout of everything but the experts; data parallelism takes what the other axes leave.

    Source: ``RankGenerator`` in megatron/core/parallel_state.py (core_v0.16.1).
    """
    flags = {
        "--tensor-model-parallel-size": tensor,
        "--context-parallel-size": context,
        "--pipeline-model-parallel-size": pipeline,
    }
    data = _what_is_left(world_size, flags)
    return _in_order(order, {"tp": tensor, "cp": context, "ep": 1, "dp": data, "pp": pipeline})


def megatron_expert_layout(
    world_size: int, *, tensor: int = 1, pipeline: int = 1, expert: int = 1, order: str = MEGATRON_ORDER
) -> ParallelLayout:
    """The layout of the experts: ``tensor`` is the size that one expert is split by; they know no context axis."""
    flags = {
        "--expert-tensor-parallel-size": tensor,
        "--expert-model-parallel-size": expert,
        "--pipeline-model-parallel-size": pipeline,
    }
    data = _what_is_left(world_size, flags)
    return _in_order(order, {"tp": tensor, "cp": 1, "ep": expert, "dp": data, "pp": pipeline})


def deepspeed_layout(world_size: int, *, pipe: int = 1, model: int = 1) -> ParallelLayout:
    """Source: ``PipeModelDataParallelTopology`` in deepspeed/runtime/pipe/topology.py, axes ``pipe data model``."""
    data = _what_is_left(world_size, {"the pipe size": pipe, "the model size": model})
    return ParallelLayout((("model", model), ("data", data), ("pipe", pipe)))


def _what_is_left(world_size: int, flags: Mapping[str, int]) -> int:
    for flag, size in flags.items():
        if size < 1:
            raise ConfigError(f"{flag} {size}: must be at least 1")
    used = math.prod(flags.values())
    if world_size < 1 or world_size % used:
        product = " x ".join(f"{flag} {size}" for flag, size in flags.items() if size > 1)
        raise ConfigError(f"{world_size} ranks do not divide by {product or 1}: give a multiple of {used}")
    return world_size // used


def _in_order(order: str, sizes: Mapping[str, int]) -> ParallelLayout:
    names = order.lower().split("-")
    if unknown := [name for name in names if name not in sizes]:
        raise ConfigError(f"order {order}: there is no axis {unknown[0]!r}, it is made of {' '.join(sizes)}")
    left_out = [name for name in sizes if name not in names]
    if missing := [name for name in left_out if sizes[name] > 1]:
        raise ConfigError(f"order {order}: {missing[0]} has size {sizes[missing[0]]} and is left out, add it")
    return ParallelLayout(tuple((name, sizes[name]) for name in (*names, *left_out)))
