"""The worker's view of a memfd that its agent holds: two slots, mapped."""

from __future__ import annotations

import mmap
import os

from megatron_flashrecovery.state.slot import Slot

SLOTS = 2


def aligned(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


class Memory:
    """Maps ``fd``, which it neither closes nor needs any longer afterwards."""

    def __init__(self, fd: int, populate: bool = True) -> None:
        nbytes = os.fstat(fd).st_size
        # Populated: the first capture would otherwise take a page fault per 4 KiB, twenty times the copy itself.
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0))
        self.view = memoryview(self._map)
        each = nbytes // SLOTS
        self.slots: tuple[Slot, ...] = tuple(Slot(self.view[at * each : (at + 1) * each]) for at in range(SLOTS))

    def close(self) -> None:
        """Unmap. Raises ``BufferError`` if somebody (a ``Snapshots`` not closed) still has views of it."""
        for slot in self.slots:
            slot.release()
        self.view.release()
        self._map.close()
