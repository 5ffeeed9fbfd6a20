"""The stream between an agent and the controller: who is let in, and what a refused one is told.

Each in a process of its own: gRPC keeps threads and descriptors for as long as its process lives, and other tests fork.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.comm.control import ControlClient, ControlServer

TOKEN, VERSION = "secret", "1.2.3"


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Ending:
    """What came back first, and why the stream ended: the error's type and words."""

    heard: object
    error: str
    says: str


def codec() -> Codec:
    return Codec((Note,))


async def echo(messages: AsyncIterator[object]) -> AsyncIterator[object]:
    async for message in messages:
        yield message


def attach(token: str, version: str, controller_leaves: bool) -> Ending:
    """One node says one thing to a controller that says what it hears; then one of the two leaves."""
    loop = asyncio.new_event_loop()
    server = ControlServer(codec(), TOKEN, VERSION, echo)
    port = loop.run_until_complete(server.start("127.0.0.1", 0))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    heard: queue.SimpleQueue[object] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def end(reason: Exception | None) -> None:
        ended.put(reason)
        heard.put(None)

    client = ControlClient(f"127.0.0.1:{port}", codec(), token, version)
    client.start(heard.put, end)
    client.send(Note("here"))
    first = heard.get(timeout=20.0)
    if controller_leaves:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
    else:
        client.close()
    reason = ended.get(timeout=20.0)
    return Ending(first, type(reason).__name__, str(reason))


def start_on(port: int) -> str:
    try:
        asyncio.run(ControlServer(codec(), TOKEN, VERSION, echo).start("127.0.0.1", port))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "started"


def in_a_fresh_process(call: Callable[..., object], *args: object) -> object:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args).result(timeout=60)


def test_a_node_with_token_and_version_is_heard() -> None:
    assert in_a_fresh_process(attach, TOKEN, VERSION, False) == Ending(Note("here"), "NoneType", "None")


@pytest.mark.parametrize(
    ("token", "version", "says"),
    [
        ("guess", VERSION, "its job token is another one: set the same FLASHRECOVERY_TOKEN"),
        ("", VERSION, "its job token is another one"),
        (TOKEN, "1.2.4", "it runs version 1.2.4 and the controller 1.2.3: install the same"),
    ],
)
def test_a_node_of_another_job_or_version_is_refused_with_the_remedy(token: str, version: str, says: str) -> None:
    ending = in_a_fresh_process(attach, token, version, False)
    assert isinstance(ending, Ending)
    assert (ending.heard, ending.error) == (None, "ConfigError")
    assert says in ending.says


def test_a_controller_that_goes_away_is_a_lost_link() -> None:
    ending = in_a_fresh_process(attach, TOKEN, VERSION, True)
    assert isinstance(ending, Ending)
    assert (ending.heard, ending.error) == (Note("here"), "LinkLost")


def test_a_taken_port_is_named_with_the_remedy_and_nothing_else_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = in_a_fresh_process(start_on, port)
    assert said == f"ConfigError: port {port} is taken on 127.0.0.1: give another --master-port, or 0 for a free one"
    assert capfd.readouterr().err == ""
