"""A piece: a named tensor or value of a rank's state, and who else has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

Value: TypeAlias = "bool | int | float | str | bytes | list[Value] | dict[str, Value] | torch.Tensor | None"
"""What a small piece may be made of: it must survive msgpack, with tensors as (dtype, shape, bytes). No pickle."""


@dataclass(frozen=True)
class TensorPiece:
    """A live tensor of the model or optimizer. It is read at a step boundary and written in place when restored.

    ``unique``: nobody else has it (an optimizer shard), so it is mirrored every step. Else it is replicated:
    data-parallel peers hold the same bits, and it is copied from one of them only when it is needed, unless it is
    ``gathered``: then collecting the shards again brings it back, and it is never sent at all. ``peers_differ``: what
    data-parallel peers hold under this name is something else (their experts).
    """

    name: str
    tensor: torch.Tensor
    unique: bool
    gathered: bool = False
    peers_differ: bool = False

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()
