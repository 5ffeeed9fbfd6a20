"""A sum over a part of what data-parallel peers share, another part in each step: it travels at the head of the mirror
that this rank sends to its host anyway, and the host, which is one of these peers, compares it with its own.

It is taken at the gate of a step, where everybody's parameters are those of the step before in full, also where they
are gathered late. Whole numbers are added up, so the order does not matter, and one wrong bit always shows. On a device
nobody waits for it: it is copied with the rest of the mirror.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch

from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.state.pieces import TensorPiece

NAME = "flashrecovery/checksum"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HEAD = struct.Struct("<qq")


class Checksum:
    """Of ``shared`` pieces, all of them within ``steps`` steps. ``piece`` holds the step and the sum."""

    def __init__(self, shared: Sequence[TensorPiece], steps: int) -> None:
        self._steps = steps
        self._flat = [_as_integers(piece.tensor) for piece in shared if piece.tensor.is_contiguous()]
        self._total = sum(len(flat) for flat in self._flat)
        self._parts: dict[int, list[torch.Tensor]] = {}
        self.piece = TensorPiece(NAME, torch.zeros(2, dtype=torch.int64, device=shared[0].tensor.device), unique=True)

    @torch.no_grad()
    def take(self, step: Step) -> None:
        """What is in memory is the state of ``step``."""
        held = self.piece.tensor
        held[0].fill_(step)
        held[1].zero_()
        for part in self._part(step % self._steps):
            held[1].add_(part.sum(dtype=torch.int64))

    def part_of(self, step: Step) -> str:
        return f"part {step % self._steps + 1} of {self._steps}"

    def _part(self, number: int) -> list[torch.Tensor]:
        if number not in self._parts:
            start, end = (self._total * edge // self._steps for edge in (number, number + 1))
            self._parts[number] = list(_cut(self._flat, start, end))
        return self._parts[number]


def differing(own: memoryview, guests: Mapping[Rank, memoryview]) -> tuple[Step, list[Rank]]:
    """Of whose body, which begins with a checksum, the sum is not ours; and of which step. Those that speak of another
    step say nothing."""
    step, mine = _HEAD.unpack_from(own)
    told = {guest: _HEAD.unpack_from(body) for guest, body in guests.items() if len(body) >= _HEAD.size}
    return Step(step), [guest for guest, (of, theirs) in sorted(told.items()) if of == step and theirs != mine]


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(_INTEGERS[tensor.element_size()])


def _cut(flat: Sequence[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    """What lies between two places of all of them in a row."""
    found, at = [], 0
    for values in flat:
        first, last = max(start - at, 0), min(end - at, len(values))
        if first < last:
            found.append(values[first:last])
        at += len(values)
    return found
