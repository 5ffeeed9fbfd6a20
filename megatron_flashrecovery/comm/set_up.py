"""The set-up of a library, which nobody can free from outside, done where it may be left behind.

All members have met when it begins, and it takes milliseconds with gloo and up to seconds with NCCL; but a member may
die in them. Then the others wait in it until the timeout, each with the lock of its connection to the store: no order
would be heard, and no key be read. So it runs in a thread, with a connection that nobody else uses. Whoever is told
that the group is severed goes away, and what is left behind ends by itself: of gloo and of NCCL's first steps when
their wait for the store times out, of NCCL's later ones when the connection to the dead member does. Until then such a
thread holds nothing that the next set-up needs. With NCCL nobody has run this yet.

What NCCL sets up in the first operations of a group after a start stays where torch does it, on the thread of the
operation: to do it beforehand would change which communicators carry single sends and receives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_flashrecovery.comm.communicator import Communicator, GroupIdentity, Severed

_LOOK = 0.02


@dataclass
class _Result:
    is_over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: Communicator | None = None
    error: Exception | None = None
    is_abandoned: bool = False


class SetUp:
    """Of one rank; its methods are for the main thread."""

    def __init__(self, store: Store) -> None:
        self._shared = store
        self._own: Store | None = None

    def make(
        self, identity: GroupIdentity, prefix: str, severed: Callable[[], str | None], eagerly: bool
    ) -> Communicator:
        """Raises ``Severed`` with what ``severed`` says, if it says something meanwhile, and ``RuntimeError`` if the
        others do not connect. ``eagerly``: also what the first operation would set up."""
        # Here: a rank that never takes part in a recovery needs no second connection.
        own = self._own = self._own or self._shared.clone()  # type: ignore[attr-defined]  # missing in torch's stub
        result = _Result()
        work = (identity, PrefixStore(prefix, own), eagerly, _on_device_of(identity), result)
        threading.Thread(target=_make, args=work, name="flashrecovery-connect", daemon=True).start()
        while not result.is_over.wait(_LOOK):
            reason = severed()
            if reason is not None and _abandon(result):
                self._own = None  # the thread may be inside of it for as long as it waits
                raise Severed(reason)
        if result.error is not None:
            self._own = None  # a wait in it may have been given up half way, and its answer still come
            raise result.error
        assert result.made is not None
        return result.made


def _on_device_of(identity: GroupIdentity) -> AbstractContextManager[object]:
    """A thread that names no device works on the first one."""
    if all(name != "nccl" for _, name in identity.backends):
        return nullcontext()
    return torch.cuda.device(identity.device or torch.cuda.current_device())


def _make(
    identity: GroupIdentity, store: Store, eagerly: bool, on_device: AbstractContextManager[object], result: _Result
) -> None:
    try:
        with on_device:
            made = Communicator(identity, store)
            if eagerly:
                made.connect()
    except Exception as error:  # for whoever waits; a thread has nobody else to tell
        result.error = error
        result.is_over.set()
        return
    with result.lock:
        if not result.is_abandoned:
            result.made = made
    result.is_over.set()
    if result.made is None:
        made.close()


def _abandon(result: _Result) -> bool:
    """Unless it has just been made: then it is severed as any other is."""
    with result.lock:
        result.is_abandoned = result.made is None and result.error is None
        return result.is_abandoned
