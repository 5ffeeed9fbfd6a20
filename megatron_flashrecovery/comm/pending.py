"""The work that a handle returns: it settles its ledger entry, and asks the session what to do when it fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Communicator, Severed
from megatron_flashrecovery.comm.ledger import Entry
from megatron_flashrecovery.comm.operation import POINT_TO_POINT, Call
from megatron_flashrecovery.core.messages import Spot

if TYPE_CHECKING:
    from megatron_flashrecovery.comm.handle import FlashGroup


class PendingWork(dist.Work):
    """One or several issued operations (a batch is one). Waiting twice is allowed, from any thread."""

    def __init__(
        self, group: FlashGroup, calls: Sequence[Call], spot: Spot, entry: Entry, communicator: Communicator, works: Any
    ) -> None:
        super().__init__()
        self.calls = calls
        self.spot = spot
        self.entry = entry
        self.slots: Sequence[Any] = ()
        self.kept: Sequence[bytes] | None = None
        self.device: torch.device | None = None
        self.source = -1
        self._group = group
        self._communicator: Communicator | None = communicator
        self._works: Sequence[Any] = works
        self._error: Exception | None = None
        self._done = False
        self.reported = False
        self._waiter: threading.Thread | None = None
        # Waiting twice for a gloo point-to-point work blocks for ever: the second waits for a second message.
        self._lock = threading.Lock()

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.reported:
            self._group.finish(self, timeout)
        return True

    def await_attempt(self, timeout: timedelta | None, host: bool) -> bool:
        """Wait for the attempt as it is now; raises what the communicator raised, or ``Severed``. Returns whether the
        operation is known to be complete on the device (``host`` insists on it)."""
        with self._lock:
            communicator = self._communicator
            if self._error is not None:
                raise self._error
            if self._done or communicator is None:
                return True
            transport = communicator.transport(self.calls[0].outputs or self.calls[0].inputs)
            for work in self._works:
                if work is None:
                    continue  # the backend has finished it already
                if host:
                    transport.finish(work)
                else:
                    transport.wait(work, timeout)
            if communicator.severed is not None:
                # An aborted NCCL operation "completes" on its stream: aborted is not completed.
                transport.settle()
                raise Severed(communicator.severed)
            complete = host or transport.host_synchronous
            if complete:
                self.settle()
            return complete

    def settle(self) -> None:
        """It is over: let go of the communicator, so that it can be freed."""
        if self._works and self.calls[0].name == "recv_anysource" and self._error is None:
            self.source = int(self._works[0]._source_rank())
        self._done = True
        self._communicator = None
        self._works = ()

    def abandon(self) -> None:
        """The attempt failed. What it holds of its communicator goes now, not with the next garbage collection."""
        self._communicator = None
        self._works = ()
        self._error = None

    def renew(self, communicator: Communicator, entry: Entry, works: Sequence[Any]) -> None:
        """A retry: the same work object now stands for the operation on another communicator."""
        self._communicator = communicator
        self._works = works
        self.entry = entry

    def poll(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # somebody is waiting for it at this moment
        try:
            communicator = self._communicator
            if self._done or communicator is None or self._error is not None:
                return
            if any(work is not None and not work.is_completed() for work in self._works):
                return
            if communicator.severed is not None:
                self._fail(Severed(communicator.severed))
            elif all(work is None or work.is_success() for work in self._works):
                self._group.ledger.complete(self.entry)
            else:
                self._group.ledger.fail(self.entry, f"{self.spot.operation} failed")
        finally:
            self._lock.release()

    def drain(self) -> None:
        """Gloo's point-to-point works never say that they are complete unless somebody waits, so a thread does."""
        communicator = self._communicator
        if communicator is None or not communicator.default.host_synchronous or self._waiter is not None:
            return
        if self.calls[0].name in POINT_TO_POINT and self._error is None:
            self._waiter = threading.Thread(target=self._wait_quietly, name="flashrecovery-drain", daemon=True)
            self._waiter.start()

    def _wait_quietly(self) -> None:
        try:
            self.await_attempt(None, host=True)
            self._group.ledger.complete(self.entry)
        except RuntimeError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = error  # for whoever waits for it later
        self._group.ledger.fail(self.entry, str(error).partition("\n")[0])

    def is_completed(self) -> bool:
        return self._done or all(work is None or work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return self._done or all(work is None or work.is_success() for work in self._works)

    def exception(self) -> Any:
        return None if self._done else next((work.exception() for work in self._works if work is not None), None)

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        for work in self._works:
            work.block_current_stream()

    def result(self) -> list[torch.Tensor]:
        return [tensor for call in self.calls for tensor in call.outputs]

    def source_rank(self) -> int:
        return int(self._works[0]._source_rank()) if self._works else self.source

    _source_rank = source_rank

    def get_future(self) -> Any:
        """The communicator's own future: who waits on it instead of on the work is not parked when it fails."""
        if self._works and self._works[0] is not None and not self._done:
            return self._works[0].get_future()
        return _finished_future(self.result())


class AnsweredWork(dist.Work):
    """An operation that was answered without communication: by a peer's result, or from the record of the start."""

    def __init__(self, outputs: list[torch.Tensor], source: int = -1) -> None:
        super().__init__()
        self._outputs = outputs
        self._source = source

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        pass

    def block_current_stream(self) -> None:
        pass

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def source_rank(self) -> int:
        return self._source

    _source_rank = source_rank

    def get_future(self) -> Any:
        return _finished_future(self._outputs)


def _finished_future(value: list[torch.Tensor]) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(value)
    return future
