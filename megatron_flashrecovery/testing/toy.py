"""The smallest framework that has everything a recovery must get right: two pipeline stages' worth of traffic, model
and data parallel groups, a sharded or replicated optimizer with momentum, dropout noise from a generator, and a data
position.

It is made of torch alone and steps in milliseconds, so tests of the runtime use it where Megatron would take seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist

from megatron_flashrecovery.core.findings import Finding
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.state.pieces import TensorPiece, Value


@dataclass(frozen=True)
class ToyShape:
    """``model_parallel`` ranks hold different parameters; the rest of the world is data parallel."""

    model_parallel: int = 2
    numel: int = 64
    sharded: bool = True


class Refuser(Protocol):
    @property
    def skips_update(self) -> bool: ...

    @property
    def examines(self) -> bool: ...

    def refuse(self, what: str, own: str, finding: Finding | None) -> NoReturn: ...


class Marks(Protocol):
    """What the toy calls at the seams; the session's methods fit in."""

    @property
    def refusal(self) -> Refuser: ...
    def mark(self, moment: Moment, tensor: torch.Tensor | None = None) -> None: ...
    def gate(self) -> object: ...
    def before_update(self) -> None: ...
    def after_update(self) -> None: ...


class Toy:
    """Implements ``Framework``. Make it after ``init_process_group``."""

    name = "toy"

    def __init__(self, shape: ToyShape) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        size = shape.model_parallel
        self.sharded = shape.sharded
        self._rank = rank
        self._model_group = _own([list(range(i, i + size)) for i in range(0, world, size)], rank, "model")
        self._peers = [list(range(i, world, size)) for i in range(size)][rank % size]
        self._data_group = _own([list(range(i, world, size)) for i in range(size)], rank, "data")
        self._next_rank = (rank + 1) % size + rank - rank % size
        self._previous_rank = (rank - 1) % size + rank - rank % size
        torch.manual_seed(1234 + rank % size)
        self.parameters = torch.randn(shape.numel * len(self._peers))
        torch.manual_seed(99 + rank)
        mine = self._peers.index(rank)
        self._shard = self.parameters[mine * shape.numel : (mine + 1) * shape.numel]
        self.momentum = torch.zeros_like(self._shard if self.sharded else self.parameters)
        self.gradient = torch.zeros_like(self.parameters)
        self.position = 0

    # --- the framework's own step -------------------------------------------------------------------------------------

    def step(self, marks: Marks) -> StepRecord:
        batch = self._draw()
        activation = batch * self.parameters.mean()
        marks.mark(Moment.FORWARD, activation)
        activation = self._exchange(activation)
        dist.all_reduce(activation, group=self._model_group)
        noise = torch.rand_like(self.parameters)
        marks.mark(Moment.BACKWARD, activation)
        self.gradient = self.parameters * 0.01 + noise * activation.mean()
        dist.all_reduce(activation, group=self._model_group)
        marks.mark(Moment.GRAD_SYNC, self.gradient)
        own = self.gradient.sum()
        dist.all_reduce(self.gradient, group=self._data_group)
        loss = activation.mean()
        dist.all_reduce(loss, group=self._data_group)
        marks.gate()
        if marks.refusal.skips_update:
            return StepRecord(float(loss), None, skipped=True)
        norm = (self.gradient**2).sum()
        dist.all_reduce(norm, group=None if self.sharded else self._model_group)
        if not norm.isfinite():
            is_own = not own.isfinite()
            finding = Finding(1, "the toy", "gradient") if is_own and marks.refusal.examines else None
            marks.refusal.refuse(f"the gradient norm is {float(norm)}", "gradient" if is_own else "", finding)
        marks.before_update()
        self._update(float(norm.sqrt()), marks)
        marks.after_update()
        if self.sharded:
            self.gather_parameters()
        return StepRecord(float(loss), float(norm.sqrt()))

    def _draw(self) -> torch.Tensor:
        self.position += 1
        return torch.full((4,), float(self.position))

    def _exchange(self, activation: torch.Tensor) -> torch.Tensor:
        """Point to point, around the model-parallel group."""
        if self._next_rank == self._rank:
            return activation
        received = torch.empty_like(activation)
        operations = [
            dist.P2POp(dist.isend, activation, self._next_rank, group=self._model_group),
            dist.P2POp(dist.irecv, received, self._previous_rank, group=self._model_group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return activation + received

    def _update(self, norm: float, marks: Marks) -> None:
        scale = 0.1 / max(norm, 1.0)
        gradient = self.gradient
        if self.sharded:
            mine = self._peers.index(self._rank)
            gradient = gradient[mine * len(self._shard) : (mine + 1) * len(self._shard)]
        self.momentum.mul_(0.9).add_(gradient)
        marks.mark(Moment.OPTIMIZER)
        (self._shard if self.sharded else self.parameters).sub_(self.momentum, alpha=scale)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.parameters, self.momentum, torch.get_rng_state()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    # --- Framework ----------------------------------------------------------------------------------------------------

    def data_parallel_peers(self) -> tuple[Rank, ...]:
        return tuple(Rank(rank) for rank in self._peers)

    def agreement_group(self) -> object:
        return self._data_group

    def tensor_pieces(self) -> Sequence[TensorPiece]:
        pieces = [
            TensorPiece("parameters", self.parameters, unique=False, gathered=self.sharded),
            TensorPiece("momentum", self.momentum, unique=self.sharded),
        ]
        return [*pieces, TensorPiece("shard", self._shard, unique=True)] if self.sharded else pieces

    def values(self) -> Mapping[str, Value]:
        return {"rng": torch.get_rng_state(), "position": self.position}

    def unique_values(self) -> frozenset[str]:
        return frozenset({"rng"})

    def restore_values(self, values: Mapping[str, Value]) -> None:
        rng, position = values["rng"], values["position"]
        assert isinstance(rng, torch.Tensor)
        assert isinstance(position, int)
        torch.set_rng_state(rng)
        self.position = position

    def discard_partial_step(self) -> None:
        self.gradient.zero_()

    def gather_parameters(self) -> None:
        if self.sharded:
            dist.all_gather_into_tensor(self.parameters, self._shard.clone(), group=self._data_group)

    def rewind_data(self, step: Step) -> None:
        self.position = step

    def keep_data(self, step: Step) -> None:
        """The position is all there is."""

    def gate_groups(self) -> Sequence[object]:
        return () if self.sharded else (self._data_group,)


def _own(rank_lists: list[list[int]], rank: int, desc: str) -> dist.ProcessGroup:
    """Every process makes every group, in the same order, as frameworks do."""
    groups = [dist.new_group(ranks, group_desc=desc) for ranks in rank_lists]
    own: dist.ProcessGroup = next(group for group, ranks in zip(groups, rank_lists, strict=True) if rank in ranks)
    return own
