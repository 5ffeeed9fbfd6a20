"""The bytes of a tensor, out and in again, on whatever device and of whatever dtype it is."""

from __future__ import annotations

import ctypes

import torch


def payload_of(tensor: torch.Tensor) -> bytes:
    """A copy of the elements in row-major order, without shape or dtype."""
    if tensor.is_cpu and tensor.is_contiguous():
        # Straight from memory: a norm is told to the session in every step, and views and NumPy cost 14 us.
        return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()) if tensor.numel() else b""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def fill(tensor: torch.Tensor, payload: bytes) -> None:
    """Write back what ``payload_of`` returned for a tensor of this size. Another size is a ``ValueError``."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes != len(payload):
        raise ValueError(
            f"told {len(payload)} bytes for a tensor of {nbytes} bytes ({tensor.dtype} {list(tensor.shape)})"
        )
    if nbytes:
        source = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(tensor.dtype)
        with torch.no_grad():
            tensor.copy_(source.view(tensor.shape))
