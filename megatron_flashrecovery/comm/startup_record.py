"""What a rank's collectives answered while it started, so that a replacement can start without the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from megatron_flashrecovery.core.errors import JoinMismatch
from megatron_flashrecovery.core.ids import Epoch, GroupKey

LARGEST_ANSWER_NBYTES = 64 * 1024
"""Larger outputs are left out: they are parameters, which are restored anyway."""

Described: TypeAlias = tuple[str, tuple[int, ...]]
"""A tensor's dtype and shape."""


class StartupMismatch(JoinMismatch):
    """A replacement does not repeat the start of its predecessor; names both sides."""


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """One operation and what it left in its outputs. ``None``: too large, or not over when the record was taken."""

    operation: str
    root: int
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]
    payloads: tuple[bytes | None, ...]
    call_site: str
    source: int = -1

    def asked(self) -> tuple[str, int, tuple[Described, ...], tuple[Described, ...]]:
        return self.operation, self.root, self.inputs, self.outputs

    def describe(self) -> str:
        def shapes(tensors: tuple[Described, ...]) -> str:
            return " ".join(f"{dtype}{list(shape)}" for dtype, shape in tensors) or "nothing"

        root = f" root {self.root}" if self.root >= 0 else ""
        return f"{self.operation}{root} of {shapes(self.inputs)} into {shapes(self.outputs)} at {self.call_site}"


class StartupRecord(msgspec.Struct, frozen=True):
    """``epoch`` is that in which the job started: c10d's own keys in the store are under its prefix."""

    epoch: int
    answers: dict[str, tuple[Answer, ...]]

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def from_bytes(data: bytes) -> StartupRecord:
        return msgspec.msgpack.decode(data, type=StartupRecord)

    @staticmethod
    def of(epoch: Epoch, answers: Mapping[GroupKey, tuple[Answer, ...]]) -> StartupRecord:
        return StartupRecord(int(epoch), {str(key): each for key, each in answers.items()})
