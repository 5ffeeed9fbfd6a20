"""megatron-core as the session sees it: the pieces of a rank's state, and how to go back to the start of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    get_micro_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_flashrecovery.adapters.megatron.model_state import ModelState
from megatron_flashrecovery.adapters.megatron.optimizer_state import NormReach, OptimizerState
from megatron_flashrecovery.adapters.megatron.partial_step import PartialStep
from megatron_flashrecovery.adapters.megatron.random_state import RandomState
from megatron_flashrecovery.adapters.megatron.replay import ReplayableBatches
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.state.pieces import TensorPiece, Value


class MegatronFramework:
    """Implements ``runtime.framework.Framework``."""

    name = "megatron"

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        open_batches: Callable[[int], Iterator[Any]],
        first_step: Step,
    ) -> None:
        _refuse_expert_parallelism()
        self._model = list(model)
        self._optimizer = OptimizerState(optimizer, model)
        self._scheduler = scheduler
        self.sharded = self._optimizer.sharded
        self._model_state = ModelState(model, self.sharded)
        self._random = RandomState()
        self.partial_step = PartialStep(model, optimizer)
        self.batches = ReplayableBatches(open_batches)
        self._step = first_step
        self._consumed_samples = first_step * self._samples_per_step()
        self._optimizer.materialise()
        self._pieces = [*self._model_state.pieces(), *self._optimizer.pieces()]

    # --- the loop -----------------------------------------------------------------------------------------------------

    def begin_step(self) -> Step:
        """The step that is to be computed now, which a recovery may have set back."""
        self.partial_step.begin()
        self.batches.begin_step(self._step, self._consumed_samples)
        return self._step

    def end_step(self) -> None:
        self._step = Step(self._step + 1)
        self._consumed_samples += self._samples_per_step()

    # --- Framework ----------------------------------------------------------------------------------------------------

    def data_parallel_peers(self) -> tuple[Rank, ...]:
        return tuple(Rank(rank) for rank in dist.get_process_group_ranks(self.agreement_group()))

    def agreement_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def tensor_pieces(self) -> Sequence[TensorPiece]:
        return self._pieces

    def values(self) -> Mapping[str, Value]:
        return {
            "random": self._random.capture(),
            "model": self._model_state.capture(),
            "optimizer": self._optimizer.capture(),
            "scheduler": dict(self._scheduler.state_dict()),
            "step": int(self._step),
            "consumed_samples": self._consumed_samples,
        }

    def unique_values(self) -> frozenset[str]:
        return frozenset({"random", "model"})

    def restore_values(self, values: Mapping[str, Value]) -> None:
        step, consumed_samples = values["step"], values["consumed_samples"]
        assert isinstance(step, int)
        assert isinstance(consumed_samples, int)
        self._step, self._consumed_samples = Step(step), consumed_samples
        update_num_microbatches(consumed_samples, consistency_check=False)
        self._model_state.restore(values["model"])
        self._optimizer.restore(values["optimizer"])
        self._scheduler.num_steps = 0  # load_state_dict adds to what is there
        self._scheduler.load_state_dict(values["scheduler"])
        self._random.restore(values["random"])

    def discard_partial_step(self) -> None:
        self.partial_step.discard()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Own shards first: with 16-bit parameters they are made from the masters, which is what was restored."""
        if not self.sharded:
            return
        self._optimizer.copy_masters_to_parameters()
        for chunk in self._model:
            for bucket_group in chunk.bucket_groups:
                bucket_group.param_gather_handle = None
            chunk.start_param_sync(force_sync=True)

    def rewind_data(self, step: Step) -> None:
        assert step == self._step, f"the values are those of step {self._step}, and the data shall go to step {step}"

    def keep_data(self, step: Step) -> None:
        self.batches.forget_before(step)

    def gate_groups(self) -> Sequence[object]:
        peers, replica = self.agreement_group(), parallel_state.get_model_parallel_group()
        match self._optimizer.norm_reach():
            case NormReach.WORLD:
                return ()
            case NormReach.REPLICA:
                return (peers,)
            case NormReach.NOBODY:
                return (peers, replica)

    @staticmethod
    def _samples_per_step() -> int:
        data_parallel_size = parallel_state.get_data_parallel_world_size()
        return int(get_num_microbatches() * get_micro_batch_size() * data_parallel_size)


def _refuse_expert_parallelism() -> None:
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        raise ConfigError(
            "--enable-flash-recovery does not know expert parallelism: its data-parallel peers hold other experts"
        )
