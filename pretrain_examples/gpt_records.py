"""What a run leaves behind: a line and a record per step, and a fingerprint of every rank's final state."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker


class StepReport(Protocol):
    """A ``StepResult``, or what a protected step returns in its place."""

    @property
    def loss(self) -> float | None: ...

    @property
    def grad_norm(self) -> float | None: ...

    @property
    def skipped(self) -> bool: ...


@dataclass(frozen=True)
class StepResult:
    """What a step reports. Only ranks of the last pipeline stage know the loss, averaged over the global batch."""

    loss: float | None
    grad_norm: float | None
    skipped: bool = False


def is_reporting_rank() -> bool:
    return bool(torch.distributed.get_rank() == torch.distributed.get_world_size() - 1)


def print_step(step: int, result: StepReport, seconds: float, args: argparse.Namespace) -> None:
    """``step`` counts completed updates."""
    if is_reporting_rank() and step % args.log_interval == 0:
        skipped = ", update skipped" if result.skipped else ""
        print(
            f"step {step:4d}/{args.train_iters} | loss {result.loss:.6f} | grad norm {result.grad_norm or 0.0:.6f}"
            f" | {seconds * 1000:.0f} ms{skipped}",
            flush=True,
        )


class StepRecords:
    """``steps.jsonl`` and ``summary.json`` of a run without recovery, as ``flashrecovery verify`` reads them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._directory = args.dump_dir if not args.enable_flash_recovery else None
        if self._directory and is_reporting_rank():
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / "steps.jsonl").write_text("")

    def add(self, step: int, result: StepReport, seconds: float) -> None:
        if not self._directory or not is_reporting_rank():
            return
        record = {
            "step": step,
            "loss": result.loss,
            "loss_hex": None if result.loss is None else result.loss.hex(),
            "grad_norm_hex": None if result.grad_norm is None else result.grad_norm.hex(),
            "epoch": 0,
            "seconds": seconds,
        }
        with (self._directory / "steps.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def finish(self, steps: int, own_sha256: str) -> None:
        """All ranks call it; the last one writes."""
        if not self._directory:
            return
        hashes: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(hashes, own_sha256)
        if is_reporting_rank():
            summary = {
                "world_size": len(hashes),
                "steps": steps,
                "state_sha256": {str(rank): sha256 for rank, sha256 in enumerate(hashes)},
                "recoveries": [],
            }
            (self._directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def state_sha256(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> str:
    """Over every bit that this rank's next step depends on: parameters, buffers, optimizer state and random numbers."""
    digest = hashlib.sha256()
    for name, tensor in _state(model, optimizer):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _state(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for index, inner in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        for group_index, group in enumerate(inner.optimizer.param_groups):
            for key in ("lr", "weight_decay"):
                yield f"{index}.{group_index}.{key}", torch.tensor(float(group[key]), dtype=torch.float64)
            for parameter_index, parameter in enumerate(group["params"]):
                prefix = f"{index}.{group_index}.{parameter_index}"
                yield f"{prefix}.parameter", parameter
                for key, value in sorted(inner.optimizer.state[parameter].items()):
                    yield f"{prefix}.{key}", torch.as_tensor(value)
    yield "python random", torch.tensor(random.getstate()[1], dtype=torch.int64)
    yield "numpy random", torch.from_numpy(numpy.random.get_state(legacy=False)["state"]["key"].astype(numpy.int64))
    yield "torch random", torch.get_rng_state()
    yield from sorted(get_cuda_rng_tracker().get_states().items())
