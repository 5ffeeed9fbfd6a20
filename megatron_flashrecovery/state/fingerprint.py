"""Fingerprints of state: 128 bits that tell whether bytes are still those that their owner had.

Not against an adversary (the job token is), but against what memory, networks and half-finished copies do.
"""

from __future__ import annotations

from typing import TypeAlias

import xxhash

Buffer: TypeAlias = "bytes | bytearray | memoryview"

NBYTES = 16
# xxhash gives the GIL up for each update and takes it again after: chunks this long keep the main thread from waiting
# often, and are still in the last-level cache when something else has just written them.
CHUNK_NBYTES = 4 << 20


def fingerprint(*buffers: Buffer) -> bytes:
    """The 128-bit xxh3 of the buffers, one after the other. Runs without the GIL, in chunks."""
    digest = xxhash.xxh3_128()
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), CHUNK_NBYTES):
            digest.update(view[start : start + CHUNK_NBYTES])
    return digest.digest()
