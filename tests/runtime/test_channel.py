"""The channel between an agent and its worker."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from megatron_flashrecovery.comm.channel import Channel, ChannelClosed, channel_pair
from megatron_flashrecovery.comm.codec import Codec, UnknownMessage


@dataclass(frozen=True)
class Word:
    text: str


@dataclass(frozen=True)
class Stranger:
    text: str


CODEC = Codec((Word,))


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = channel_pair(CODEC)
    other = Channel(theirs, CODEC)
    yield ours, other
    ours.close()
    other.close()


def test_messages_arrive_in_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    for text in ("a", "b" * 300_000, "c"):
        ours.send(Word(text)) if len(text) < 1000 else _send_in_background(ours, Word(text))
        assert theirs.receive(5.0)[0] == Word(text)


def test_descriptors_go_to_the_message_that_they_came_with(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    read, write = os.pipe()
    ours.send(Word("without"))
    ours.send(Word("with"), (read,))
    ours.send(Word("without again"))
    received = [theirs.receive(1.0) for _ in range(3)]
    assert [len(fds) for _, fds in received] == [0, 1, 0]
    os.write(write, b"x")
    assert os.read(received[1][1][0], 1) == b"x"
    for fd in (read, write, received[1][1][0]):
        os.close(fd)


def test_a_closed_channel_is_a_death_notice(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send(Word("last words"))
    ours.close()
    assert theirs.receive(1.0)[0] == Word("last words")
    with pytest.raises(ChannelClosed):
        theirs.receive(1.0)
    with pytest.raises(ChannelClosed):
        theirs.send(Word("anyone"))


def test_silence_has_an_end(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[0].receive(0.01)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xc1", id="no-msgpack"),
        pytest.param(Codec((Stranger,)).encode(Stranger("x")), id="unknown-name"),
        pytest.param(b"\x92\xa4Word\x81\xa4text\x05", id="wrong-type"),
    ],
)
def test_what_is_no_message_is_refused_whole(data: bytes) -> None:
    with pytest.raises(UnknownMessage):
        CODEC.decode(data)


def test_a_frame_that_is_too_long_to_be_true_closes_the_channel() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"\xff" * 64)
    channel = Channel(theirs, CODEC)
    with pytest.raises(ChannelClosed, match="is no message"):
        channel.receive(1.0)
    ours.close()
    channel.close()


def _send_in_background(channel: Channel, message: Word) -> None:
    import threading

    threading.Thread(target=channel.send, args=(message,)).start()
