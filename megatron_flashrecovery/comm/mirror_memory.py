"""Memory that a guest lends to a host on its own machine: the host copies a snapshot out of it, and verifies the copy.

A tenth of a second of CPU time for each GiB, and nothing passes through a socket, which would take three to five tenths
(`bench mirror`). Who owns what does not change: the host reads, and writes only into its own slots.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy

from megatron_flashrecovery.comm.mirror_stream import Digest
from megatron_flashrecovery.core.errors import LinkLost

# Copied and fingerprinted without the GIL. Measured (`bench cost`): with chunks of 256 KiB, for each of which the GIL
# goes from the training thread to this one twice, a step takes two percent longer.
_CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True)
class Lent:
    """``view`` is the lender's own map of all of ``fd``, a memfd that can no longer shrink."""

    fd: int
    view: memoryview

    def offset_of(self, content: memoryview) -> int:
        """Where in the memory these bytes are."""
        if not content:
            return 0
        offset = _address(content) - _address(self.view)
        assert 0 <= offset <= len(self.view) - len(content), f"{len(content)} bytes that lie elsewhere"
        return offset


class Borrowed:
    """The host's map of it. Takes ``fd`` over. Raises ``LinkLost`` if reading there could be this process's death."""

    def __init__(self, fd: int) -> None:
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise LinkLost("the memory that was lent can be taken away: it is not sealed")
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise LinkLost(f"memory was lent that cannot be mapped: {error}") from None
        finally:
            os.close(fd)
        self._bytes = _bytes(self._map)

    def copy_into(self, room: memoryview, offset: int, digest: Digest, check: Callable[[], None]) -> None:
        """Fill ``room``. ``digest`` reads the copy, not the original, whose owner may be writing again; ``check`` is
        called for each chunk, and raises if it is no longer wanted."""
        if not 0 <= offset <= len(self._bytes) - len(room):
            raise LinkLost(f"{len(room)} bytes at {offset} of {len(self._bytes)} bytes that were lent")
        for start in range(0, len(room), _CHUNK_NBYTES):
            check()
            chunk = room[start : start + _CHUNK_NBYTES]
            numpy.copyto(_bytes(chunk), self._bytes[offset + start : offset + start + len(chunk)])
            digest.update(chunk)

    def close(self) -> None:
        del self._bytes
        self._map.close()


def _bytes(buffer: mmap.mmap | memoryview) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]:
    return numpy.frombuffer(buffer, dtype=numpy.uint8)


def _address(view: memoryview) -> int:
    address: int = _bytes(view).ctypes.data
    return address
