"""A device error on purpose: a real one where there is a device, else the exception that torch would raise."""

from __future__ import annotations

from typing import NoReturn

import torch

_ILLEGAL_ADDRESS = 700
"""cudaErrorIllegalAddress"""
_KERNEL = "template <typename T> T poke(T x) { return *reinterpret_cast<T*>(16) + x; }"


def break_device() -> NoReturn:
    """Raises what torch raises for it. From then on no call to the device succeeds in this process."""
    if torch.cuda.is_available():
        poke = torch.cuda.jiterator._create_jit_fn(_KERNEL)
        poke(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = _ILLEGAL_ADDRESS  # type: ignore[attr-defined]  # missing in torch's stub
    raise error
