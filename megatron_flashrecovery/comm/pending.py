"""The work that a handle returns: it settles its ledger entry, and asks the session what to do when it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Communicator, Mark, Progress, Severed, sever_together
from megatron_flashrecovery.comm.ledger import Entry
from megatron_flashrecovery.comm.operation import POINT_TO_POINT, Call
from megatron_flashrecovery.comm.recording import Slot
from megatron_flashrecovery.comm.tree import Tree
from megatron_flashrecovery.core.reports import Spot

if TYPE_CHECKING:
    from megatron_flashrecovery.comm.handle import FlashGroup


class PendingWork(dist.Work):
    """One or several issued operations (a batch is one). Waiting twice is allowed, from any thread."""

    def __init__(self, group: FlashGroup, calls: Sequence[Call], spot: Spot, device: torch.device | None) -> None:
        super().__init__()
        self.calls = calls
        self.spot = spot
        self.device = device
        self.entry: Entry
        self.slots: Sequence[Slot] = ()
        self.kept: Sequence[bytes] | None = None
        self.source = -1
        self.reported = False
        self._group = group
        self._carrier: Communicator | Tree | None = None
        self._works: Sequence[dist.Work | None] = ()
        self._mark: Mark | None = None
        self.issued_at = 0.0
        self._error: Exception | None = None
        self._done = False
        self._waiter: threading.Thread | None = None
        # Waiting twice for a gloo point-to-point work blocks for ever: the second waits for a second message.
        self._lock = threading.Lock()

    def begin(
        self,
        carrier: Communicator | Tree,
        entry: Entry,
        works: Sequence[dist.Work | None],
        mark: Mark | None = None,
    ) -> None:
        """An attempt: the operation is now under way on this carrier."""
        self._carrier = carrier
        if mark is not None:
            self._mark, self.issued_at = mark, time.monotonic()
        self._works = works
        self.entry = entry
        self._waiter = None

    def progress(self) -> Progress:
        """How far the device is with it, as far as the host does not wait for it anyway. From any thread."""
        mark, works = self._mark, self._works
        return Progress.OVER if mark is None or not works else mark.look(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises ``Severed`` for a work that a recovery discarded: its outputs are nobody's."""
        if not self.reported:
            self._group.finish(self, timeout)
        return True

    @property
    def discarded(self) -> bool:
        """A recovery unwound the call that issued it, or replaced the communicator under it."""
        return not self._done and (self._carrier is None or self._carrier.closed)

    def await_attempt(self, timeout: timedelta | None, host: bool, only_on: Communicator | Tree | None = None) -> bool:
        """Wait for the attempt as it is now; raises what the communicator raised, or ``Severed``. Returns whether the
        operation is known to be complete on the device (``host`` insists on it). ``only_on``: nothing is waited for,
        and nothing known, if that attempt has been abandoned."""
        with self._lock:
            carrier = self._carrier
            if self._error is not None:
                raise self._error
            if self._done:
                return True
            if only_on is not None and carrier is not only_on:
                return False
            assert carrier is not None, "asked only for works that are not discarded"
            transport = carrier.transport(self.calls[0].outputs or self.calls[0].inputs)
            for work in self._works:
                if work is None:
                    continue  # the backend has finished it already
                if host:
                    transport.finish(work)
                else:
                    transport.wait(work, timeout)
            if self._carrier is not carrier:
                return False  # abandoned meanwhile: what has ended is not what is under way now
            if carrier.severed is not None:
                # An aborted NCCL operation "completes" on its stream: aborted is not completed.
                transport.settle()
                raise Severed(carrier.severed)
            complete = host or transport.host_synchronous
            if complete:
                self.settle()
            return complete

    def settle(self) -> None:
        """It is over: let go of the communicator, so that it can be freed."""
        first = self._works[0] if self._works else None
        if first is not None and self.calls[0].name == "recv_anysource" and self._error is None:
            self.source = first._source_rank()
        self._done = True
        self._carrier = self._mark = None
        self._works = ()

    def sever(self, reason: str) -> None:
        if isinstance(self._carrier, Communicator):
            sever_together([self._carrier], reason)

    def abandon(self) -> None:
        """The attempt failed. What it holds of its communicator goes now, not with the next garbage collection."""
        self._carrier = self._mark = None
        self._works = ()
        self._error = None

    def answered(self) -> None:
        self._done = self.reported = True

    def poll(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # somebody is waiting for it at this moment
        try:
            carrier = self._carrier
            if self._done or carrier is None or self._error is not None:
                return
            if any(work is not None and not work.is_completed() for work in self._works):
                return
            if carrier.severed is not None:
                self._fail(Severed(carrier.severed))
            elif self._succeeded(carrier):
                self._group.ledger.complete(self.entry)
            else:
                self._group.ledger.fail(self.entry, f"{self.spot.operation} failed")
        finally:
            self._lock.release()

    def drain(self) -> None:
        """Gloo's point-to-point works never say that they are complete unless somebody waits, so a thread does."""
        carrier = self._carrier
        if carrier is None or not carrier.default.host_synchronous or self._waiter is not None:
            return
        if self.calls[0].name in POINT_TO_POINT and self._error is None:
            wait = partial(self._wait_quietly, carrier, self.entry)
            self._waiter = threading.Thread(target=wait, name="flashrecovery-drain", daemon=True)
            self._waiter.start()

    def _wait_quietly(self, carrier: Communicator | Tree, entry: Entry) -> None:
        """The main thread may abandon the attempt at any time; then it is no affair of this thread any more."""
        try:
            is_complete = self.await_attempt(None, host=True, only_on=carrier)
        except RuntimeError as error:
            if self._carrier is carrier:
                self._fail(error)
            return
        if is_complete:
            self._group.ledger.complete(entry)

    def _succeeded(self, carrier: Communicator | Tree) -> bool:
        transport = carrier.transport(self.calls[0].outputs or self.calls[0].inputs)
        return all(work is None or transport.succeeded(work) for work in self._works)

    def _fail(self, error: Exception) -> None:
        self._error = error  # for whoever waits for it later
        self._group.ledger.fail(self.entry, str(error).partition("\n")[0])

    def is_completed(self) -> bool:
        return self._done or all(work is None or work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        carrier = self._carrier
        return self._done or carrier is None or self._succeeded(carrier)

    def exception(self) -> object:
        return None if self._done else next((work.exception() for work in self._works if work is not None), None)

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        for work in self._works:
            if work is not None:
                work.block_current_stream()

    def result(self) -> list[torch.Tensor]:
        return [tensor for call in self.calls for tensor in call.outputs]

    def source_rank(self) -> int:
        first = self._works[0] if self._works else None
        return first._source_rank() if first is not None else self.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
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

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        return _finished_future(self._outputs)


def _finished_future(value: list[torch.Tensor]) -> torch.futures.Future[list[torch.Tensor]]:
    future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
    future.set_result(value)
    return future
