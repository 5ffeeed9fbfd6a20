"""Nothing that a test of the data plane starts may outlive it."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest


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
