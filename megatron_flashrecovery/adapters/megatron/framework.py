"""megatron-core as the session sees it: the pieces of a rank's state, and how to go back to the start of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_flashrecovery.adapters.megatron.model_state import ModelState, bucket_groups
from megatron_flashrecovery.adapters.megatron.optimizer_state import NormReach, OptimizerState
from megatron_flashrecovery.adapters.megatron.partial_step import PartialStep
from megatron_flashrecovery.adapters.megatron.position import Position
from megatron_flashrecovery.adapters.megatron.random_state import RandomState
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.state.encoding import encode_values
from megatron_flashrecovery.state.pieces import TensorPiece, Value
from megatron_flashrecovery.state.tensor_fingerprint import tensors_fingerprint


class MegatronFramework:
    """Implements ``runtime.framework.Framework``. ``abandon`` is called whenever a partial step is discarded."""

    name = "megatron"

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        position: Position,
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = list(model)
        self._optimizer = OptimizerState(optimizer, model)
        self._scheduler = scheduler
        self.sharded = self._optimizer.sharded
        if not self.sharded and parallel_state.get_expert_model_parallel_world_size() > 1:
            raise ConfigError(
                "--enable-flash-recovery with --expert-model-parallel-size needs --use-distributed-optimizer: "
                "without it, experts would be copied from data-parallel peers, who have others"
            )
        self._model_state = ModelState(model, self.sharded)
        self._random = RandomState()
        self.partial_step = PartialStep(model, optimizer)
        self._position = position
        self._abandon = abandon
        self._optimizer.materialise()
        self._pieces = [*self._model_state.pieces(), *self._optimizer.pieces()]
        refuse_other_tensors(self._pieces)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def begin_step(self) -> Step:
        """The step that is to be computed now, which a recovery may have set back."""
        self.partial_step.begin()
        self._position.begin_step()
        return self._position.step

    def end_step(self) -> None:
        self._position.end_step()

    def state_sha256(self) -> str:
        """Of all that the next step computes with, as far as this rank has it."""
        pieces = [(piece.name, piece.tensor) for piece in self._pieces]
        values = {name: value for name, value in self.values().items() if name != "position"}
        return hashlib.sha256(tensors_fingerprint(pieces) + encode_values(values)).hexdigest()

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
            "position": self._position.capture(),
        }

    def unique_values(self) -> frozenset[str]:
        return frozenset({"random", "model"})

    def restore_values(self, values: Mapping[str, Value]) -> None:
        self._position.restore(values["position"])
        self._model_state.restore(values["model"])
        self._optimizer.restore(values["optimizer"])
        self._scheduler.num_steps = 0  # load_state_dict adds to what is there
        self._scheduler.load_state_dict(values["scheduler"])
        self._random.restore(values["random"])

    def discard_partial_step(self) -> None:
        self.partial_step.discard()
        self._abandon()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Own shards first: with 16-bit parameters they are made from the masters, which is what was restored."""
        if not self.sharded:
            return
        self._optimizer.copy_masters_to_parameters()
        for chunk in self._model:
            for bucket_group in bucket_groups(chunk):
                bucket_group.param_gather_handle = None
            chunk.start_param_sync(force_sync=True)

    def rewind_data(self, step: Step) -> None:
        here = self._position.step
        assert step == here, f"the values are those of step {here}, and the data shall go to step {step}"

    def keep_data(self, step: Step) -> None:
        self._position.forget_before(step)

    def gate_groups(self) -> Sequence[object]:
        peers, replica = self.agreement_group(), parallel_state.get_model_parallel_group()
        match self._optimizer.norm_reach():
            case NormReach.WORLD:
                return ()
            case NormReach.REPLICA:
                return (peers,)
            case NormReach.NOBODY:
                return (peers, replica)


def refuse_other_tensors(pieces: Sequence[TensorPiece]) -> None:
    """Raises ``ConfigError``: a quantised tensor has its bytes and its scale elsewhere than a plain one."""
    for piece in pieces:
        if type(piece.tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ConfigError(
                f"--enable-flash-recovery cannot copy {piece.name}, a {type(piece.tensor).__name__}: keep parameters, "
                "masters and moments in fp32, fp16 or bf16"
            )
