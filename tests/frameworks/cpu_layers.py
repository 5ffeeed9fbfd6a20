"""Layers that upstream has from Apex and Transformer Engine only, slow and plain, so that a CPU can train with them.

Without them upstream refuses sequence and context parallelism, and cannot send tokens to experts. They are put in place
of what upstream's local layers use, and are the same as before where none of this is asked for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models import backends
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm


def install() -> None:
    """Once, before a model is built. Many modules have bound the class of norms: only what it makes is changed."""
    WrappedTorchNorm.__new__ = staticmethod(_norm(WrappedTorchNorm.__new__))
    backends.DotProductAttention = GatheringAttention
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host


def _norm(original: Any) -> Any:
    def new(cls: type, config: Any, *args: Any, **named: Any) -> torch.nn.Module:
        norm = original(cls, _without(config, sequence_parallel=False), *args, **named)
        for parameter in norm.parameters():
            # Each rank of the tensor group sees a part of the sequence: upstream adds up the gradients of these.
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return new


class GatheringAttention(DotProductAttention):
    """Causal attention of the own queries to the keys and values of the whole context-parallel group."""

    def __init__(self, config: Any, *args: Any, **named: Any) -> None:
        super().__init__(_without(config, context_parallel_size=1), *args, **named)

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **named: Any) -> Any:
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        if size > 1:
            own, whole = positions(len(query), size, rank), len(query) * size
            order = torch.cat([positions(len(query), size, other) for other in range(size)]).argsort()
            # In backward this one adds up what all ranks have found for the part of each.
            key = gather_from_sequence_parallel_region(key.contiguous(), group=group).index_select(0, order)
            value = gather_from_sequence_parallel_region(value.contiguous(), group=group).index_select(0, order)
            attention_mask = (torch.arange(whole)[None, :] > own[:, None])[None, None]
        return super().forward(query, key, value, attention_mask, *args, **named)


def positions(length: int, size: int, rank: int) -> torch.Tensor:
    """Those in the sequence of what ``rank`` of ``size`` has: a chunk from the front, and its counterpart from the end.

    Upstream: ``get_batch_on_this_cp_rank``.
    """
    chunk = torch.arange(length // 2)
    return torch.cat([rank * len(chunk) + chunk, (2 * size - rank - 1) * len(chunk) + chunk])


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Upstream makes numbers of the sizes of an all-to-all only where they come from a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _without(config: Any, **instead: Any) -> Any:
    changed = copy.copy(config)
    for name, value in instead.items():
        setattr(changed, name, value)
    return changed
