"""Where every thread of a process is, written by the process itself, also when it dies of a signal in native code or
hangs with the interpreter's lock in its hands."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Mapping

SIGNAL = signal.SIGRTMIN + 9
"""Nobody else uses it: frameworks and schedulers take those with a name."""
_MOST = 16384
_WRITTEN_WITHIN = 0.3
_POLL = 0.01


def make_file() -> int:
    """The descriptor of an empty file in memory, which outlives whoever writes to it."""
    return os.memfd_create("flashrecovery-stacks", os.MFD_CLOEXEC)


def write_on_death(descriptor: int) -> None:
    """In the process itself, on its main thread: a fatal signal, or ``SIGNAL``, writes the stacks of all threads. Not
    in processes that it forks."""
    faulthandler.enable(descriptor, all_threads=True)
    faulthandler.register(SIGNAL, descriptor, all_threads=True, chain=False)
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    faulthandler.disable()
    faulthandler.unregister(SIGNAL)


def ask_for(descriptor_of: Mapping[int, int]) -> None:
    """From outside, by process id: returns when each has written something, or after a moment, for a stopped process
    writes nothing."""
    sizes = {descriptor: os.fstat(descriptor).st_size for descriptor in descriptor_of.values()}
    before = dict(sizes)
    waiting = set(sizes)
    for pid, descriptor in descriptor_of.items():
        try:
            os.kill(pid, SIGNAL)
        except ProcessLookupError:
            waiting.discard(descriptor)
    deadline = time.monotonic() + _WRITTEN_WITHIN
    while waiting and time.monotonic() < deadline:
        time.sleep(_POLL)
        for descriptor in list(waiting):
            size, sizes[descriptor] = sizes[descriptor], os.fstat(descriptor).st_size
            if sizes[descriptor] == size > before[descriptor]:
                waiting.discard(descriptor)


def read_from(descriptor: int) -> str:
    """What was written last."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _MOST, max(0, size - _MOST)).decode(errors="replace").strip()
