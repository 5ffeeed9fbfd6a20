"""What only a real network can do to a link."""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct

import msgspec
import pytest
import xxhash

from megatron_flashrecovery.comm.mirror_hello import CODEC, Hello, Stranger, admit, introduce
from megatron_flashrecovery.comm.mirror_link import SocketLinks
from megatron_flashrecovery.comm.mirror_sockets import Address, connect
from megatron_flashrecovery.comm.mirror_stream import Deadline, Stream
from megatron_flashrecovery.core.errors import LinkLost
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.guest_store import GuestStore
from megatron_flashrecovery.state.memory import Memory

TOKEN, TIMEOUT = b"of this job", 20.0
LINKS = SocketLinks(TOKEN, nearby=False)


@pytest.fixture
def store():
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * (1 << 20))
    memory = Memory(fd)
    os.close(fd)
    store = GuestStore(host=0)
    store.add(1, memory.slots)
    yield store
    memory.close()


@pytest.fixture
def server(store):
    server = LINKS.serve(0, store)
    yield server
    server.close()


def offer_of(content: bytes, step: int = 1, epoch: int = 0) -> Offer:
    return Offer(SnapshotId(1, step, epoch), len(content), xxhash.xxh3_128_digest(content))


def pair() -> tuple[Stream, Stream]:
    here, there = socket.socketpair()
    return Stream(here, CODEC), Stream(there, CODEC)


def stream_to(server) -> Stream:
    return connect(Address.parse(server.address), CODEC, Deadline(TIMEOUT))


def test_who_does_not_know_the_token_is_not_answered(server, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(LinkLost, match="token of this job"):
        SocketLinks(b"of another job").connect(server.address, 1, 0, TIMEOUT)
    server.close()
    assert "not admitted: wrong token" in caplog.text


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" * 10, id="http"),
        pytest.param(b"\xff" * 200, id="a-hello-too-long"),
        pytest.param(bytes(64) + struct.pack("!I", 4) + b"null", id="not-signed"),
    ],
)
def test_noise_is_not_answered(server, noise):
    stream = stream_to(server)
    stream.receive(32, Deadline(TIMEOUT))
    stream.send([noise], Deadline(TIMEOUT))
    with pytest.raises(LinkLost):
        stream.receive(1, Deadline(TIMEOUT))
    stream.close()


def test_a_recorded_hello_cannot_be_played_again():
    (host, guest), (again, replayer) = pair(), pair()
    host.send([bytes(32)], Deadline(TIMEOUT))
    with pytest.raises(LinkLost):
        introduce(guest, TOKEN, Hello(1, 0), Deadline(0.05))
    guest.close()
    replayer.send([host.receive(68 + len(msgspec.msgpack.encode(Hello(1, 0))), Deadline(TIMEOUT))], Deadline(TIMEOUT))
    with pytest.raises(Stranger, match="wrong token"):
        admit(again, TOKEN, Deadline(TIMEOUT))
    for stream in (host, again, replayer):
        stream.close()


def test_a_guest_tells_a_host_without_the_token():
    host, guest = pair()
    host.send([bytes(32), bytes(32)], Deadline(TIMEOUT))
    with pytest.raises(LinkLost, match="host does not have the token"):
        introduce(guest, TOKEN, Hello(1, 0), Deadline(TIMEOUT))
    for stream in (host, guest):
        stream.close()


@pytest.mark.parametrize("sent_nbytes", [0, 1, 5000, 99_999])
def test_a_guest_that_dies_half_way_leaves_its_older_mirror(server, store, sent_nbytes):
    whole = bytes(100_000)
    link = LINKS.connect(server.address, 1, 0, TIMEOUT)
    link.offer(offer_of(whole, step=1), memoryview(whole), TIMEOUT)
    link._stream.say(offer_of(whole, step=2), Deadline(TIMEOUT), whole[:sent_nbytes])
    link.close()
    again = LINKS.connect(server.address, 1, 0, TIMEOUT)  # once admitted, the first one has ended
    assert store.steps() == {1: (1,)}
    again.offer(offer_of(whole, step=3), memoryview(whole), TIMEOUT)
    assert store.steps() == {1: (1, 3)}
    again.close()


def test_a_guest_that_is_killed_while_it_sends_is_no_harm(server, store):
    whole = bytes(500_000)
    pid = os.fork()
    if pid == 0:
        link = LINKS.connect(server.address, 1, 0, TIMEOUT)
        link.offer(offer_of(whole, step=1), memoryview(whole), TIMEOUT)
        link._stream.say(offer_of(whole, step=2), Deadline(TIMEOUT), whole[:250_000])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    server.close()
    assert store.steps() == {1: (1,)}


def test_a_frame_that_is_none_of_ours_ends_the_link(server):
    link = LINKS.connect(server.address, 1, 0, TIMEOUT)
    link._stream.send([struct.pack("!I", 1 << 30)], Deadline(TIMEOUT))
    with pytest.raises(LinkLost):
        link._stream.receive(1, Deadline(TIMEOUT))
    link.close()


def test_an_epoch_that_opens_while_bytes_are_under_way_refuses_them(server, store):
    whole = bytes(100_000)
    link = LINKS.connect(server.address, 1, 0, TIMEOUT)
    link._stream.say(offer_of(whole), Deadline(TIMEOUT), whole[:50_000])
    store.open_epoch(1)
    server.open_epoch(1)
    with pytest.raises(LinkLost):
        link._stream.say(offer_of(whole), Deadline(TIMEOUT)) or link._stream.hear(Deadline(TIMEOUT))
    link.close()
    assert store.steps() == {1: ()}


def test_a_peer_that_does_not_read_ends_a_send_at_its_deadline():
    listener = socket.create_server(("127.0.0.1", 0))
    stream = connect(Address("127.0.0.1", listener.getsockname()[1]), CODEC, Deadline(TIMEOUT))
    with pytest.raises(LinkLost, match=r"no answer within 0\.1 s"):
        stream.send([bytes(64 << 20)], Deadline(0.1))
    stream.close()
    listener.close()


@pytest.mark.parametrize("text", ["127.0.0.1:80", "[::1]:80", "node-7:65535", "[::1]:80/name", "node-7:65535/name-0f"])
def test_an_address_reads_as_it_is_written(text):
    assert str(Address.parse(text)) == text
