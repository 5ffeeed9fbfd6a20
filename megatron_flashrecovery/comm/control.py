"""The control plane between nodes: one gRPC stream from each agent to the controller, typed messages, and a token.

A stream is opened with the job's token and the version of this package in its metadata; without the right ones it is
refused before a message is read. Messages are msgpack of dataclasses (``codec``), so nothing that arrives is executed.
"""

from __future__ import annotations

import errno
import hmac
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.core.errors import ConfigError, LinkLost

_METHOD = "/flashrecovery.Control/Attach"
_GRACE = 3.0
_TOKEN, _VERSION = "flashrecovery-token", "flashrecovery-version"
_OPTIONS = (
    # Two jobs on one port must not share it: an agent could come to the wrong controller.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.max_receive_message_length", 1 << 28),
    ("grpc.max_send_message_length", 1 << 28),
)

if TYPE_CHECKING:
    _Handler = grpc.GenericRpcHandler[bytes, bytes]  # generic in the stubs only
else:
    _Handler = grpc.GenericRpcHandler

AttachHandler = Callable[[AsyncIterator[object]], AsyncIterator[object]]
"""Given the messages of one agent, yields the messages for it. It ends when either side is done."""


class ControlServer:
    """Lives in the event loop of the controller. ``port`` 0 takes a free one."""

    def __init__(self, codec: Codec, token: str, version: str, on_attach: AttachHandler) -> None:
        self._codec = codec
        self._token = token
        self._version = version
        self._on_attach = on_attach
        self._server: grpc.aio.Server

    async def start(self, address: str, port: int) -> int:
        """Returns the port. Raises ``ConfigError`` if it is taken."""
        if port and _is_taken(address, port):
            raise _port_is_taken(address, port)
        self._server = grpc.aio.server(options=_OPTIONS)  # here, because it belongs to the loop that is running
        handler = grpc.stream_stream_rpc_method_handler(self._attach)
        self._server.add_generic_rpc_handlers((_OneMethod(handler),))
        try:
            bound: int = self._server.add_insecure_port(f"{address}:{port}")
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise _port_is_taken(address, port)
        await self._server.start()
        return bound

    async def stop(self) -> None:
        await self._server.stop(grace=_GRACE)

    async def _attach(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        if not hmac.compare_digest(metadata.get(_TOKEN, ""), self._token):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "its job token is another one: set the same FLASHRECOVERY_TOKEN"
            )
        if metadata.get(_VERSION) != self._version:
            reason = f"it runs version {metadata.get(_VERSION)} and the controller {self._version}: install the same"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        async for message in self._on_attach(self._decoded(requests)):
            yield self._codec.encode(message)

    async def _decoded(self, requests: AsyncIterator[bytes]) -> AsyncIterator[object]:
        async for data in requests:
            yield self._codec.decode(data)


class _OneMethod(_Handler):
    def __init__(self, handler: grpc.RpcMethodHandler[bytes, bytes]) -> None:
        self._handler = handler

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self._handler if call.method == _METHOD else None


class ControlClient:
    """An agent's stream. What arrives is handed to ``on_message`` on a thread of this client's; after the stream has
    ended, ``on_end`` is called once with the reason, or with ``None`` if it was closed from here."""

    def __init__(self, address: str, codec: Codec, token: str, version: str) -> None:
        self._codec = codec
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._address = address
        self._metadata = ((_TOKEN, token), (_VERSION, version))

    def start(self, on_message: Callable[[object], None], on_end: Callable[[Exception | None], None]) -> None:
        call = self._channel.stream_stream(_METHOD, None, None)(
            self._outgoing(), metadata=self._metadata, wait_for_ready=True, timeout=None
        )
        self._call = call

        def read() -> None:
            try:
                for data in call:
                    on_message(self._codec.decode(data))
            except grpc.RpcError as error:
                on_end(None if self._closed.is_set() else self._reason(error))
            else:
                on_end(None)

        self._reader = threading.Thread(target=read, name="flashrecovery-control", daemon=True)
        self._reader.start()

    def send(self, message: object) -> None:
        self._outbox.put(self._codec.encode(message))

    def close(self) -> None:
        """Send what is left, and end the stream."""
        self._closed.set()
        self._outbox.put(None)
        self._reader.join(timeout=2.0)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()

    def _outgoing(self) -> Iterator[bytes]:
        while (data := self._outbox.get()) is not None:
            yield data

    def _reason(self, error: grpc.RpcError) -> Exception:
        code = error.code() if isinstance(error, grpc.Call) else None
        detail = error.details() if isinstance(error, grpc.Call) else str(error)
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION):
            return ConfigError(f"the controller at {self._address} refuses this node: {detail}")
        return LinkLost(f"the controller at {self._address} is gone: {detail}")


def _is_taken(address: str, port: int) -> bool:
    """Asked beforehand: gRPC writes a line of its own about such a port, and only the environment, which workers
    inherit, can forbid it."""
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _port_is_taken(address: str, port: int) -> ConfigError:
    return ConfigError(f"port {port} is taken on {address}: give another --master-port, or 0 for a free one")
