"""One connection of the data plane: frames and long runs of bytes with deadlines, closed by any thread."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol, TypeAlias

from megatron_flashrecovery.comm.codec import Codec, UnknownMessage
from megatron_flashrecovery.comm.descriptors import receive_with_descriptors, send_with_descriptors
from megatron_flashrecovery.core.errors import LinkLost

Buffer: TypeAlias = "bytes | memoryview"

_LENGTH = struct.Struct("!I")
_FRAME_LIMIT_NBYTES = 16 << 20
# Measured (`bench mirror`, loopback): with shorter chunks the receiver wakes, and takes the GIL, too often.
_CHUNK_NBYTES = 4 << 20
_DESCRIPTOR = b"M"
_TIMEVAL = struct.Struct("@ll")


class Digest(Protocol):
    def update(self, data: memoryview) -> None: ...


class Deadline:
    """``seconds`` from now; ``None`` never ends."""

    def __init__(self, seconds: float | None) -> None:
        self._ends = None if seconds is None else time.monotonic() + seconds
        self.seconds = seconds

    def left(self) -> float | None:
        """At least a moment: raises ``LinkLost`` instead of returning zero."""
        if self._ends is None:
            return None
        left = self._ends - time.monotonic()
        if left <= 0:
            raise self.missed()
        return left

    def missed(self) -> LinkLost:
        return LinkLost(f"no answer within {self.seconds} s")


class Stream:
    """Owns ``sock``. One thread at a time sends or receives; ``close`` from any other makes that raise ``LinkLost``."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        # Blocking, with the kernel's own time limits: a socket with a Python timeout is polled, returns what is there
        # (64 KiB, say), and takes the GIL from the training thread each time.
        sock.setblocking(True)
        self._sock = sock
        self._codec = codec
        self._in_use = threading.Lock()
        self._ended = False

    def send(self, parts: Sequence[Buffer], deadline: Deadline) -> None:
        """All of the parts, in as few calls as the kernel takes."""
        left = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        while left:
            with self._in_use:
                self._limit(socket.SO_SNDTIMEO, deadline)
                try:
                    sent = self._sock.sendmsg(left, (), socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    raise deadline.missed() from None
                except OSError as error:
                    raise LinkLost(f"sending: {error.strerror}") from None
            left = list(_without_first(left, sent))

    def receive_into(self, view: memoryview, deadline: Deadline, digest: Digest | None = None) -> None:
        """Fill ``view``; ``digest`` reads each chunk while it is still in the cache."""
        at = 0
        while at < len(view):
            chunk = view[at : at + _CHUNK_NBYTES]
            got = self._receive_some(chunk, deadline)
            if digest is not None:
                digest.update(chunk[:got])
            at += got

    def drain(self, nbytes: int, deadline: Deadline) -> None:
        """Read and forget, so that a peer in the middle of sending can hear an answer."""
        scratch = memoryview(bytearray(min(nbytes, _CHUNK_NBYTES)))
        while nbytes > 0:
            nbytes -= self._receive_some(scratch[: min(nbytes, len(scratch))], deadline)

    def receive(self, nbytes: int, deadline: Deadline) -> bytes:
        data = bytearray(nbytes)
        self.receive_into(memoryview(data), deadline)
        return bytes(data)

    def say(self, message: object, deadline: Deadline, *body: Buffer) -> None:
        """A message, and in the same call what follows it."""
        data = self._codec.encode(message)
        self.send([_LENGTH.pack(len(data)), data, *body], deadline)

    def hear(self, deadline: Deadline) -> object:
        (length,) = _LENGTH.unpack(self.receive(_LENGTH.size, deadline))
        if length > _FRAME_LIMIT_NBYTES:
            raise LinkLost(f"a frame of {length} bytes is none of ours")
        try:
            return self._codec.decode(self.receive(length, deadline))
        except UnknownMessage as error:
            raise LinkLost(str(error)) from None

    def send_descriptor(self, fd: int, deadline: Deadline) -> None:
        """Within this machine: the other end gets its own descriptor of what ``fd`` is."""
        with self._in_use:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                send_with_descriptors(self._sock, _DESCRIPTOR, [fd])
            except BlockingIOError:
                raise deadline.missed() from None
            except OSError as error:
                raise LinkLost(f"lending memory: {error.strerror}") from None

    def receive_descriptor(self, deadline: Deadline) -> int:
        """The caller's to close."""
        with self._in_use:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                said, fds = receive_with_descriptors(self._sock, len(_DESCRIPTOR), 1)
            except BlockingIOError:
                raise deadline.missed() from None
            except OSError as error:
                raise LinkLost(f"borrowing memory: {error.strerror}") from None
        if (said, len(fds)) != (_DESCRIPTOR, 1):
            for fd in fds:
                os.close(fd)
            raise LinkLost("memory was to be lent, and no descriptor came")
        return fds[0]

    def check(self) -> None:
        """For who works for long without a word. Raises ``LinkLost`` if this end was closed meanwhile."""
        if self._ended:
            raise LinkLost("closed here")

    def close(self) -> None:
        self._ended = True
        # Shutting down wakes whoever is inside; the descriptor goes only once nobody is, lest it be reused under them.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._in_use:
            self._sock.close()

    def _receive_some(self, view: memoryview, deadline: Deadline) -> int:
        with self._in_use:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                got = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise deadline.missed() from None
            except OSError as error:
                raise LinkLost(f"receiving: {error.strerror}") from None
        if got == 0:
            raise LinkLost("the peer closed the connection")
        return got

    def _limit(self, option: int, deadline: Deadline) -> None:
        left = deadline.left() or 0.0  # zero means no limit to the kernel, too
        try:
            self._sock.setsockopt(
                socket.SOL_SOCKET, option, _TIMEVAL.pack(int(left), int(left % 1 * 1e6) or (left > 0))
            )
        except OSError as error:
            raise LinkLost(f"closed here: {error.strerror}") from None


def _without_first(parts: Iterable[memoryview], nbytes: int) -> Iterable[memoryview]:
    for part in parts:
        if nbytes >= len(part):
            nbytes -= len(part)
        else:
            yield part[nbytes:]
            nbytes = 0
