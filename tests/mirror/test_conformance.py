"""What every way of making links must do; the fake included."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import xxhash

from megatron_flashrecovery.comm.mirror_hello import Request
from megatron_flashrecovery.comm.mirror_link import SocketLinks, fetch_snapshot
from megatron_flashrecovery.comm.mirror_memory import Lent
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.vault import Holding, Vault
from megatron_flashrecovery.testing.memory_link import MemoryLinks, MemoryNetwork

TOKEN = b"of this job"
TIMEOUT = 20.0


class RecordingSink:
    """Keeps what it is sent; can be told to refuse, or to keep the host busy."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.committed: dict[SnapshotId, bytes] = {}
        self.abandoned: list[SnapshotId] = []
        self.begun = 0
        self.has_begun = threading.Event()
        self.may_begin = threading.Event()
        self.may_begin.set()
        self._room = bytearray()

    def begin(self, offer: Offer) -> memoryview | None:
        self.begun += 1
        self.has_begun.set()
        assert self.may_begin.wait(TIMEOUT)
        if self.refusal:
            raise SnapshotMismatch(self.refusal)
        if offer.id in self.committed:
            return None
        self._room = bytearray(offer.nbytes)
        return memoryview(self._room)

    def commit(self, offer: Offer) -> None:
        self.committed[offer.id] = bytes(self._room)

    def abandon(self, offer: Offer) -> None:
        self.abandoned.append(offer.id)


class LendingLinks(SocketLinks):
    """Everything that is offered is put into memory that is lent."""

    def __init__(self, lent: Lent) -> None:
        super().__init__(TOKEN)
        self._lent = lent

    def connect(self, address, rank, epoch, timeout, lent=None):
        link = super().connect(address, rank, epoch, timeout, self._lent)
        assert link._lent is not None
        return LendingLink(link, self._lent.view)


class LendingLink:
    def __init__(self, link, memory: memoryview) -> None:
        self._link = link
        self._memory = memory
        self.close = link.close

    def offer(self, offer, content, timeout) -> None:
        with self._memory[5 << 20 : (5 << 20) + len(content)] as copy:
            copy[:] = content
            self._link.offer(offer, copy, timeout)


@pytest.fixture(params=["tcp", "nearby", "lent", "memory"])
def links(request):
    match request.param:
        case "tcp":
            return SocketLinks(TOKEN, nearby=False)
        case "nearby":
            return SocketLinks(TOKEN)
        case "lent":
            return LendingLinks(request.getfixturevalue("lent_memory"))
        case _:
            return MemoryLinks(MemoryNetwork(), TOKEN)


@pytest.fixture
def lent_memory():
    vault = Vault()
    fd = vault.reserve({Holding(1): 32 << 20})[Holding(1)]
    memory = Memory(fd)
    yield Lent(fd, memory.view)
    memory.close()
    vault.close()


@pytest.fixture
def sink():
    return RecordingSink()


@pytest.fixture
def server(links, sink):
    server = links.serve(0, sink)
    yield server
    server.close()


@pytest.fixture
def link(links, server):
    link = links.connect(server.address, 1, 0, TIMEOUT)
    yield link
    link.close()


@pytest.fixture
def aside():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def snapshot(step: int = 7, content: bytes = b"state" * 1000, rank: int = 1, epoch: int = 0):
    content_view = memoryview(content)
    return Offer(SnapshotId(rank, step, epoch), len(content), xxhash.xxh3_128_digest(content)), content_view


REQUEST = Request(rank=1, step=7, epoch=0, kind="mirror")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (9 << 20) + 3])
def test_an_acknowledged_offer_is_committed_at_the_host(link, sink, nbytes):
    offer, content = snapshot(content=bytes(range(256)) * (nbytes // 256) + b"x" * (nbytes % 256))
    link.offer(offer, content, TIMEOUT)
    assert sink.committed == {offer.id: bytes(content)}


def test_offers_follow_each_other_on_one_link(link, sink):
    for step in range(5):
        link.offer(*snapshot(step, b"%d" % step * 100), TIMEOUT)
    assert [id.step for id in sink.committed] == [0, 1, 2, 3, 4]


def test_an_offer_is_made_in_the_epoch_of_its_link(links, server, sink):
    link = links.connect(server.address, 1, 3, TIMEOUT)
    link.offer(*snapshot(epoch=2), TIMEOUT)
    link.close()
    assert [id.epoch for id in sink.committed] == [3]


def test_a_duplicate_offer_is_acknowledged_again_without_harm(link, sink):
    for _ in range(2):
        link.offer(*snapshot(), TIMEOUT)
    assert (sink.begun, len(sink.committed), sink.abandoned) == (2, 1, [])


def test_damaged_bytes_are_refused_and_the_next_offer_is_taken(link, sink):
    offer, content = snapshot()
    damaged = bytearray(content)
    damaged[17] ^= 1
    with pytest.raises(SnapshotMismatch, match="rank 1, step 7 arrived damaged"):
        link.offer(offer, memoryview(damaged), TIMEOUT)
    assert (sink.committed, sink.abandoned) == ({}, [offer.id])
    link.offer(offer, content, TIMEOUT)
    assert list(sink.committed) == [offer.id]


@pytest.mark.parametrize("nbytes", [10, 20 << 20])
def test_a_refusal_reaches_the_guest_with_its_reason(link, sink, nbytes):
    sink.refusal = "rank 1 is no guest of rank 0"
    with pytest.raises(SnapshotMismatch, match="no guest of rank 0"):
        link.offer(*snapshot(content=bytes(nbytes)), TIMEOUT)
    sink.refusal = ""
    link.offer(*snapshot(), TIMEOUT)


def test_a_link_offers_for_no_other_rank(link):
    with pytest.raises(LinkLost):
        link.offer(*snapshot(rank=2), TIMEOUT)


def test_an_older_epoch_is_not_let_in(links, server):
    server.open_epoch(2)
    with pytest.raises(LinkLost, match="rank 1 comes in epoch 1"):
        links.connect(server.address, 1, 1, TIMEOUT)


def test_opening_an_epoch_ends_the_links_of_older_ones(link, server, sink):
    server.open_epoch(1)
    with pytest.raises(LinkLost, match="mirror of rank 1, step 7"):
        link.offer(*snapshot(), TIMEOUT)
    assert sink.committed == {}


def test_a_newer_epoch_may_come_before_the_host_has_opened_it(links, server, sink):
    link = links.connect(server.address, 1, 5, TIMEOUT)
    server.open_epoch(5)
    link.offer(*snapshot(), TIMEOUT)
    link.close()
    assert [id.epoch for id in sink.committed] == [5]


def test_a_second_link_of_a_guest_ends_the_first(links, link, server):
    second = links.connect(server.address, 1, 0, TIMEOUT)
    with pytest.raises(LinkLost):
        link.offer(*snapshot(), TIMEOUT)
    second.offer(*snapshot(), TIMEOUT)
    second.close()


def test_a_late_link_of_an_older_epoch_does_not_end_a_newer_one(links, server):
    newer = links.connect(server.address, 1, 2, TIMEOUT)
    with pytest.raises(LinkLost, match="epoch 2"):
        links.connect(server.address, 1, 1, TIMEOUT)
    newer.offer(*snapshot(), TIMEOUT)
    newer.close()


def test_an_offer_that_is_not_answered_ends_at_its_deadline(link, sink):
    sink.may_begin.clear()
    with pytest.raises(LinkLost, match=r"no answer within 0.05 s"):
        link.offer(*snapshot(), 0.05)
    sink.may_begin.set()


@pytest.mark.parametrize("who", ["guest", "host"])
def test_closing_from_another_thread_ends_an_offer(link, server, sink, aside, who):
    sink.may_begin.clear()
    offering = aside.submit(link.offer, *snapshot(), TIMEOUT)
    assert sink.has_begun.wait(TIMEOUT)
    closing = aside.submit(link.close if who == "guest" else server.close)
    with pytest.raises(LinkLost):
        offering.result(TIMEOUT)
    sink.may_begin.set()
    closing.result(TIMEOUT)


def test_closing_twice_is_no_error(link, server):
    for _ in range(2):
        link.close()
        server.close()


def test_nobody_listens_at_the_address_of_a_closed_server(links, sink):
    server = links.serve(0, sink)
    server.close()
    with pytest.raises(LinkLost, match="connecting to"):
        links.connect(server.address, 1, 0, TIMEOUT)


def test_a_mirror_is_given_to_whoever_asks_for_it(links, server, aside):
    offer, content = snapshot(content=bytes(range(256)) * 40000)
    own = RecordingSink()
    giving = aside.submit(server.give, REQUEST, offer, [content[:1000], content[1000:]], TIMEOUT)
    assert fetch_snapshot(links, server.address, REQUEST, own, TIMEOUT) == offer
    assert giving.result(TIMEOUT) is None
    assert own.committed == {offer.id: bytes(content)}


def test_the_one_who_asks_may_come_first(links, server, aside):
    offer, content = snapshot()
    own = RecordingSink()
    fetching = aside.submit(fetch_snapshot, links, server.address, REQUEST, own, TIMEOUT)
    server.give(REQUEST, offer, [content], TIMEOUT)
    fetching.result(TIMEOUT)
    assert own.committed == {offer.id: bytes(content)}


def test_live_state_is_fingerprinted_on_its_way(links, server, aside):
    offer, content = snapshot()
    live = Offer(offer.id, offer.nbytes, manifest=b"pieces")
    parts = [memoryview(bytearray(2000)), memoryview(bytearray(3000))]
    giving = aside.submit(server.give, REQUEST, live, iter([content]), TIMEOUT)
    given = links.fetch(server.address, REQUEST, lambda offer: parts, TIMEOUT)
    giving.result(TIMEOUT)
    assert (given.fingerprint, given.manifest) == (offer.fingerprint, b"pieces")
    assert b"".join(parts) == bytes(content)


def test_a_snapshot_that_its_taker_has_already_is_given_without_harm(links, server, aside):
    offer, content = snapshot(content=bytes(3 << 20))
    own = RecordingSink()
    own.committed[offer.id] = bytes(content)
    giving = aside.submit(server.give, REQUEST, offer, [content], TIMEOUT)
    assert fetch_snapshot(links, server.address, REQUEST, own, TIMEOUT) == offer
    giving.result(TIMEOUT)


def test_a_mirror_that_was_damaged_at_its_host_is_caught_by_the_taker(links, server, aside):
    offer, content = snapshot()
    garbage = bytearray(content)
    garbage[40:48] = b"\0\0\0\0\0\0\xf8\x7f"  # a NaN
    own = RecordingSink()
    giving = aside.submit(server.give, REQUEST, offer, [memoryview(garbage)], TIMEOUT)
    with pytest.raises(SnapshotMismatch, match="damaged"):
        fetch_snapshot(links, server.address, REQUEST, own, TIMEOUT)
    with pytest.raises(SnapshotMismatch, match="damaged"):
        giving.result(TIMEOUT)
    assert (own.committed, own.abandoned) == ({}, [offer.id])


def test_a_taker_may_refuse_what_it_is_given(links, server, aside):
    offer, content = snapshot(content=bytes(20 << 20))
    own = RecordingSink(refusal="piece a is missing")
    giving = aside.submit(server.give, REQUEST, offer, [content], TIMEOUT)
    for side in (lambda: fetch_snapshot(links, server.address, REQUEST, own, TIMEOUT), lambda: giving.result(TIMEOUT)):
        with pytest.raises(SnapshotMismatch, match="piece a is missing"):
            side()


@pytest.mark.parametrize(
    ("sizes"), [pytest.param([4000], id="fewer"), pytest.param([4000, 2000], id="more"), pytest.param([], id="none")]
)
def test_a_taker_that_expects_another_length_refuses(links, server, aside, sizes):
    offer, content = snapshot()
    giving = aside.submit(server.give, REQUEST, offer, [content], TIMEOUT)
    into = [memoryview(bytearray(size)) for size in sizes]
    with pytest.raises(SnapshotMismatch, match="5000 bytes"):
        links.fetch(server.address, REQUEST, lambda offer: into, TIMEOUT)
    with pytest.raises(SnapshotMismatch):
        giving.result(TIMEOUT)


def test_a_request_is_met_only_by_its_own_gift(links, server, aside):
    offer, content = snapshot()
    other = Request(rank=1, step=6, epoch=0, kind="mirror")
    fetching = aside.submit(fetch_snapshot, links, server.address, other, RecordingSink(), 0.3)
    with pytest.raises(LinkLost, match="rank 1 did not ask for mirror"):
        server.give(REQUEST, offer, [content], 0.05)
    with pytest.raises(LinkLost, match="no answer"):
        fetching.result(TIMEOUT)


def test_a_giver_that_fails_half_way_leaves_the_taker_with_nothing(links, server, aside):
    offer, content = snapshot()
    own = RecordingSink()

    def chunks():
        yield content[:100]
        raise OSError("device is gone")

    giving = aside.submit(server.give, REQUEST, offer, chunks(), TIMEOUT)
    with pytest.raises(LinkLost):
        fetch_snapshot(links, server.address, REQUEST, own, TIMEOUT)
    with pytest.raises(OSError, match="device is gone"):
        giving.result(TIMEOUT)
    assert own.committed == {}


@pytest.mark.parametrize("how", ["epoch", "close"])
def test_a_waiting_giver_ends_with_its_epoch_or_server(server, aside, how):
    giving = aside.submit(server.give, REQUEST, *snapshot()[:1], [], TIMEOUT)
    server.open_epoch(1) if how == "epoch" else server.close()
    with pytest.raises(LinkLost, match="over"):
        giving.result(TIMEOUT)


@pytest.mark.parametrize("how", ["epoch", "close"])
def test_a_waiting_taker_ends_with_its_epoch_or_server(links, server, aside, how):
    fetching = aside.submit(fetch_snapshot, links, server.address, REQUEST, RecordingSink(), TIMEOUT)
    server.open_epoch(1) if how == "epoch" else server.close()
    with pytest.raises(LinkLost):
        fetching.result(TIMEOUT)


def test_a_waiting_giver_ends_with_the_requests_of_its_epoch_and_guests_go_on(server, link, sink, aside):
    giving = aside.submit(server.give, REQUEST, *snapshot()[:1], [], TIMEOUT)
    server.end_requests(1)
    with pytest.raises(LinkLost, match="over"):
        giving.result(TIMEOUT)
    link.offer(*snapshot(), TIMEOUT)
    with pytest.raises(LinkLost, match="over"):
        server.give(REQUEST, *snapshot()[:1], [], TIMEOUT)


@pytest.mark.parametrize("who", ["server", "taker"])
def test_a_waiting_taker_ends_with_the_requests_of_its_epoch(links, server, aside, who):
    begun = threading.Event()
    monitor = links.fetch

    def fetch(*args):
        begun.set()
        return monitor(*args)

    links.fetch = fetch
    fetching = aside.submit(fetch_snapshot, links, server.address, REQUEST, RecordingSink(), TIMEOUT)
    assert begun.wait(TIMEOUT)
    server.end_requests(1) if who == "server" else links.end_fetches(1)
    with pytest.raises(LinkLost):
        fetching.result(TIMEOUT)
    with pytest.raises(LinkLost):
        fetch_snapshot(links, server.address, REQUEST, RecordingSink(), TIMEOUT)


def test_requests_of_the_newest_epoch_are_met_before_and_after_the_server_opens_it(links, server, aside):
    newest = replace(REQUEST, epoch=Epoch(1))
    server.end_requests(1)
    links.end_fetches(1)
    for opened in (False, True):
        if opened:
            server.open_epoch(1)
        offer, content = snapshot()
        fetching = aside.submit(fetch_snapshot, links, server.address, newest, RecordingSink(), TIMEOUT)
        server.give(newest, offer, [content], TIMEOUT)
        assert fetching.result(TIMEOUT) == offer


def test_a_request_of_an_older_epoch_is_refused(links, server):
    server.open_epoch(1)
    with pytest.raises(LinkLost, match="epoch 0"):
        fetch_snapshot(links, server.address, REQUEST, RecordingSink(), TIMEOUT)


def test_guests_do_not_wait_for_each_other(links, server, sink):
    both = [links.connect(server.address, rank, 0, TIMEOUT) for rank in (1, 2)]
    for rank in (2, 1):
        both[rank - 1].offer(*snapshot(rank=rank), TIMEOUT)
    for link in both:
        link.close()
    assert {id.rank for id in sink.committed} == {1, 2}
