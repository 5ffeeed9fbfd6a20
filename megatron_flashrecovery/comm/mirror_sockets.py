"""Where a worker's end of the data plane is found: over TCP by everybody, and within its machine without a network.

The second way is a Unix socket in the abstract namespace. Its name is drawn at random, so nothing answers to it on any
other machine, nor in a container with a network of its own; who is refused there goes by TCP. Memory can be lent over
it (``mirror_memory``).
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.comm.mirror_stream import Deadline, Stream
from megatron_flashrecovery.core.errors import LinkLost

# Measured (`bench mirror`, loopback): with a larger socket buffer its bytes leave the cache before they are read, which
# costs a quarter more CPU time.
_SOCKET_BUFFER_NBYTES = 1 << 20
_KEEPALIVE_S = 10
_CREDENTIALS = struct.Struct("@iII")


@dataclass(frozen=True)
class Address:
    """``nearby``: the name of the socket for who is on the same machine; empty if there is none."""

    host: str
    port: int
    nearby: str = ""

    @staticmethod
    def parse(text: str) -> Address:
        everywhere, _, nearby = text.partition("/")
        host, _, port = everywhere.rpartition(":")
        return Address(host.strip("[]"), int(port), nearby)

    def __str__(self) -> str:
        everywhere = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"{everywhere}/{self.nearby}" if self.nearby else everywhere


def listen(host: str, nearby: bool) -> tuple[Address, tuple[socket.socket, ...]]:
    """One listener for everybody, and one more for who is on this machine."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        _prepare(listener)
        listener.bind((host, 0))
        listener.listen()
    except BaseException:
        listener.close()
        raise
    everywhere = Address(host, listener.getsockname()[1])
    near = replace(everywhere, nearby=f"flashrecovery-mirror-{secrets.token_hex(16)}")
    near_listener = _listening_nearby(near.nearby) if nearby else None
    if near_listener is None:
        return everywhere, (listener,)
    return near, (listener, near_listener)


def connect(address: Address, codec: Codec, deadline: Deadline) -> Stream:
    """Over TCP."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LinkLost(f"{address}: {error.strerror}") from None
    try:
        _prepare(sock)
        sock.settimeout(deadline.left())
        sock.connect(where)
    except OSError as error:
        sock.close()
        raise LinkLost(f"connecting to {address}: {error.strerror or 'no answer'}") from None
    return Stream(sock, codec)


def connect_nearby(address: Address, codec: Codec) -> Stream | None:
    """``None``: whoever listens at ``address`` is on another machine, or gone. That is known at once."""
    if not address.nearby:
        return None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        sock.setblocking(False)  # a full queue is no reason to wait either
        sock.connect(f"\0{address.nearby}")
        # Once its owner has died, any user of this machine may take the name.
        is_ours = _owner_of(sock) == os.geteuid()
    except OSError:
        is_ours = False
    if not is_ours:
        sock.close()
        return None
    return Stream(sock, codec)


def _listening_nearby(name: str) -> socket.socket | None:
    """``None``: there can be no such socket here, and TCP will do."""
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        listener.bind(f"\0{name}")
        listener.listen()
    except OSError:
        listener.close()
        return None
    return listener


def _owner_of(sock: socket.socket) -> int:
    """The user who listens at the other end."""
    _pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def _prepare(sock: socket.socket) -> None:
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
