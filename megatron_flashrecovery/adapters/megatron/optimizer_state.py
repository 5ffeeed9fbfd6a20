"""The pieces of megatron-core's optimizers, plain and distributed: masters, moments, step counters, gradient scaler."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_flashrecovery.adapters.megatron.model_state import named_parameters
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.state.pieces import TensorPiece, Value

_MOMENTS = ("exp_avg", "exp_avg_sq")


class NormReach(Enum):
    """Who takes part in the reduction of the gradient norm together."""

    WORLD = "world"
    REPLICA = "replica"
    NOBODY = "nobody"


class OptimizerState:
    """A chained optimizer has several inner ones; where all parameters of a stage are frozen, it has none."""

    def __init__(self, optimizer: MegatronOptimizer, model: Sequence[DistributedDataParallel]) -> None:
        self._optimizer = optimizer
        self._inner = inner_optimizers(optimizer)
        self._name_of = {id(parameter): name for name, parameter in named_parameters(model)}
        self.sharded = model[0].ddp_config.use_distributed_optimizer
        self._refuse_what_is_not_known()

    def materialise(self) -> None:
        """Make the state that the first update would make, so that pieces have their names from the start on.

        Zero moments and a zero counter are what torch's and Apex's Adam begin with themselves: no bit changes.
        """
        for inner in self._inner:
            torch_optimizer = inner.optimizer
            for group in torch_optimizer.param_groups:
                for parameter in group["params"]:
                    if not torch_optimizer.state[parameter]:
                        _begin_adam_state(torch_optimizer, group, parameter)
                if not isinstance(torch_optimizer, torch.optim.Adam):
                    group.setdefault("step", 0)
        # From megatron-core 0.19 on the first update asks all ranks for these, and keeps the answers.
        for name in getattr(optimizer_module, "SEPARATE_GRAD_NORM_GROUPS", ()):
            self._optimizer.has_grad_norm_group(name)

    def pieces(self) -> list[TensorPiece]:
        """With the distributed optimizer a master is this rank's shard of the parameter. In fp32 training it is a view
        into the parameter itself, and unique all the same: the peers have it only as far as they have gathered it."""
        pieces = []
        for inner in self._inner:
            for master, parameter in zip(_masters(inner), _parameters(inner), strict=True):
                name = self._name_of[id(parameter)]
                if master is not parameter:
                    pieces.append(TensorPiece(f"{name}/master", master.data, unique=self.sharded))
                state = inner.optimizer.state[master]
                pieces += [
                    TensorPiece(f"{name}/{key}", state[key], unique=self.sharded)
                    for key in sorted(state)
                    if key != "step" and isinstance(state[key], torch.Tensor)
                ]
                pieces += [
                    TensorPiece(f"{name}/{key}/scale", scale, unique=self.sharded)
                    for key, scale in sorted(_scales_of(inner.optimizer, master).items())
                ]
        return pieces

    def capture(self) -> Value:
        return [
            {"steps": _steps(inner.optimizer), "scaler": inner.grad_scaler.state_dict() if _has_scaler(inner) else None}
            for inner in self._inner
        ]

    def restore(self, captured: Any) -> None:
        for inner, state in zip(self._inner, captured, strict=True):
            _set_steps(inner.optimizer, state["steps"])
            if state["scaler"] is not None:
                inner.grad_scaler.load_state_dict(state["scaler"])

    def copy_masters_to_parameters(self) -> None:
        for inner in self._inner:
            # Not by the attribute of the instance: there it says that an update has been applied.
            type(inner)._copy_main_params_to_model_params(inner)

    def norm_reach(self) -> NormReach:
        """Over whom the gradient norm of every step is reduced in one operation."""
        if not isinstance(self._optimizer, ChainedOptimizer) and self._optimizer.config.clip_grad <= 0.0:
            return NormReach.NOBODY
        reaches = {tuple(dist.get_process_group_ranks(inner.get_grad_stats_parallel_group())) for inner in self._inner}
        if reaches == {tuple(range(dist.get_world_size()))}:
            return NormReach.WORLD
        replica = tuple(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))
        return NormReach.REPLICA if reaches == {replica} else NormReach.NOBODY

    def _refuse_what_is_not_known(self) -> None:
        for inner in self._inner:
            if inner.config.optimizer != "adam":
                raise ConfigError(f"--enable-flash-recovery knows the optimizer adam, not {inner.config.optimizer}")
            if isinstance(inner, DistributedOptimizer) != self.sharded:
                raise ConfigError("--enable-flash-recovery needs all optimizers distributed, or none of them")
            if not self.sharded and isinstance(getattr(inner, "grad_scaler", None), DynamicGradScaler):
                # The scale that follows a skipped update is not known yet where the copies are made.
                raise ConfigError(
                    "--enable-flash-recovery with --fp16 needs --use-distributed-optimizer, or a constant --loss-scale"
                )


def inner_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [inner for inner in chained if not inner.is_stub_optimizer]


def _masters(inner: Any) -> list[torch.Tensor]:
    """What the inner optimizer updates, in its order."""
    return [master for group in inner.optimizer.param_groups for master in group["params"]]


def _parameters(inner: Any) -> list[torch.Tensor]:
    """The parameters of the model that belong to ``_masters``, in the same order."""
    if isinstance(inner, DistributedOptimizer):
        pairs = zip(inner.model_fp32_groups, inner.model_float16_groups, strict=True)
        return [parameter for full, half in pairs for parameter in (*full, *half)]
    halves = getattr(inner, "float16_groups", [])
    masters_of_halves = getattr(inner, "fp32_from_float16_groups", [])
    half_of = {
        id(master): half
        for group, masters in zip(halves, masters_of_halves, strict=True)
        for half, master in zip(group, masters, strict=True)
    }
    return [half_of.get(id(master), master) for master in _masters(inner)]


def _begin_adam_state(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor) -> None:
    """Transformer Engine's Adam keeps masters, and moments in other dtypes with a scale each, if it is told to."""
    if not getattr(optimizer, "master_weights", False) and set(_dtypes(optimizer)) <= {torch.float32}:
        optimizer.state[parameter].update(_fresh_adam_state(optimizer, group, parameter))
        return
    remainders = getattr(optimizer, "store_param_remainders", False) and parameter.dtype == torch.bfloat16
    knows_remainders = len(inspect.signature(optimizer.initialize_state).parameters) > 1
    optimizer.initialize_state(parameter, *((remainders,) if knows_remainders else ()))


def _dtypes(optimizer: Any) -> list[torch.dtype]:
    of_state: dict[str, torch.dtype] = getattr(optimizer, "name_to_dtype_map", {})
    return [dtype for key, dtype in of_state.items() if key in _MOMENTS]


def _scales_of(optimizer: Any, master: torch.Tensor) -> dict[str, torch.Tensor]:
    scales: dict[str, torch.Tensor] = getattr(optimizer, "_scales", {}).get(master, {})
    return scales


def _fresh_adam_state(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    moments = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in _MOMENTS}
    if not isinstance(optimizer, torch.optim.Adam):
        return moments  # Apex and Transformer Engine count per group
    on_device = group.get("capturable") or group.get("fused")
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else None)
    return {"step": step, **moments}


def _has_scaler(inner: Any) -> bool:
    return getattr(inner, "grad_scaler", None) is not None


def _counters(optimizer: Any) -> list[dict[str, Any]]:
    """Wherever a ``step`` is counted. A ``step`` of a group of torch's is what loading a checkpoint left there."""
    if isinstance(optimizer, torch.optim.Adam):
        return [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return list(optimizer.param_groups)


def _steps(optimizer: Any) -> Value:
    return [float(holder["step"]) for holder in _counters(optimizer)]


def _set_steps(optimizer: Any, steps: Sequence[float]) -> None:
    for holder, step in zip(_counters(optimizer), steps, strict=True):
        if isinstance(holder["step"], torch.Tensor):
            holder["step"].fill_(step)
        else:
            holder["step"] = int(step)
