"""No test of state leaves a thread or a descriptor behind."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from megatron_flashrecovery.state.manifest import aligned
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.slot import HEADER_NBYTES


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    threads, fds = set(threading.enumerate()), _descriptors()
    yield
    deadline = time.monotonic() + 5
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"{thread.name} outlives the test"
    if not _descriptors() <= fds:
        gc.collect()  # slow with hypothesis loaded, so only when something is in doubt
    assert _descriptors() <= fds, f"descriptors left open: {_descriptors() - fds}"


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
    return found


@pytest.fixture
def slots():
    """Makes pairs of slots with room for ``capacity`` bytes of content, in memory such as an agent holds."""
    memories, fds = [], []

    def make(capacity: int = 1 << 16):
        fd = os.memfd_create("slots")
        fds.append(fd)
        os.ftruncate(fd, 2 * (HEADER_NBYTES + aligned(capacity, 4096)))
        memories.append(Memory(fd))
        return memories[-1].slots

    yield make
    for memory in memories:
        try:
            memory.close()
        except BufferError:
            gc.collect()  # views of a snapshot that the test did not close
            memory.close()
    for fd in fds:
        os.close(fd)
