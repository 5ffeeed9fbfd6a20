"""The stream between an agent and the controller: who is let in, and what a refused one is told."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.comm.control import ControlClient, ControlServer
from megatron_flashrecovery.core.errors import ConfigError, LinkLost

TOKEN, VERSION = "secret", "1.2.3"


@dataclass(frozen=True)
class Note:
    text: str


def codec() -> Codec:
    return Codec((Note,))


async def echo(messages: AsyncIterator[object]) -> AsyncIterator[object]:
    async for message in messages:
        yield message


@contextmanager
def serving() -> Iterator[int]:
    """A controller that says what it hears; yields its port."""
    loop = asyncio.new_event_loop()
    server = ControlServer(codec(), TOKEN, VERSION, echo)
    port = loop.run_until_complete(server.start("127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def attach(port: int, token: str, version: str) -> tuple[object, Exception | None]:
    """The first message that comes back, and how the stream ended."""
    heard: queue.SimpleQueue[object] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    client = ControlClient(f"127.0.0.1:{port}", codec(), token, version)
    client.start(heard.put, ended.put)
    client.send(Note("here"))
    try:
        first = heard.get(timeout=2.0)
    except queue.Empty:
        first = None
    client.close()
    return first, ended.get(timeout=5.0)


def test_a_node_with_token_and_version_is_heard() -> None:
    with serving() as port:
        assert attach(port, TOKEN, VERSION) == (Note("here"), None)


@pytest.mark.parametrize(
    ("token", "version", "says"),
    [
        ("guess", VERSION, "its job token is another one: set the same FLASHRECOVERY_TOKEN"),
        ("", VERSION, "its job token is another one"),
        (TOKEN, "1.2.4", "it runs version 1.2.4 and the controller 1.2.3: install the same"),
    ],
)
def test_a_node_of_another_job_or_version_is_refused_with_the_remedy(token: str, version: str, says: str) -> None:
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    with serving() as port:
        client = ControlClient(f"127.0.0.1:{port}", codec(), token, version)
        client.start(lambda message: pytest.fail(f"heard {message}"), ended.put)
        client.send(Note("here"))
        reason = ended.get(timeout=5.0)
        client.close()
    assert isinstance(reason, ConfigError)
    assert says in str(reason)


def test_a_controller_that_goes_away_is_a_lost_link() -> None:
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    heard: queue.SimpleQueue[object] = queue.SimpleQueue()
    with serving() as port:
        client = ControlClient(f"127.0.0.1:{port}", codec(), TOKEN, VERSION)
        client.start(heard.put, ended.put)
        client.send(Note("here"))
        heard.get(timeout=5.0)
    assert isinstance(ended.get(timeout=5.0), LinkLost)
    client.close()


def test_a_taken_port_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken on 127.0.0.1: give another --master-port"):
            asyncio.run(ControlServer(codec(), TOKEN, VERSION, echo).start("127.0.0.1", port))
