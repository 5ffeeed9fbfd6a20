"""The control plane inside a node: messages between an agent and one of its workers, over a Unix socket pair.

The pair is made by the agent and inherited by the worker, so nobody else can speak on it; file descriptors travel with
a message; and its closing is a death notice that needs no timeout. Frames are a four-byte length and a message.
"""

from __future__ import annotations

import select
import socket
import struct
import threading

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.comm.descriptors import receive_with_descriptors, send_with_descriptors

_HEADER = struct.Struct("!IB")
_MAX_FRAME = 1 << 28
_MAX_FDS = 253


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One end of the pair. ``send`` may be called by any thread, ``receive`` by one at a time."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        self._sock = sock
        self._codec = codec
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: object, fds: tuple[int, ...] = ()) -> None:
        """Raises ``ChannelClosed`` when nobody is left to read it."""
        body = self._codec.encode(message)
        frame = _HEADER.pack(len(body), len(fds)) + body
        with self._sending:
            try:
                sent = send_with_descriptors(self._sock, frame, fds)
                self._sock.sendall(memoryview(frame)[sent:])
            except OSError as error:
                raise ChannelClosed(f"cannot send {type(message).__name__}: {error}") from error

    def receive(self, timeout: float | None = None) -> tuple[object, list[int]]:
        """The next message and the descriptors that came with it.

        Raises ``ChannelClosed``, and ``TimeoutError`` after ``timeout`` seconds of silence.
        """
        while True:
            message = self.next_message()
            if message is not None:
                return message
            # Not ``settimeout``: it would also bound the sends of other threads on the same socket.
            if not select.select([self._sock], [], [], timeout)[0]:
                raise TimeoutError(f"nothing was said for {timeout} s")
            self.fill()

    def fill(self) -> None:
        """Read what is there (blocks if nothing is). Raises ``ChannelClosed`` at the end."""
        try:
            data, fds = receive_with_descriptors(self._sock, 1 << 18, _MAX_FDS)
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        self._fds.extend(fds)
        if not data:
            raise ChannelClosed("the other side closed the channel")
        self._buffer += data

    def next_message(self) -> tuple[object, list[int]] | None:
        """A message that has arrived in full, without waiting."""
        if len(self._buffer) < _HEADER.size:
            return None
        length, number_of_fds = _HEADER.unpack_from(self._buffer)
        if length > _MAX_FRAME:
            raise ChannelClosed(f"a frame of {length} bytes is no message")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        message = self._codec.decode(bytes(self._buffer[_HEADER.size : end]))
        del self._buffer[:end]
        # One read may bring several messages, and the descriptors of a later one with them.
        fds, self._fds = self._fds[:number_of_fds], self._fds[number_of_fds:]
        return message, fds

    def close(self) -> None:
        self._sock.close()


def channel_pair(codec: Codec) -> tuple[Channel, socket.socket]:
    """The agent's end, and the raw socket that the worker inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return Channel(ours, codec), theirs
