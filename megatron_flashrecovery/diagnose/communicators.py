"""The communicators of a job as elements: which kind each is, and one for those that hold the same ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.layout import ParallelLayout
from megatron_flashrecovery.diagnose.elements import Kind

_KINDS = (
    ("TENSOR_MODEL_PARALLEL_GROUP", Kind.TENSOR),
    ("EXPERT_TENSOR_PARALLEL_GROUP", Kind.TENSOR),
    ("PIPELINE_MODEL_PARALLEL_GROUP", Kind.PIPELINE),
    ("DATA_PARALLEL_GROUP", Kind.DATA),
    ("EXPERT_DATA_PARALLEL_GROUP", Kind.DATA),
    ("INTRA_PARTIAL_DATA_PARALLEL_GROUP", Kind.DATA),
)
"""What the description of a group begins with. Source: megatron/core/parallel_state.py (core_v0.16.1)."""
_DESCRIPTIONS = {
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "model": "TENSOR_MODEL_PARALLEL_GROUP",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "pipe": "PIPELINE_MODEL_PARALLEL_GROUP",
    "dp": "DATA_PARALLEL_GROUP",
    "data": "DATA_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
}
_ORDER = (Kind.TENSOR, Kind.PIPELINE, Kind.DATA, Kind.GROUP)
_SPELLED_OUT = 8


@dataclass(frozen=True)
class Communicator:
    """``ranks``: sorted, at least two."""

    kind: Kind
    name: str
    ranks: tuple[Rank, ...]


def communicators_of(groups: Mapping[str, Sequence[int]]) -> tuple[Communicator, ...]:
    """Of groups by key (``TENSOR_MODEL_PARALLEL_GROUP[4,5]#0``, see ``SeatsDescribed``), in the order of first keys.

    Frameworks make several groups of the same ranks (for NCCL, for gloo, with and without a context axis of size 1).
    No telemetry tells these apart, so they become one, of the first kind in this order: tensor, pipeline, data, other.
    Groups of one rank are left out."""
    best: dict[tuple[int, ...], tuple[Kind, str]] = {}
    for key, members in groups.items():
        ranks = tuple(sorted(members))
        if len(ranks) < 2:
            continue
        description = key.partition("[")[0]
        kind = next((kind for start, kind in _KINDS if description.startswith(start)), Kind.GROUP)
        if ranks not in best or _ORDER.index(kind) < _ORDER.index(best[ranks][0]):
            best[ranks] = kind, description
    return tuple(
        Communicator(kind, _name(kind, description, ranks), tuple(Rank(rank) for rank in ranks))
        for ranks, (kind, description) in best.items()
    )


def groups_of(layout: ParallelLayout) -> dict[str, tuple[Rank, ...]]:
    """The groups along each axis of a layout, by keys like those of a running job."""
    return {
        f"{_DESCRIPTIONS.get(axis, axis)}[{spelled(ranks)}]#0": ranks
        for axis, size in layout.axes
        if size > 1
        for ranks in layout.groups(axis)
    }


def stages_of(world: int, groups: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The pipeline stage of each rank, by its place in its pipeline; 0 for a rank that is in none."""
    stage = [0] * world
    for key, ranks in groups.items():
        if key.startswith("PIPELINE_MODEL_PARALLEL_GROUP"):
            for place, rank in enumerate(ranks):
                stage[rank] = place
    return tuple(stage)


def spelled(ranks: Iterable[int]) -> str:
    """``0-7``, ``0-56/8`` (every eighth), or ``1,4,6``; of many irregular ones the first and a digest."""
    ranks = list(ranks)
    step = ranks[1] - ranks[0] if len(ranks) > 2 else 0
    if step > 0 and ranks == list(range(ranks[0], ranks[-1] + 1, step)):
        return f"{ranks[0]}-{ranks[-1]}" + (f"/{step}" if step > 1 else "")
    text = ",".join(str(rank) for rank in ranks)
    if len(ranks) <= _SPELLED_OUT:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{','.join(str(rank) for rank in ranks[:3])} and {len(ranks) - 3} more, {digest}"


def _name(kind: Kind, description: str, ranks: tuple[int, ...]) -> str:
    return f"{description} {spelled(ranks)}" if kind is Kind.GROUP else spelled(ranks)
