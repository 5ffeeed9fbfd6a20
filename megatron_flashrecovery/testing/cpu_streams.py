"""Streams and events of a device on which every operation is over when it returns, unless its stream is told to hang.

What comes behind a hang is not over before the stream goes on: events are not complete, and whoever waits for them or
for the stream is blocked, as behind a kernel that never ends.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class CpuEvent:
    """Remembers when it was recorded."""

    def __init__(self, *_args: object, **_options: object) -> None:
        self._recorded_at = 0.0
        self._behind: threading.Event | None = None

    def record(self, stream: CpuStream | None = None) -> None:
        self._recorded_at = time.perf_counter()
        self._behind = (stream or current_stream()).hanging

    def wait(self, stream: CpuStream | None = None) -> None: ...

    def synchronize(self) -> None:
        if self._behind is not None:
            self._behind.wait()

    def query(self) -> bool:
        return self._behind is None or self._behind.is_set()

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds, as CUDA events say them."""
        return (end._recorded_at - self._recorded_at) * 1e3


class CpuStream:
    """A stream without anything in flight. ``hanging`` is set when what it hangs in is over."""

    cuda_stream = 0

    def __init__(self, *_args: object, **_options: object) -> None:
        self.hanging: threading.Event | None = None

    def hang(self) -> None:
        """From now on nothing gets on."""
        self.hanging = self.hanging or threading.Event()

    def go_on(self) -> None:
        hanging, self.hanging = self.hanging, None
        if hanging is not None:
            hanging.set()

    def wait_stream(self, stream: CpuStream) -> None: ...

    def wait_event(self, event: CpuEvent) -> None: ...

    def synchronize(self) -> None:
        if (hanging := self.hanging) is not None:
            hanging.wait()

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record(self)
        return event


_CURRENT = CpuStream()


def current_stream(device: object = None) -> CpuStream:
    """The only one that operations are put on."""
    return _CURRENT


def no_stream_context(stream_or_device: object = None) -> AbstractContextManager[Any]:
    """For ``with torch.cuda.stream(...)`` and ``with torch.cuda.device(...)``."""
    return nullcontext()
