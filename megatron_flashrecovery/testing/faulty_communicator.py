"""A communicator of one process that fails the way NCCL does: an aborted operation returns, and its output is garbage.

Gloo raises when a connection goes, so nothing that runs on CPU shows whether a handle believes an aborted operation.
Here operations stay under way until ``release``; ``sever`` completes them with garbage and without an error. Like NCCL,
waiting for a work does not wait for the operation, only ``finish`` does. A send outside of a batch raises
``WouldDeadlock``: with rendezvous sends it would wait for a receive that its peer posts only after its own send.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Communicator, Progress, Transport
from megatron_flashrecovery.testing.cpu_streams import CpuEvent, CpuStream

GARBAGE = 0xA5


class WouldDeadlock(AssertionError):
    """A single send or receive was issued where only a batch is safe."""


class FaultyMark:
    """On a stream that may hang."""

    def __init__(self, stream: CpuStream) -> None:
        self._event = CpuEvent()
        self._event.record(stream)

    def look(self, works: Sequence[dist.Work | None]) -> Progress:
        if all(work is None or work.is_completed() for work in works):
            return Progress.OVER
        return Progress.INSIDE if self._event.query() else Progress.BEFORE


class FaultyWork:
    """Complete once released or severed. Whether it was successful it does not say, as NCCL's does not."""

    def __init__(self, outputs: Sequence[torch.Tensor], over: threading.Event) -> None:
        self.outputs = outputs
        self.over = over

    def is_completed(self) -> bool:
        return self.over.is_set()

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class FaultyGroup:
    """Takes the place of the inner process group. Reductions over one member leave their tensors as they are."""

    supports_coalescing = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.over = threading.Event()
        self.works: list[FaultyWork] = []
        self._coalescing = False
        self.error: str | None = None
        """As from a watchdog: nobody who waits is told of it."""

    def _get_backend(self, device: torch.device) -> FaultyGroup:
        return self

    def _start_coalescing(self, device: torch.device) -> None:
        self.calls.append("start")
        self._coalescing = True

    def _end_coalescing(self, device: torch.device) -> FaultyWork:
        self.calls.append("end")
        self._coalescing = False
        return self._begin(())

    def allreduce(self, tensors: Sequence[torch.Tensor], options: object = None) -> FaultyWork:
        self.calls.append("allreduce")
        return self._begin(tensors)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, options: object = None) -> FaultyWork:
        self.calls.append("all_gather_single")
        return self._begin((output,))

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int) -> FaultyWork | None:
        return self._transfer("send", ())

    def recv(self, tensors: Sequence[torch.Tensor], peer: int, tag: int) -> FaultyWork | None:
        return self._transfer("recv", tensors)

    def _transfer(self, name: str, outputs: Sequence[torch.Tensor]) -> FaultyWork | None:
        if not self._coalescing:
            raise WouldDeadlock(f"{name} outside of a batch")
        self.calls.append(name)
        return None

    def _begin(self, outputs: Sequence[torch.Tensor]) -> FaultyWork:
        work = FaultyWork(outputs, self.over)
        self.works.append(work)
        return work

    def spoil(self) -> None:
        for work in self.works:
            if not work.over.is_set():
                for tensor in work.outputs:
                    tensor.view(torch.uint8).fill_(GARBAGE)
        self.over.set()


class FaultyTransport:
    """Waits like NCCL: only ``finish`` waits for the device, and it returns for aborted ones too."""

    host_synchronous = False
    backend = None
    backend_type = dist.ProcessGroup.BackendType.CUSTOM

    def __init__(self, group: FaultyGroup) -> None:
        self._group = group
        self.stream = CpuStream()
        """That of the thread that issues operations."""

    def connect(self) -> None:
        pass

    def mark(self) -> FaultyMark:
        return FaultyMark(self.stream)

    def wait(self, work: object, timeout: timedelta | None) -> None:
        """Orders the stream only."""

    def finish(self, work: object) -> None:
        assert self._group.over.wait(timeout=20), "neither released nor severed in time"

    def succeeded(self, work: object) -> bool:
        """No error is ever seen here."""
        return True

    def error(self) -> str | None:
        return self._group.error

    def sever(self) -> None:
        self._group.spoil()

    def settle(self, on_wait: Callable[[], None] = lambda: None) -> None:
        pass

    def close(self, gently: bool) -> None:
        pass


class FaultyCommunicator(Communicator):
    """Give it to a handle in place of a ``Communicator``."""

    def __init__(self) -> None:
        self.severed = None
        self.closed = False
        self.inner: Any = FaultyGroup()
        self.default: FaultyTransport = FaultyTransport(self.inner)

    def transport(self, tensors: Sequence[torch.Tensor]) -> Transport:
        return self.default

    @property
    def transports(self) -> Iterable[Transport]:
        return (self.default,)

    def release(self) -> None:
        """Everything that was issued completes, and so does whatever is issued from now on."""
        self.inner.over.set()

    def connect(self) -> None:
        pass

    def close(self, gently: bool = False) -> None:
        self.closed = True
