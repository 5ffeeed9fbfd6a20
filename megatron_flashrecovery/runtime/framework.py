"""What the session needs to know of a training framework; adapters implement it, ``testing.toy`` is the smallest
one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.state.pieces import TensorPiece, Value


@dataclass(frozen=True)
class StepRecord:
    """What a step reports. ``loss`` is reduced over data-parallel peers; both are exact (hex) in ``steps.jsonl``.

    Only the reporting rank has one; it is part of the state of its step, so that a step is never left out of the
    record. ``details`` is what else the framework's loop is given by a step, in whatever form the adapter likes.
    """

    loss: float | None
    grad_norm: float | None
    skipped: bool = False
    details: Value = None


class Framework(Protocol):
    """Everything is called on the main thread. ``step`` is always the number of completed steps."""

    name: str
    sharded: bool
    """The optimizer state is split over data-parallel peers: tensor pieces marked unique exist nowhere else."""

    def data_parallel_peers(self) -> tuple[Rank, ...]:
        """Global ranks that hold the same replicated pieces, this one included, in the order of the group."""

    def agreement_group(self) -> object:
        """The handle (a ``ProcessGroup``) of those peers, for the gate and for the check after a restore."""

    def tensor_pieces(self) -> Sequence[TensorPiece]:
        """The same names in the same order at every call and on every staffing of this rank. On a replacement this
        materialises optimizer state that a first step would have created."""

    def values(self) -> Mapping[str, Value]:
        """Small pieces (RNG, scheduler, scaler, counters, data position, extra state), a copy, below 1 MiB in all.
        Early pieces (changed by forward, backward or gradient finalisation) are among them."""

    def unique_values(self) -> frozenset[str]:
        """Which of ``values`` differ between data-parallel peers (generators, and whatever else is this rank's own)."""

    def restore_values(self, values: Mapping[str, Value]) -> None:
        """Put back what ``values`` returned."""

    def discard_partial_step(self) -> None:
        """Gradients, pipeline buffers, outstanding handles, timers, rerun state: as before the step began."""

    def gather_parameters(self) -> None:
        """Collect the parameters from the shards again (a collective over ``agreement_group``); a no-op unless
        sharded."""

    def rewind_data(self, step: Step) -> None:
        """The next batch that the loop draws is the one that step ``step + 1`` is computed from. At most two steps
        back from the newest that was drawn here."""

    def keep_data(self, step: Step) -> None:
        """Batches up to and including step ``step`` will not be asked for again."""

    def gate_groups(self) -> Sequence[object]:
        """Handles over which the gate sends a message of a few bytes, one after the other, so that together with the
        reductions that the update itself makes behind them nobody writes before every rank has come to its gate
        (invariant 1). None, where the norm is reduced over the whole world; the data-parallel peers, where it is
        reduced over one replica of the model; these and the replica, where there is no norm."""
