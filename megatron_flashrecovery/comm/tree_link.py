"""One link of a tree: frames over a TCP connection between two members, from which any thread can wake the one inside.

Who is woken in the middle of a frame leaves the rest of it with the link, so a link stays usable after an aborted
operation: both sides exchange a marker of the new epoch, and whatever arrives before it is discarded.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import suppress
from enum import IntEnum

from megatron_flashrecovery.comm.communicator import Severed

_HEADER = struct.Struct("<IQQ")


class LinkBroken(RuntimeError):
    """The member at the other end is gone, or answers what nobody asked."""


class LinkTimeout(RuntimeError):
    """Nothing came before the deadline; the link itself may be whole."""


class Kind(IntEnum):
    DATA = 1
    MARKER = 2


class Wake:
    """Wakes every thread that is inside a link of the tree. Rung from any thread, cleared on the main thread."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self, reason: str) -> None:
        self.reason = self.reason or reason
        os.eventfd_write(self.descriptor, 1)

    def clear(self) -> None:
        self.reason = None
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def check(self) -> None:
        """Raises ``Severed`` when rung."""
        if self.reason is not None:
            raise Severed(self.reason)

    def wait(self, which: socket.socket | None, deadline: float, event: int = select.POLLIN) -> None:
        """Until ``which`` is ready. Raises ``Severed`` when rung, ``LinkTimeout`` at the deadline."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        if which is not None:
            poll.register(which, event)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        self.check()
        if not ready:
            raise LinkTimeout("the other side of a tree link did not answer in time")

    def close(self) -> None:
        os.close(self.descriptor)


class TreeLink:
    """Used by one thread at a time. ``deadline`` is on the monotonic clock."""

    def __init__(self, connection: socket.socket, wake: Wake) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._wake = wake
        self._unsent = bytearray()
        self._received = bytearray()
        self._marker: int | None = None

    def send(self, kind: Kind, number: int, payload: bytes, deadline: float) -> None:
        self._unsent += _HEADER.pack(kind, number, len(payload)) + payload
        while self._unsent:
            try:
                del self._unsent[: self._connection.send(self._unsent)]
            except BlockingIOError:
                self._wake.wait(self._connection, deadline, select.POLLOUT)
            except OSError as error:
                raise LinkBroken(f"tree link broken: {error}") from None

    def receive(self, deadline: float) -> tuple[Kind, int, bytes]:
        self._fill(_HEADER.size, deadline)
        kind, number, nbytes = _HEADER.unpack_from(self._received)
        self._fill(_HEADER.size + nbytes, deadline)
        payload = bytes(self._received[_HEADER.size : _HEADER.size + nbytes])
        del self._received[: _HEADER.size + nbytes]
        return Kind(kind), number, payload

    def data(self, number: int, deadline: float) -> bytes:
        """The payload of the operation with this number; ``LinkBroken`` if the other side is in another one."""
        kind, found, payload = self.receive(deadline)
        if kind is Kind.MARKER:
            # The other side is on its way to a new epoch already. Its marker comes once, so it is kept for ``relink``.
            self._marker = found
            raise LinkBroken(f"tree link: the other side has left for epoch {found}")
        if kind is not Kind.DATA or found != number:
            raise LinkBroken(f"tree link: the other side is in operation {found}, this one in {number}")
        return payload

    def try_marker(self, epoch: int, deadline: float) -> bool:
        """Discard everything up to the marker of this epoch. False when it did not come before ``deadline``, or never
        will because the link is broken."""
        try:
            while self._marker != epoch:
                kind, number, _ = self.receive(deadline)
                if kind is Kind.MARKER:
                    self._marker = number
            return True
        except LinkBroken:
            return False

    def close(self) -> None:
        self._connection.close()

    def _fill(self, nbytes: int, deadline: float) -> None:
        while len(self._received) < nbytes:
            try:
                part = self._connection.recv(max(4096, nbytes - len(self._received)))
            except BlockingIOError:
                self._wake.wait(self._connection, deadline)
                continue
            except OSError as error:
                raise LinkBroken(f"tree link broken: {error}") from None
            if not part:
                raise LinkBroken("tree link broken: the other side closed it")
            self._received += part
