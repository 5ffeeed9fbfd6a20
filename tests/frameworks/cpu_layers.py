"""Layers that upstream has from Apex and Transformer Engine only, slow and plain, so that a CPU can train with them.

Without them upstream refuses sequence parallelism. They are put in place of what upstream's local layers use, and are
the same as before where it is not asked for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm


def install() -> None:
    """Once, before a model is built. Many modules have bound the class of norms: only what it makes is changed."""
    WrappedTorchNorm.__new__ = staticmethod(_norm(WrappedTorchNorm.__new__))


def _norm(original: Any) -> Any:
    def new(cls: type, config: Any, *args: Any, **named: Any) -> torch.nn.Module:
        norm = original(cls, _without(config, sequence_parallel=False), *args, **named)
        for parameter in norm.parameters():
            # Each rank of the tensor group sees a part of the sequence: upstream adds up the gradients of these.
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return new


def _without(config: Any, **instead: Any) -> Any:
    changed = copy.copy(config)
    for name, value in instead.items():
        setattr(changed, name, value)
    return changed
