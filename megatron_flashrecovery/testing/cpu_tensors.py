"""What tensors and the functions that make them do when they are told of a CUDA device that does not exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# The ones that megatron-core 0.16.1 calls with a CUDA device. Where one is missed, torch says that it has no CUDA.
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros", "zeros_like")
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def on_cpu(device: Any) -> Any:
    """The CPU for every way to name a CUDA device (a bare number included), and any other device as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    if isinstance(device, str | torch.device) and str(device).startswith("cuda"):
        return torch.device("cpu")
    return device


def wrapped_factories() -> dict[str, Callable[..., torch.Tensor]]:
    return {name: _making_on_cpu(getattr(torch, name)) for name in _FACTORIES}


def patched_tensor_methods() -> dict[str, Callable[..., Any]]:
    plain_to, plain_type = torch.Tensor.to, torch.Tensor.type

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("non_blocking") and "cpu" in (*map(str, args[:1]), str(options.get("device"))):
            # From a device this is a copy, and whoever asks for it so goes on changing the original.
            options["copy"] = True
        # A bare number as first argument of ``to`` is a device index.
        args = tuple(on_cpu(argument) if index == 0 else argument for index, argument in enumerate(args))
        if "device" in options:
            options["device"] = on_cpu(options["device"])
        return plain_to(tensor, *args, **options)

    def type_name(tensor: torch.Tensor, dtype: Any = None, **options: Any) -> Any:
        """Optimizers sort parameters by the names ``torch.cuda.FloatTensor`` and ``torch.cuda.BFloat16Tensor``."""
        if dtype is not None:
            return plain_type(tensor, dtype, **options)
        return plain_type(tensor).replace("torch.", "torch.cuda.")

    return {
        **{name: _making_on_cpu(getattr(torch.Tensor, name)) for name in _METHODS},
        "to": to,
        "type": type_name,
        "cuda": lambda tensor, device=None, non_blocking=False, memory_format=None: tensor,
        "pin_memory": lambda tensor, device=None: tensor,
        "record_stream": lambda tensor, stream: None,
    }


def _making_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> torch.Tensor:
        if options.get("device") is not None:
            options["device"] = on_cpu(options["device"])
        return factory(*args, **options)

    return make
