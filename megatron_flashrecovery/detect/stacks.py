"""Where every thread of a process is, written by the process itself, also when it dies of a signal in native code or
hangs with the interpreter's lock in its hands."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time

SIGNAL = signal.SIGRTMIN + 9
"""Nobody else uses it: frameworks and schedulers take those with a name."""
_MOST = 16384
_WRITTEN_WITHIN = 0.3
_POLL = 0.01


def make_file() -> int:
    """The descriptor of an empty file in memory, which outlives whoever writes to it."""
    return os.memfd_create("flashrecovery-stacks", os.MFD_CLOEXEC)


def write_on_death(descriptor: int) -> None:
    """In the process itself, on its main thread: a fatal signal, or ``SIGNAL``, writes the stacks of all threads."""
    faulthandler.enable(descriptor, all_threads=True)
    faulthandler.register(SIGNAL, descriptor, all_threads=True, chain=False)


def ask_for(pid: int, descriptor: int) -> None:
    """From outside: returns when something was written, or after a moment, for a stopped process writes nothing."""
    before = os.fstat(descriptor).st_size
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, SIGNAL)
        deadline = time.monotonic() + _WRITTEN_WITHIN
        size = before
        while time.monotonic() < deadline:
            time.sleep(_POLL)
            now = os.fstat(descriptor).st_size
            if now == size > before:
                return
            size = now


def read_from(descriptor: int) -> str:
    return os.pread(descriptor, _MOST, 0).decode(errors="replace").strip()
