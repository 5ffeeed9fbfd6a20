"""One TCP connection of the data plane: frames and long runs of bytes with deadlines, closed by any thread."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from megatron_flashrecovery.comm.codec import Codec, UnknownMessage
from megatron_flashrecovery.core.errors import LinkLost

Buffer: TypeAlias = "bytes | memoryview"

_LENGTH = struct.Struct("!I")
_FRAME_LIMIT_NBYTES = 16 << 20
# Measured (`bench mirror`, loopback): with a larger socket buffer its bytes leave the cache before they are read, which
# costs a quarter more CPU time; with shorter chunks the receiver wakes, and takes the GIL, too often.
_CHUNK_NBYTES = 4 << 20
_SOCKET_BUFFER_NBYTES = 1 << 20
_TIMEVAL = struct.Struct("@ll")
_KEEPALIVE_S = 10


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


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        host, _, port = text.rpartition(":")
        return Address(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Stream:
    """Owns ``sock``. One thread at a time sends or receives; ``close`` from any other makes that raise ``LinkLost``."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        # Blocking, with the kernel's own time limits: a socket with a Python timeout is polled, returns what is there
        # (64 KiB, say), and takes the GIL from the training thread each time.
        sock.setblocking(True)
        self._sock = sock
        self._codec = codec
        self._in_use = threading.Lock()

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

    def close(self) -> None:
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


def connect(address: Address, codec: Codec, deadline: Deadline) -> Stream:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LinkLost(f"{address}: {error.strerror}") from None
    try:
        prepare(sock)
        sock.settimeout(deadline.left())
        sock.connect(where)
    except OSError as error:
        sock.close()
        raise LinkLost(f"connecting to {address}: {error.strerror or 'no answer'}") from None
    return Stream(sock, codec)


def prepare(sock: socket.socket) -> None:
    """Before it listens or connects: the window is settled then. What is accepted inherits all of this."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        # Where the kernel would cut it short, asking is worse than not asking: it ends the kernel's own tuning.
        if _limit_of(limit) >= _SOCKET_BUFFER_NBYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_NBYTES)
    # A guest may say nothing for a whole step. Whether its machine still exists, the kernel asks meanwhile.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        sock.setsockopt(socket.IPPROTO_TCP, option, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _limit_of(name: str) -> int:
    try:
        return int(Path("/proc/sys/net/core", name).read_text())
    except OSError:
        return 0


def _without_first(parts: Iterable[memoryview], nbytes: int) -> Iterable[memoryview]:
    for part in parts:
        if nbytes >= len(part):
            nbytes -= len(part)
        else:
            yield part[nbytes:]
            nbytes = 0
