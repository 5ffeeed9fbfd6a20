"""Checkpoints in megatron-core's ``torch_dist`` format. The marker that names the newest one is written last."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

# Each rank writes its own part of the optimizer as it lies in memory: nothing is gathered on one rank first.
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
_MARKER = "latest_checkpointed_iteration.txt"


def save_checkpoint(
    directory: Path,
    step: int,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """All ranks call it. It may be repeated after it was interrupted: what an earlier attempt left is removed first."""
    target = _checkpoint(directory, step)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    torch.distributed.barrier()
    state = _sharded_state(model, optimizer, is_loading=False)
    state |= {"scheduler": scheduler.state_dict(), "step": step}
    _collect_results_here()
    dist_checkpointing.save(state, str(target))
    if torch.distributed.get_rank() == 0:
        partial = directory / f".{_MARKER}"
        partial.write_text(str(step))
        partial.rename(directory / _MARKER)


@torch.no_grad()  # in fp32 megatron-core loads into views of parameters
def load_checkpoint(
    directory: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> int:
    """Load the newest complete checkpoint, if there is one. Returns its step, or 0."""
    marker = directory / _MARKER
    if not marker.exists():
        return 0
    target = _checkpoint(directory, int(marker.read_text()))
    _make_adam_state(optimizer)
    state = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(target))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _count_per_parameter(optimizer)
    scheduler.load_state_dict(state["scheduler"])
    _set_random_state(state["random"])
    return int(state["step"])


def _checkpoint(directory: Path, step: int) -> Path:
    return directory / f"iter_{step:07d}"


def _sharded_state(model: DistributedDataParallel, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    parameters = model.module.sharded_state_dict(metadata=_METADATA)
    return {
        "model": parameters,
        "optimizer": optimizer.sharded_state_dict(parameters, is_loading, metadata=_METADATA),
        "random": _sharded_random_state(),
    }


def _collect_results_here() -> None:
    """Nothing is saved in the background, so megatron-core need not start one more process per rank to gather results
    in, which would import everything once more."""
    filesystem_async._results_queue = filesystem_async._results_queue or SimpleQueue()


def _make_adam_state(optimizer: MegatronOptimizer) -> None:
    """megatron-core reads the step counters that the distributed optimizer is to overwrite, and torch's Adam makes them
    in its first update."""
    for inner in optimizer.chained_optimizers:
        if not isinstance(inner, DistributedOptimizer) or not isinstance(inner.optimizer, torch.optim.Adam):
            continue
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                inner.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _count_per_parameter(optimizer: MegatronOptimizer) -> None:
    """Torch's Adam counts steps per parameter. megatron-core leaves what it has loaded in the parameter groups, or
    gives all parameters one tensor, which an update would count up once for each of them."""
    for inner in optimizer.chained_optimizers:
        if not isinstance(inner.optimizer, torch.optim.Adam):
            continue
        for group in inner.optimizer.param_groups:
            loaded = group.pop("step", None)
            for parameter in group["params"]:
                state = inner.optimizer.state[parameter]
                state["step"] = state["step"].clone() if loaded is None else torch.tensor(float(loaded))


def _sharded_random_state() -> ShardedObject:
    """Tensor and pipeline ranks draw different numbers, data-parallel peers the same."""
    stages, tensor_ranks = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    return ShardedObject(
        "random", _random_state(), (stages, tensor_ranks), place, replica_id=parallel_state.get_data_parallel_rank()
    )


def _random_state() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
