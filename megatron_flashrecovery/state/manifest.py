"""The list of tensors in a snapshot: names, dtypes, shapes, and where each one's bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import torch

from megatron_flashrecovery.state.encoding import dtype_named
from megatron_flashrecovery.state.memory import aligned
from megatron_flashrecovery.state.pieces import TensorPiece

# Every element size divides it, and no two tensors share a cache line.
_ALIGNMENT = 64
_Row: TypeAlias = tuple[str, str, tuple[int, ...], int]


@dataclass(frozen=True)
class Entry:
    """One tensor; ``offset`` counts from the start of the body."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Manifest:
    entries: tuple[Entry, ...]

    @property
    def body_nbytes(self) -> int:
        return aligned(self.entries[-1].offset + self.entries[-1].nbytes, _ALIGNMENT) if self.entries else 0

    def encode(self) -> bytes:
        return msgspec.msgpack.encode([(e.name, e.dtype, e.shape, e.nbytes) for e in self.entries])


def manifest_of(pieces: Sequence[TensorPiece]) -> Manifest:
    return _laid_out([(p.name, str(p.tensor.dtype), tuple(p.tensor.shape), p.nbytes) for p in pieces])


def decode_manifest(data: bytes | memoryview) -> Manifest:
    """Raises ``msgspec.DecodeError``."""
    return _laid_out(_decoder.decode(data))


def difference(held: Manifest, wanted: Manifest) -> str | None:
    """The first thing in which a snapshot differs from the pieces that it is to fill, for people."""
    for there, here in zip(held.entries, wanted.entries, strict=False):
        if there.name != here.name:
            return f"piece {there.name} where this worker has {here.name}"
        if (there.dtype, there.shape) != (here.dtype, here.shape):
            return f"piece {there.name} is {there.dtype}{list(there.shape)}, here {here.dtype}{list(here.shape)}"
    if len(held.entries) > len(wanted.entries):
        return f"piece {held.entries[len(wanted.entries)].name} is not known here"
    if len(held.entries) < len(wanted.entries):
        return f"piece {wanted.entries[len(held.entries)].name} is missing"
    return None


def views_into(body: torch.Tensor, manifest: Manifest) -> list[torch.Tensor]:
    """The snapshot's tensors as views of its body (flat, uint8)."""
    return [body[e.offset : e.offset + e.nbytes].view(dtype_named(e.dtype)).view(e.shape) for e in manifest.entries]


def _laid_out(rows: Sequence[_Row]) -> Manifest:
    entries, offset = [], 0
    for name, dtype, shape, nbytes in rows:
        entries.append(Entry(name, dtype, shape, nbytes, offset))
        offset = aligned(offset + nbytes, _ALIGNMENT)
    return Manifest(tuple(entries))


_decoder = msgspec.msgpack.Decoder(list[_Row])
