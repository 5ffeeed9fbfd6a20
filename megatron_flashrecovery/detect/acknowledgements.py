"""Whether the machine at the other end of a connection still acknowledges what is sent, whatever its processes do.

The kernel of a machine acknowledges on behalf of a process that is stopped, starved or stuck on its disk. So data that
stays unacknowledged says what silence does not: that the machine is off, or that the network between is cut.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

# The head of struct tcp_info (linux/tcp.h): eight bytes, then thirteen numbers, of which it takes the fifth and last.
_TCP_INFO = struct.Struct("=8x16xI28xI")


@dataclass(frozen=True)
class Delivery:
    """Of one connection: packets that are not acknowledged, and seconds since anything was."""

    unacknowledged: int
    last_heard: float


class Acknowledgements:
    """Of this process's connections to ``port``, on which it sends something every now and then."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._since: float | None = None

    def silence(self, now: float) -> float:
        """Seconds for which nothing that was sent there has been acknowledged, as far as it was looked at."""
        return self.judge([delivery_of(held) for held in _connections(self._port)], now)

    def judge(self, found: list[Delivery], now: float) -> float:
        """Without a connection, or with one on which nothing is due, nobody is silent."""
        is_due = bool(found) and all(delivery.unacknowledged for delivery in found)
        if not is_due or self._since is None:
            self._since = now if is_due else None
            return 0.0
        since = max(self._since, *(now - delivery.last_heard for delivery in found))
        # An idle connection heard nothing for long, and that says nothing: only what passed since it was due counts.
        self._since = since
        return now - since


def delivery_of(held: socket.socket) -> Delivery:
    """Closes the socket object, which is one over a duplicate."""
    with held:
        info = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    unacknowledged, last_heard_ms = _TCP_INFO.unpack(info)
    return Delivery(unacknowledged, last_heard_ms / 1000)


def _connections(port: int) -> Iterator[socket.socket]:
    """Duplicates, so that a descriptor that is closed meanwhile does not become somebody else's."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            held = socket.socket(fileno=os.dup(int(name)))
            try:
                is_there = held.type == socket.SOCK_STREAM and held.family in (socket.AF_INET, socket.AF_INET6)
                if is_there and held.getpeername()[1] == port:
                    yield held
                    continue
            except OSError:
                pass  # not connected
            held.close()
