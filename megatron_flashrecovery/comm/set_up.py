"""The set-up of a library, which nobody can free from outside, done where it may be left behind.

All members have met when it begins, and it takes milliseconds with gloo and up to seconds with NCCL; but a member may
die in them. Then the others wait in it until the timeout, each with the lock of its connection to the store: no order
would be heard, and no key be read. So it runs in a thread, with a connection that nobody else uses. Whoever is told
that the group is severed goes away, and what is left behind ends by itself: of gloo and of NCCL's first steps when
their wait for the store times out, of NCCL's later ones when the connection to the dead member does. Until then such a
thread holds nothing that the next set-up needs. Frameworks that bind no device to their groups have NCCL connect in the
first operation of a group, which is in the first step; that goes the same way. With NCCL nobody has run this yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_flashrecovery.comm.communicator import Communicator, GroupIdentity, Severed

_LOOK = 0.02
T = TypeVar("T")


@dataclass
class _Result(Generic[T]):
    is_over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: list[T] = field(default_factory=list)
    error: Exception | None = None
    is_abandoned: bool = False


class SetUp:
    """Of one rank. Everything here raises ``Severed`` with what ``severed`` says, if it says something meanwhile, and
    ``RuntimeError`` if the others do not connect."""

    def __init__(self, store: Store) -> None:
        self._shared = store
        self._own: Store | None = None

    def store(self) -> Store:
        """A connection in which somebody may be left behind."""
        # Only now: a rank that needs none does without a second connection.
        own = self._own = self._own or self._shared.clone()  # type: ignore[attr-defined]  # missing in torch's stub
        return own

    def make(self, identity: GroupIdentity, prefix: str, severed: Callable[[], str | None]) -> Communicator:
        """With what the first operation would set up."""
        store, on_device = PrefixStore(prefix, self.store()), _on_device_of(identity)

        def make() -> Communicator:
            with on_device:
                made = Communicator(identity, store)
                made.connect()
            return made

        return self._run_or_leave(make, lambda left: left.close(), severed)

    def connect(self, identity: GroupIdentity, connect: Callable[[], None], severed: Callable[[], str | None]) -> None:
        """What was made without, before its first operation."""
        on_device = _on_device_of(identity)

        def run() -> None:
            with on_device:
                connect()

        self._run_or_leave(run, lambda _: None, severed)

    def _run_or_leave(self, do: Callable[[], T], leave: Callable[[T], None], severed: Callable[[], str | None]) -> T:
        result = _Result[T]()
        threading.Thread(target=_run, args=(do, leave, result), name="flashrecovery-connect", daemon=True).start()
        while not result.is_over.wait(_LOOK):
            reason = severed()
            if reason is not None and _abandon(result):
                self._own = None  # the thread may be inside of it for as long as it waits
                raise Severed(reason)
        if result.error is not None:
            self._own = None  # a wait in it may have been given up half way, and its answer still come
            raise result.error
        (made,) = result.made
        return made


def _on_device_of(identity: GroupIdentity) -> AbstractContextManager[object]:
    """A thread that names no device works on the first one."""
    if all(name != "nccl" for _, name in identity.backends):
        return nullcontext()
    return torch.cuda.device(identity.device or torch.cuda.current_device())


def _run(do: Callable[[], T], leave: Callable[[T], None], result: _Result[T]) -> None:
    try:
        made = do()
    except Exception as error:  # for whoever waits; a thread has nobody else to tell
        result.error = error
        result.is_over.set()
        return
    with result.lock:
        if not result.is_abandoned:
            result.made.append(made)
    result.is_over.set()
    if result.is_abandoned:
        leave(made)


def _abandon(result: _Result[T]) -> bool:
    """Unless it is just done: then it is severed as any other is."""
    with result.lock:
        result.is_abandoned = not result.made and result.error is None
        return result.is_abandoned
