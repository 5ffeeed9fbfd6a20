from __future__ import annotations

import threading

import pytest

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state import slot_pair
from megatron_flashrecovery.state.fingerprint import fingerprint
from megatron_flashrecovery.state.guest_store import GuestStore


@pytest.fixture
def store(slots):
    store = GuestStore(host=0)
    for guest in (1, 2):
        store.add(guest, slots(4096))
    return store


def offer(content: bytes, step: int, rank: int = 1, epoch: int = 0) -> Offer:
    return Offer(SnapshotId(rank, step, epoch), len(content), fingerprint(content))


def receive(store: GuestStore, content: bytes, step: int, rank: int = 1, epoch: int = 0) -> Offer:
    offered = offer(content, step, rank, epoch)
    store.begin(offered)[:] = content
    store.commit(offered)
    return offered


def test_a_mirror_is_given_back_as_it_came(store):
    offered = receive(store, b"state", 1)
    given, content = store.content(1, 1)
    assert (given, bytes(content)) == (offered, b"state")


def test_guests_are_kept_apart(store):
    receive(store, b"one", 1, rank=1)
    receive(store, b"two", 2, rank=2)
    assert (store.guests(), store.steps()) == ((1, 2), {1: (1,), 2: (2,)})


def test_what_is_here_already_is_not_taken_again(store):
    receive(store, b"state", 1)
    assert store.begin(offer(b"state", 1, epoch=1)) is None


def test_what_is_here_may_be_asked_for_while_a_mirror_that_comes_again_is_compared(store, monkeypatch):
    """Which takes seconds when it is large, and the order to stop wants an answer."""
    receive(store, b"state", 1)
    asked: list[dict] = []

    def slow(content):
        asked.append(store.steps())
        return fingerprint(content)

    monkeypatch.setattr(slot_pair, "fingerprint", slow)
    thread = threading.Thread(target=store.begin, args=(offer(b"state", 1, epoch=1),), daemon=True)
    thread.start()
    thread.join(10.0)
    assert asked == [{1: (1,), 2: ()}]


def test_an_offer_that_was_overtaken_while_it_was_compared_is_refused(store, monkeypatch):
    receive(store, b"state", 1)

    def overtaken(content):
        store.open_epoch(2)
        return fingerprint(content)

    monkeypatch.setattr(slot_pair, "fingerprint", overtaken)
    with pytest.raises(SnapshotMismatch, match="in epoch 1, but this is 2"):
        store.begin(offer(b"state", 1, epoch=1))


def test_a_mirror_that_was_abandoned_does_not_exist(store):
    receive(store, b"one", 1)
    half = offer(b"two", 2)
    store.begin(half)[:1] = b"t"
    store.abandon(half)
    assert store.steps()[1] == (1,)


def test_a_mirror_that_went_bad_at_its_host_is_not_given(store):
    receive(store, b"one", 1)
    receive(store, b"two", 2)
    _, content = store.content(1, 2)
    content[0] ^= 1
    with pytest.raises(SnapshotMismatch, match="rank 1, step 2, epoch 0 is not what was sealed"):
        store.content(1, 2)
    assert bytes(store.content(1, 1)[1]) == b"one"


@pytest.mark.parametrize(
    ("offered", "reason"),
    [
        pytest.param(offer(b"x", 1, rank=9), "rank 9 is no guest of rank 0", id="not-a-guest"),
        pytest.param(offer(b"x" * 4100, 1), "4 bytes longer than its slot here", id="too-long"),
        pytest.param(offer(b"x", 1, epoch=1), "in epoch 1, but this is 2", id="old-epoch"),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_with_the_reason(store, offered, reason):
    if "epoch" in reason:
        store.open_epoch(2)
    with pytest.raises(SnapshotMismatch, match=reason):
        store.begin(offered)


@pytest.mark.parametrize("how", ["epoch", "discard", "removed"])
def test_what_is_under_way_when_the_job_goes_back_is_not_committed(store, how):
    receive(store, b"one", 1)
    under_way = offer(b"two", 2)
    store.begin(under_way)[:] = b"two"
    {
        "epoch": lambda: store.open_epoch(1),
        "discard": lambda: store.discard_newer_than(1),
        "removed": lambda: store.remove(1),
    }[how]()
    with pytest.raises(SnapshotMismatch):
        store.commit(under_way)
    store.abandon(under_way)
    assert store.steps().get(1, (1,)) == (1,)


def test_a_discard_forgets_newer_mirrors_of_every_guest(store):
    for rank in (1, 2):
        receive(store, b"one", 1, rank)
        receive(store, b"two", 2, rank)
    store.discard_newer_than(1)
    assert store.steps() == {1: (1,), 2: (1,)}


def test_a_rank_that_is_no_guest_has_nothing_to_give(store):
    with pytest.raises(SnapshotMismatch, match="rank 9 is no guest"):
        store.content(9, 1)
    with pytest.raises(SnapshotMismatch, match=r"rank 1 has no snapshot of step 5"):
        store.content(1, 5)
