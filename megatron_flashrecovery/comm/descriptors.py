"""File descriptors over a Unix socket. ``socket.send_fds`` and ``recv_fds`` ignore their flags (Python 3.11), and what
they receive would be inherited by every program that is started later."""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence

_SIZE = array.array("i").itemsize


def send_with_descriptors(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
    """How many bytes of ``data`` went; the descriptors go with the first of them. Raises ``OSError``."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    return sock.sendmsg([data], [rights] if fds else [], socket.MSG_NOSIGNAL)


def receive_with_descriptors(sock: socket.socket, nbytes: int, most: int) -> tuple[bytes, list[int]]:
    """At most ``nbytes``, and ``most`` descriptors, which are the caller's to close. Raises ``OSError``."""
    data, ancillary, _flags, _address = sock.recvmsg(nbytes, socket.CMSG_LEN(most * _SIZE), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % _SIZE])
    return data, fds.tolist()
