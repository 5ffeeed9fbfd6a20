"""NCCL as a transport that can be severed: abort all at once, and never believe an operation that an abort ended.

The host runs ahead of the device, and an aborted operation completes on its stream with garbage. Therefore an operation
is complete only if the device event behind it completed while no abort had begun; and aborts run on a thread of their
own, because ``ncclCommAbort`` may wait for a kernel that waits for another communicator (NVIDIA/nccl#1013,
pytorch#119797).
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from megatron_flashrecovery.comm.communicator import TRANSPORTS, GroupIdentity, Progress, Severed
from megatron_flashrecovery.core.errors import ConfigError

_HEARTBEAT_SECONDS = 3600
"""Longer than any fence of ours: torch's monitor ends the process when its own watchdog is late."""


def nccl_environment() -> Mapping[str, str]:
    """What must be set before any group exists: torch's watchdog must leave errors and aborts to us."""
    return {
        # 3, the default, tears the process down when a peer fails (pytorch ProcessGroupNCCL.hpp, ErrorHandlingMode).
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_PROPAGATE_ERROR": "0",
        # An error that the watchdog sees makes every process of the job write a report and end a heartbeat timeout
        # later; whoever closes the group waits for that. The watchdog waits four times as long as a report may take.
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(_HEARTBEAT_SECONDS),
    }


def contradictions(environ: Mapping[str, str]) -> list[str]:
    """One line for each setting of the user's that recovery cannot live with."""
    wrong = [
        f"{name}={environ[name]} contradicts flash recovery, which needs {value}: unset it"
        for name, value in nccl_environment().items()
        if name in environ and name != "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC" and environ[name] != value
    ]
    heartbeat = environ.get("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(_HEARTBEAT_SECONDS))
    if not heartbeat.isdigit() or int(heartbeat) < _HEARTBEAT_SECONDS:
        wrong.append(
            f"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC={heartbeat} is shorter than a fence may take: "
            f"use at least {_HEARTBEAT_SECONDS}, or unset it"
        )
    # The old spellings are read as well, and blocking waits end with an abort that is not ours.
    wrong += [
        f"{name} contradicts flash recovery: unset it"
        for name in (
            *("NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT", "TORCH_NCCL_BLOCKING_WAIT"),
            *("NCCL_DESYNC_DEBUG", "TORCH_NCCL_DESYNC_DEBUG"),  # turns the handling of errors on again
        )
        if environ.get(name, "0") != "0"
    ]
    if environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":  # does the same
        wrong.append("TORCH_DISTRIBUTED_DEBUG=DETAIL contradicts flash recovery: use INFO, or unset it")
    return wrong


class NcclTransport:
    """One ``ProcessGroupNCCL``; it may hold several NCCL communicators (point-to-point pairs have their own)."""

    host_synchronous = False

    def __init__(self, identity: GroupIdentity, store: Store) -> None:
        if not dist.is_nccl_available():
            raise ConfigError("this torch has no NCCL: use --distributed-backend gloo, or a build for CUDA")
        self.backend_type = dist.ProcessGroup.BackendType.NCCL
        self._device = identity.device
        self._aborting = threading.Event()
        self._aborted = threading.Event()
        self.backend: Any = dist.ProcessGroupNCCL(store, identity.rank, identity.size, _options(identity))
        self.backend._set_sequence_number_for_group()

    def connect(self) -> None:
        # Eagerly, or the first operation after a recovery would wait for whoever is late, and look like a hang.
        device = self._device or torch.device("cuda", torch.cuda.current_device())
        self.backend.eager_connect_single_device(device)

    def mark(self) -> NcclMark:
        return NcclMark()

    def wait(self, work: dist.Work, timeout: timedelta | None) -> None:
        work.wait() if timeout is None else work.wait(timeout)

    def finish(self, work: dist.Work) -> None:
        work.wait()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
        if self._aborting.is_set():
            raise Severed("aborted while the operation was under way")

    def succeeded(self, work: dist.Work) -> bool:
        # Asking whether it succeeded raises (WorkNCCL::isSuccess is deprecated). Waiting for what is over does not
        # block, and raises what NCCL has reported.
        try:
            work.wait()
        except RuntimeError:
            return False
        return not self._aborting.is_set()

    def error(self) -> str | None:
        """What torch's watchdog has seen: who waits on a stream is not told of the errors of a peer or a network."""
        backend = self.backend
        if backend is None or self._aborting.is_set() or not hasattr(backend, "get_error"):
            return None
        found = backend.get_error()
        return None if found.name == "SUCCESS" else f"NCCL reports {found.name}"

    def sever(self) -> None:
        self.sever_batch([self])

    @staticmethod
    def sever_batch(transports: Sequence[NcclTransport]) -> None:
        """Abort all of them at once, on other threads; ``settle`` waits for that."""
        transports = [transport for transport in transports if not transport._aborting.is_set()]
        if not transports:
            return
        for transport in transports:
            transport._aborting.set()
        threading.Thread(target=_abort, args=(tuple(transports),), name="flashrecovery-abort", daemon=True).start()

    def settle(self, on_wait: Callable[[], None] = lambda: None) -> None:
        deadline = time.monotonic() + _ABORT_DEADLINE.total_seconds()
        while self._aborting.is_set() and not self._aborted.wait(_LOOK):
            if time.monotonic() > deadline:
                raise Severed(f"an abort did not end within {_ABORT_DEADLINE}: this device is lost")
            on_wait()

    def close(self, gently: bool) -> None:
        # No rank of a node may free what another has not aborted (NVIDIA/nccl#863): the session reports only after
        # ``settle``, and nobody rebuilds before all have reported.
        if gently and not self._aborting.is_set():
            self.backend.shutdown()
        else:
            self.sever()
            self.settle()
        self.backend = None


class NcclMark:
    """An event on the current stream of the thread that makes it, for which the operation waits. Two microseconds of
    the host."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def look(self, works: Sequence[dist.Work | None]) -> Progress:
        try:
            # A thread that has named no device would make a context on the first one, of some hundred MiB.
            with torch.cuda.device(self._device):
                if all(work is None or work.is_completed() for work in works):
                    return Progress.OVER
                is_reached: bool = self._event.query()  # type: ignore[no-untyped-call]
                return Progress.INSIDE if is_reached else Progress.BEFORE
        except RuntimeError:
            # The device has an error, which its own thread is about to hear of: nothing is claimed here.
            return Progress.OVER


_ABORT_DEADLINE = timedelta(seconds=30)
_LOOK = 0.2


def _abort(transports: Sequence[NcclTransport]) -> None:
    # All at once. An abort waits for kernels that may wait for those of another communicator, and torch does each on a
    # thread of its own, where a group of calls begun here does not reach (ProcessGroupNCCL::abort).
    threads = [threading.Thread(target=_abort_one, args=(transport,), daemon=True) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # None is settled before all are: nobody frees one while another is still being aborted.
    for transport in transports:
        transport._aborted.set()


def _abort_one(transport: NcclTransport) -> None:
    # An abort that fails leaves a communicator that is dead anyway.
    with contextlib.suppress(RuntimeError):
        if transport.backend is not None:
            transport.backend.abort()


def _options(identity: GroupIdentity) -> dist.ProcessGroupNCCL.Options:
    """A copy of the user's, so that a later communicator starts from the same."""
    given = identity.options
    options = dist.ProcessGroupNCCL.Options() if given is None else copy.deepcopy(given)
    options._timeout = identity.timeout
    options.global_ranks_in_group = [int(rank) for rank in identity.ranks]
    options.group_name = c10d.GroupName(identity.key)
    return options


TRANSPORTS["nccl"] = NcclTransport
