"""The pieces of the model itself: parameters, and what modules and gradient buckets remember from step to step."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_flashrecovery.adapters.megatron import aux_losses
from megatron_flashrecovery.adapters.megatron.fp8_state import Fp8State, keeps_fp8_scaling
from megatron_flashrecovery.core.errors import SeamChanged
from megatron_flashrecovery.state.pieces import TensorPiece, Value


class ModelState:
    def __init__(self, model: Sequence[DistributedDataParallel], sharded: bool) -> None:
        self._model = list(model)
        self._sharded = sharded
        self._fp8 = Fp8State(model)

    def pieces(self) -> list[TensorPiece]:
        """Parameters, which with a sharded optimizer are collected from the shards again, unless they are frozen: no
        optimizer has those."""
        return [
            TensorPiece(
                name,
                parameter.data,
                unique=self._sharded and not parameter.requires_grad,
                gathered=self._sharded and parameter.requires_grad,
                peers_differ=not getattr(parameter, "allreduce", True),  # upstream's word for an expert's
            )
            for name, parameter in named_parameters(self._model)
        ]

    def capture(self) -> Value:
        """Buffers, of whatever size, are among the values: forward changes some, so a rank that goes on from its live
        tensors needs them back too, and a copy that the device makes later would be one of the next forward."""
        return {
            "buffers": {name: buffer.clone() for name, buffer in self._buffers()},
            "fp8": self._fp8.capture(),
            "extra": {name: state for name, module in self._modules() if (state := _extra_state(name, module))},
            "buckets": [_bucket_group_memory(group) for group in self._bucket_groups()],
            "aux_losses": aux_losses.capture(),
        }

    @torch.no_grad()
    def restore(self, captured: Any) -> None:
        for name, buffer in self._buffers():
            buffer.copy_(captured["buffers"][name])
        self._fp8.restore(captured["fp8"])
        for name, module in self._modules():
            if name in captured["extra"]:
                _set_extra_state(module, captured["extra"][name])
        for group, memory in zip(self._bucket_groups(), captured["buckets"], strict=True):
            _remind_bucket_group(group, memory)
        aux_losses.restore(captured["aux_losses"])

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, chunk in enumerate(self._model):
            for name, buffer in chunk.module.named_buffers():
                yield f"model{index}.{name}", buffer

    def _modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Those that have extra state of their own. Transformer Engine's is what ``Fp8State`` keeps."""
        for index, chunk in enumerate(self._model):
            for name, module in chunk.module.named_modules():
                has_its_own = type(module).get_extra_state is not torch.nn.Module.get_extra_state
                if has_its_own and not keeps_fp8_scaling(module):
                    yield f"model{index}.{name}", module

    def _bucket_groups(self) -> list[Any]:
        return [group for chunk in self._model for group in bucket_groups(chunk)]


def bucket_groups(chunk: DistributedDataParallel) -> list[Any]:
    """Those of experts have their own, over groups of their own."""
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def named_parameters(model: Sequence[DistributedDataParallel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for index, chunk in enumerate(model):
        for name, parameter in chunk.module.named_parameters():
            yield f"model{index}.{name}", parameter


def _extra_state(name: str, module: torch.nn.Module) -> Value:
    match module.get_extra_state():
        case None:
            return None
        case torch.Tensor() as state:
            return {"tensor": state.clone()} if state.numel() else None
        case bytes() as state:
            return {"bytes": state}
        case io.BytesIO() as state:
            return {"file": state.getvalue()}
        case state:
            raise SeamChanged(f"{name} has extra state of an unknown kind, {type(state).__name__}")


def _set_extra_state(module: torch.nn.Module, captured: dict[str, Any]) -> None:
    ((kind, state),) = captured.items()
    module.set_extra_state(io.BytesIO(state) if kind == "file" else state)


def _bucket_group_memory(group: Any) -> Value:
    """After its first step a bucket group knows how often each gradient becomes ready, and from then on reduces during
    backward. A replacement that did not know would reduce in another order than its peers. Before megatron-core 0.16
    there is nothing to know: each gradient becomes ready once."""
    if not hasattr(group, "is_first_batch"):
        return None
    # The counts of the first step become the golden ones only when the next step resets the group.
    field = "per_param_grad_ready_counts" if group.is_first_batch else "golden_per_param_grad_ready_counts"
    counts = getattr(group, field)
    return [counts.get(parameter, 0) for parameter in _parameters_of(group)]


def _remind_bucket_group(group: Any, memory: list[int] | None) -> None:
    if memory is None:
        return
    counts = {parameter: count for parameter, count in zip(_parameters_of(group), memory, strict=True) if count}
    group.golden_per_param_grad_ready_counts = counts
    group.is_first_batch = not counts


def _parameters_of(group: Any) -> list[torch.nn.Parameter]:
    return [parameter for bucket in group.buckets for parameter in bucket.params_list]
