"""Streams and events of a device on which every operation is over when it returns."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class CpuEvent:
    """Remembers when it was recorded."""

    def __init__(self, *_args: object, **_options: object) -> None:
        self._recorded_at = 0.0

    def record(self, stream: CpuStream | None = None) -> None:
        self._recorded_at = time.perf_counter()

    def wait(self, stream: CpuStream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds, as CUDA events say them."""
        return (end._recorded_at - self._recorded_at) * 1e3


class CpuStream:
    """A stream without anything in flight."""

    cuda_stream = 0

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def wait_stream(self, stream: CpuStream) -> None: ...

    def wait_event(self, event: CpuEvent) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record(self)
        return event


def current_stream(device: object = None) -> CpuStream:
    return CpuStream()


def no_stream_context(stream_or_device: object = None) -> AbstractContextManager[Any]:
    """For ``with torch.cuda.stream(...)`` and ``with torch.cuda.device(...)``."""
    return nullcontext()
