"""A communicator: the part of a group that is replaced, a full ``dist.ProcessGroup`` with live backends on it.

torch dispatches names that backends lack (``all_gather_single``, ``reduce_scatter_single_coalesced``), so operations go
to a process group, never to the backend itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_flashrecovery.comm.operation import Call
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import GroupKey, Rank


class Severed(RuntimeError):
    """The operation was under way when its communicator was severed: whatever it left in its outputs is garbage."""


@dataclass(frozen=True)
class GroupIdentity:
    """What stays the same of a group however often its communicator is replaced. ``ranks`` are global, ``rank`` is ours
    within the group; ``backends`` maps device types to backend names."""

    key: GroupKey
    ranks: tuple[Rank, ...]
    rank: int
    backends: tuple[tuple[str, str], ...]
    timeout: timedelta
    options: Any = None
    device: torch.device | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


class Progress(Enum):
    """Where the device is, seen from an operation that was issued."""

    BEFORE = "before"
    """At something of its own that was issued earlier."""
    INSIDE = "inside"
    """All that was issued earlier is done, and only the others are waited for."""
    OVER = "over"


class Mark(Protocol):
    """Put on the device's stream right before an operation was issued."""

    def look(self, works: Sequence[dist.Work | None]) -> Progress:
        """Of the operation that these works are. From any thread; does not block, and raises nothing."""


class Transport(Protocol):
    """One backend of one communicator."""

    backend: Any
    backend_type: dist.ProcessGroup.BackendType
    host_synchronous: bool
    """Waiting for a work blocks the host until it is done. Otherwise it only orders the device's stream."""

    def connect(self) -> None:
        """Set up what would otherwise be set up by the first operation. A collective call."""

    def mark(self) -> Mark | None:
        """On the thread that issues an operation, right before. ``None`` if that is no longer under way than the host
        waits for it."""

    def wait(self, work: dist.Work, timeout: timedelta | None) -> None:
        """Wait as the framework would: on the host for gloo, on the stream for NCCL."""

    def finish(self, work: dist.Work) -> None:
        """Block the host until the operation is complete on the device."""

    def succeeded(self, work: dist.Work) -> bool:
        """Whether an operation that is over has ended well. From any thread; does not block."""

    def error(self) -> str | None:
        """What has gone wrong behind everybody's back, if anything. From any thread; does not block."""

    def sever(self) -> None:
        """Make everybody inside fail at once, remote members included. From any thread; does not block."""

    def settle(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Block until what ``sever`` began is done. ``on_wait`` is called several times a second meanwhile."""

    def close(self, gently: bool) -> None:
        """Free everything. On the main thread, with nobody inside. ``gently``: peers may still be reading."""


class TransportMaker(Protocol):
    def __call__(self, identity: GroupIdentity, store: Store) -> Transport: ...


class Communicator:
    """Created under its own store prefix; severed at most once, from any thread; closed on the main thread."""

    def __init__(self, identity: GroupIdentity, store: Store) -> None:
        self.severed: str | None = None
        self.closed = False
        self._transport_of: dict[str, Transport] = {}
        self.inner = dist.ProcessGroup(store, identity.rank, identity.size)
        made: dict[str, Transport] = {}
        for device, name in identity.backends:
            if name not in made:
                made[name] = _maker(name)(identity, PrefixStore(device, store))
            transport = self._transport_of[device] = made[name]
            self.inner._register_backend(torch.device(device), transport.backend_type, transport.backend)
        # As c10d does: with several backends the accelerator's is the default one.
        first = next((made[name] for name in ("nccl",) if name in made), next(iter(made.values())))
        self.inner._set_default_backend(first.backend_type)
        self.inner._set_group_name(c10d.GroupName(identity.key))
        self.inner._set_group_desc(str(identity.key))
        self.default = first
        self._alone = len(made) == 1

    def transport(self, tensors: Sequence[torch.Tensor]) -> Transport:
        """The one that carries these tensors."""
        if self._alone or not tensors:
            return self.default
        return self._transport_of.get(tensors[0].device.type, self.default)

    @property
    def transports(self) -> Iterable[Transport]:
        return dict.fromkeys(self._transport_of.values())

    def issue(self, calls: Sequence[Call], device: torch.device | None) -> Sequence[dist.Work | None]:
        """One call, or a batch on ``device``."""
        if self.severed is not None:
            raise Severed(self.severed)
        inner = self.inner
        if device is None or len(calls) == 1 or not inner._get_backend(device).supports_coalescing:
            return [call.issue(inner) for call in calls]
        # Group start, all operations, group end: single sends and receives can deadlock 1F1B on NCCL.
        inner._start_coalescing(device)
        for call in calls:
            call.issue(inner)
        return [inner._end_coalescing(device)]

    def connect(self) -> None:
        for transport in self.transports:
            transport.connect()

    def close(self, gently: bool = False) -> None:
        """The inner group and its backends are dropped here: gloo frees sockets and threads with the last reference."""
        self.severed = self.severed or "its communicator was replaced"
        transports = list(self.transports)
        self._transport_of = {}
        self.closed = True
        del self.inner
        for transport in transports:
            transport.close(gently)


def _maker(name: str) -> TransportMaker:
    maker = TRANSPORTS.get(name)
    if maker is None:
        known = ", ".join(sorted(TRANSPORTS))
        raise ConfigError(f"backend {name!r} cannot be recovered: use one of {known}, or leave flash recovery off")
    return maker


def sever_together(communicators: Iterable[Communicator], reason: str) -> None:
    """Mark all before severing any: whoever fails because of one must not trust what another has delivered."""
    fresh = [communicator for communicator in communicators if communicator.severed is None]
    for communicator in fresh:
        communicator.severed = reason
    by_maker: dict[type, list[Transport]] = {}
    for communicator in fresh:
        for transport in communicator.transports:
            by_maker.setdefault(type(transport), []).append(transport)
    for kind, transports in by_maker.items():
        together = getattr(kind, "sever_batch", None)
        if together is not None:
            together(transports)
        else:
            for transport in transports:
                transport.sever()


TRANSPORTS: dict[str, TransportMaker] = {}
"""By the backend's name; the modules of the transports add themselves, tests add theirs."""
