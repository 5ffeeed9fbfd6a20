"""A slot: room for one snapshot in memory that outlives its writer, valid only once its commit mark is written.

The order of writes is: mark void, content, header, mark. Whoever reads a slot either has been handed it by the writer
(a queue, a lock) or comes after its death, when every store that it executed, and no other, is in the shared memory. So
no fence is needed: a writer that dies anywhere leaves the slot void. The mark is a checksum of the header, so that an
old mark never vouches for a new header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.snapshot import SnapshotId

HEADER_NBYTES = 4096
_MAGIC = b"FRSLOT\0\0"
_VERSION = 1
# magic, version, rank, epoch, step, nbytes of content, fingerprint
_HEADER = struct.Struct("<8sIiqqQ16s")
_HEADER_AT = 64
_VOID = 0


@dataclass(frozen=True)
class SlotHeader:
    id: SnapshotId
    nbytes: int
    fingerprint: bytes


class Slot:
    """``memory`` is writable, and begins at a multiple of the page size; the first page is the header's."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._mark = memory[:8].cast("Q")

    @property
    def capacity(self) -> int:
        """How many bytes of content fit."""
        return len(self._memory) - HEADER_NBYTES

    def header(self) -> SlotHeader | None:
        """``None``: there is no snapshot here, or not yet, or no longer."""
        packed = bytes(self._memory[_HEADER_AT : _HEADER_AT + _HEADER.size])
        if self._mark[0] != _checksum(packed):
            return None
        magic, version, rank, epoch, step, nbytes, fingerprint = _HEADER.unpack(packed)
        if (magic, version) != (_MAGIC, _VERSION) or nbytes > self.capacity:
            return None
        return SlotHeader(SnapshotId(Rank(rank), Step(step), Epoch(epoch)), nbytes, fingerprint)

    def content(self, nbytes: int | None = None) -> memoryview:
        """The first ``nbytes`` of the room for content. Write there only while the slot is void."""
        return self._memory[HEADER_NBYTES : HEADER_NBYTES + (self.capacity if nbytes is None else nbytes)]

    def void(self) -> None:
        self._write_mark(_VOID)

    def commit(self, header: SlotHeader) -> None:
        """The content is in place."""
        it = header.id
        packed = _HEADER.pack(_MAGIC, _VERSION, it.rank, it.epoch, it.step, header.nbytes, header.fingerprint)
        self._write_header(packed)
        self._write_mark(_checksum(packed))

    def release(self) -> None:
        """Give the memory up; the slot cannot be used any more, what is in it stays."""
        self._mark.release()
        self._memory.release()

    def _write_header(self, packed: bytes) -> None:
        self._memory[_HEADER_AT : _HEADER_AT + len(packed)] = packed

    def _write_mark(self, mark: int) -> None:
        # A native 8-byte item of a cast memoryview is one aligned store; struct's "<Q" would be eight.
        self._mark[0] = mark


def _checksum(packed: bytes) -> int:
    return xxhash.xxh3_64_intdigest(packed) | 1
