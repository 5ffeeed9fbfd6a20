"""Faults that are done to a tensor and not to a process: a value that is no number, values far too large, one bit."""

from __future__ import annotations

import torch

from megatron_flashrecovery.runtime.injection import Fault

_SPIKE = 1e4
_BIT = 20
"""Of a float32 one in the middle of the mantissa: nothing looks wrong."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def damage(fault: Fault, tensor: torch.Tensor) -> None:
    """In place, behind the back of autograd, as a device would do it."""
    values = tensor.detach()
    first = values[(slice(0, 1),) * values.dim()]
    match fault:
        case Fault.NAN:
            first.fill_(float("nan"))
        case Fault.SPIKE:
            values.mul_(_SPIKE)
        case Fault.BITFLIP:
            nbytes = first.element_size()
            first.view(_INTEGERS[nbytes]).bitwise_xor_(1 << min(_BIT, 8 * nbytes - 3))
        case _:
            raise AssertionError(f"{fault} is not done to a tensor")
