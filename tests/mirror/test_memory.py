"""What only memory that is lent can do to a link."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy
import pytest
import xxhash

from megatron_flashrecovery.comm import mirror_memory, mirror_server, mirror_sockets
from megatron_flashrecovery.comm.descriptors import receive_with_descriptors, send_with_descriptors
from megatron_flashrecovery.comm.mirror_hello import CODEC, Hello, OfferInPlace, Refused, introduce
from megatron_flashrecovery.comm.mirror_link import SocketLinks
from megatron_flashrecovery.comm.mirror_memory import Borrowed, Lent
from megatron_flashrecovery.comm.mirror_sockets import Address, connect_nearby
from megatron_flashrecovery.comm.mirror_stream import Deadline
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.guest_store import GuestStore
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.vault import Holding, Vault

TOKEN, TIMEOUT, NBYTES = b"of this job", 20.0, 33 << 20
GUEST, HOST = 1, 0


@pytest.fixture
def vault():
    vault = Vault()
    vault.reserve({Holding(GUEST): NBYTES + 4096, Holding(GUEST, host=HOST): NBYTES + 4096})
    yield vault
    vault.close()


@pytest.fixture
def own(vault):
    memory = Memory(vault.fd(Holding(GUEST)))
    with memory.slots[0].content(NBYTES) as content:
        content[:] = os.urandom(NBYTES)
    yield memory
    memory.close()


@pytest.fixture
def lent(vault, own):
    fd = os.open(f"/proc/self/fd/{vault.fd(Holding(GUEST))}", os.O_RDONLY)
    yield Lent(fd, own.view)
    os.close(fd)


@pytest.fixture
def store(vault):
    memory = Memory(vault.fd(Holding(GUEST, host=HOST)))
    store = GuestStore(HOST)
    store.add(GUEST, memory.slots)
    yield store
    memory.close()


@pytest.fixture
def server(store):
    server = SocketLinks(TOKEN).serve(HOST, store)
    yield server
    server.close()


def offer_of(content: memoryview, step: int) -> Offer:
    return Offer(SnapshotId(GUEST, step, 0), len(content), xxhash.xxh3_128_digest(content))


def test_nothing_but_the_offer_passes_through_the_connection(server, store, own, lent, monkeypatch):
    link = SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT, lent)
    said = []
    monkeypatch.setattr(link._stream, "say", lambda *parts, say=link._stream.say: (said.append(parts), say(*parts)))
    with own.slots[0].content(NBYTES) as content:
        offer = offer_of(content, step=1)
        link.offer(offer, content, TIMEOUT)
        assert store.content(GUEST, 1)[1] == content
    link.close()
    assert [type(part) for parts in said for part in parts] == [OfferInPlace, Deadline]


def test_the_bytes_of_a_link_over_a_network_pass_through_it(server, store, own, lent):
    link = SocketLinks(TOKEN, nearby=False).connect(server.address, GUEST, 0, TIMEOUT, lent)
    assert link._lent is None
    with own.slots[0].content(NBYTES) as content:
        link.offer(offer_of(content, step=1), content, TIMEOUT)
        assert store.content(GUEST, 1)[1] == content
    link.close()


def test_a_name_that_is_not_known_on_this_machine_means_another_machine(server, lent):
    elsewhere = replace(Address.parse(server.address), nearby="of another machine")
    assert connect_nearby(elsewhere, CODEC) is None
    link = SocketLinks(TOKEN).connect(str(elsewhere), GUEST, 0, TIMEOUT, lent)
    assert link._lent is None
    link.close()


def test_bytes_that_change_while_they_are_copied_are_refused(server, store, own, lent):
    link = SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT, lent)
    with own.slots[0].content(NBYTES) as content:
        offer = offer_of(content, step=1)
        content[NBYTES // 2] ^= 1
        with pytest.raises(SnapshotMismatch, match="step 1 arrived damaged"):
            link.offer(offer, content, TIMEOUT)
        assert store.steps() == {GUEST: ()}
        link.offer(offer_of(content, step=2), content, TIMEOUT)
    assert store.steps() == {GUEST: (2,)}
    link.close()


def test_a_guest_that_is_killed_leaves_its_offer_to_be_completed(server, store, vault):
    """What it has lent outlives it, so its last word counts, or not at all."""
    pid = os.fork()
    if pid == 0:
        memory = Memory(vault.fd(Holding(GUEST)))
        link = SocketLinks(TOKEN).connect(
            server.address, GUEST, 0, TIMEOUT, Lent(vault.fd(Holding(GUEST)), memory.view)
        )
        content = memory.slots[0].content(NBYTES)
        link.offer(offer_of(content, step=1), content, TIMEOUT)
        link._stream.say(OfferInPlace(offer_of(content, step=2), 4096), Deadline(TIMEOUT))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    again = SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT)  # once admitted, the first one has ended
    assert store.steps() in ({GUEST: (1,)}, {GUEST: (1, 2)})
    again.close()


@pytest.mark.parametrize("offset", [-1, 2 * (NBYTES + 4096) - NBYTES + 1, 1 << 40])
def test_bytes_outside_of_what_was_lent_end_the_link(server, store, own, lent, offset):
    link = SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT, lent)
    with own.slots[0].content(NBYTES) as content:
        link._stream.say(OfferInPlace(offer_of(content, step=1), offset), Deadline(TIMEOUT))
    with pytest.raises(LinkLost):
        link._stream.hear(Deadline(TIMEOUT))
    link.close()
    assert store.steps() == {GUEST: ()}


def test_memory_that_could_be_taken_away_is_not_read(server):
    """A host that reads behind the end of a file dies of it (SIGBUS)."""
    fd = os.memfd_create("not sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(LinkLost, match="not sealed"):
        Borrowed(os.dup(fd))
    os.close(fd)


def test_a_file_is_no_memory(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    with pytest.raises(LinkLost, match="cannot be mapped"):
        Borrowed(os.open(tmp_path / "file", os.O_RDWR))


def test_a_promise_to_lend_without_a_descriptor_is_refused_and_ends_the_link(server):
    stream = connect_nearby(Address.parse(server.address), CODEC)
    introduce(stream, TOKEN, Hello(GUEST, 0, lends=True), Deadline(TIMEOUT))
    stream.send([b"M"], Deadline(TIMEOUT))
    assert stream.hear(Deadline(TIMEOUT)) == Refused("memory was to be lent, and no descriptor came")
    with pytest.raises(LinkLost):
        stream.hear(Deadline(TIMEOUT))
    stream.close()


def test_a_copy_ends_when_nobody_wants_it_any_more(own, lent):
    borrowed, checks = Borrowed(os.dup(lent.fd)), []

    def check() -> None:
        checks.append(True)
        if len(checks) == 3:
            raise LinkLost("closed here")

    room = bytearray(NBYTES)
    with pytest.raises(LinkLost, match="closed here"):
        borrowed.copy_into(memoryview(room), 4096, xxhash.xxh3_128(), check)
    borrowed.close()
    assert 0 < len(room.rstrip(b"\0")) <= NBYTES // 4


def test_a_host_that_cannot_read_what_was_lent_is_sent_the_bytes(server, store, own, lent, monkeypatch, caplog):
    def refuse(fd: int) -> None:
        os.close(fd)
        raise LinkLost("no room for another map")

    monkeypatch.setattr(mirror_server, "Borrowed", refuse)
    link = SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT, lent)
    assert link._lent is None
    with own.slots[0].content(NBYTES) as content:
        link.offer(offer_of(content, step=1), content, TIMEOUT)
    link.close()
    assert store.steps() == {GUEST: (1,)}
    assert "cannot borrow the memory of rank 1, which sends instead: no room for another map" in caplog.text


def test_an_epoch_that_opens_in_the_middle_of_a_copy_ends_it(server, store, own, lent, monkeypatch):
    copied, begun, may_go_on = [], threading.Event(), threading.Event()
    copyto = numpy.copyto

    def slow_copy(to, source) -> None:
        copied.append(len(source))
        begun.set()
        assert may_go_on.wait(TIMEOUT)
        copyto(to, source)

    monkeypatch.setattr(mirror_memory.numpy, "copyto", slow_copy)
    link = SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT, lent)
    with own.slots[0].content(NBYTES) as content, ThreadPoolExecutor(1) as aside:
        offering = aside.submit(link.offer, offer_of(content, step=1), content, TIMEOUT)
        assert begun.wait(TIMEOUT)
        opening = threading.Thread(target=server.open_epoch, args=(1,))
        opening.start()
        with pytest.raises(LinkLost):
            offering.result(TIMEOUT)
        may_go_on.set()
        opening.join(TIMEOUT)
        server.close()
    link.close()
    assert len(copied) == 1
    assert store.steps() == {GUEST: ()}


def test_a_name_that_another_user_has_taken_is_not_talked_to(server, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert connect_nearby(Address.parse(server.address), CODEC) is None


def test_without_descriptors_left_the_link_is_lost_and_not_the_worker(server, lent, monkeypatch):
    def none_left(*_args, **_kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mirror_sockets.socket, "socket", none_left)
    with pytest.raises(LinkLost, match="Too many open files"):
        SocketLinks(TOKEN).connect(server.address, GUEST, 0, TIMEOUT, lent)
    monkeypatch.undo()


def test_received_descriptors_are_not_inherited_by_programs(lent):
    here, there = socket.socketpair()
    assert send_with_descriptors(here, b"x", [lent.fd]) == 1
    data, (fd,) = receive_with_descriptors(there, 10, 1)
    assert (data, os.get_inheritable(fd)) == (b"x", False)
    for end in (here, there):
        end.close()
    os.close(fd)
