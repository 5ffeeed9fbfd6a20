from __future__ import annotations

import itertools
import os
import random
import signal

import pytest
import torch

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.content import needed_bytes
from megatron_flashrecovery.state.copying import HostCopier
from megatron_flashrecovery.state.fingerprint import fingerprint
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.pieces import TensorPiece
from megatron_flashrecovery.state.slot import Slot, SlotHeader
from megatron_flashrecovery.state.slot_pair import SlotPair
from megatron_flashrecovery.state.snapshot import Snapshots

HEADER = SlotHeader(SnapshotId(3, 41, 2), 5, bytes(range(16)))


class Died(Exception):
    pass


class Life:
    """Ends at the n-th write."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def write(self) -> None:
        if self.left == 0:
            raise Died
        self.left -= 1


class MortalSlot(Slot):
    life = Life(-1)

    def _write_header(self, packed):
        for at in range(0, len(packed), 7):  # torn
            self.life.write()
            self._memory[64 + at : 64 + at + 7] = packed[at : at + 7]

    def _write_mark(self, mark):
        self.life.write()
        super()._write_mark(mark)


class MortalCopier(HostCopier):
    def __init__(self, life):
        self.life = life

    def copy_out(self, pairs):
        for pair in pairs:
            self.life.write()
            super().copy_out([pair])
        return self.life.write


def test_a_committed_slot_reads_as_it_was_written(slots):
    slot = slots()[0]
    slot.content(5)[:] = b"state"
    slot.commit(HEADER)
    assert slot.header() == HEADER
    assert bytes(slot.content(5)) == b"state"


def test_fresh_memory_is_void(slots):
    assert [slot.header() for slot in slots()] == [None, None]


def test_a_void_slot_has_no_header(slots):
    slot = slots()[0]
    slot.commit(HEADER)
    slot.void()
    assert slot.header() is None


@pytest.mark.parametrize("at", [0, 7, *range(64, 120)])
def test_a_flipped_bit_in_the_first_page_makes_a_slot_void(slots, at):
    slot = slots()[0]
    slot.commit(HEADER)
    slot._memory[at] ^= 1
    assert slot.header() is None


def test_a_header_that_claims_more_than_there_is_does_not_count(slots):
    slot = slots(4096)[0]
    slot.commit(SlotHeader(HEADER.id, 4097, HEADER.fingerprint))
    assert slot.header() is None


def pieces(value: float) -> list[TensorPiece]:
    return [TensorPiece(name, torch.full((100,), value), unique=True) for name in ("m", "v")]


def test_a_writer_that_dies_between_any_two_writes_leaves_the_other_snapshot_whole(slots):
    for writes in itertools.count():
        pair = [MortalSlot(slot._memory) for slot in slots()]
        own = Snapshots(0, pair)
        own.capture(1, 0, pieces(1.0), {"step": 1})
        own.seal(1)
        life = Life(writes)
        for slot in pair:
            slot.life = life
        dying = Snapshots(0, pair, MortalCopier(life))
        try:
            dying.capture(2, 0, pieces(2.0), {"step": 2})
            dying.seal(2)
        except Died:
            found = Snapshots(0, [Slot(slot._memory) for slot in pair])
            assert found.steps() == (1,), f"after {writes} writes"
            restored = pieces(0.0)
            assert found.restore(1, restored) == {"step": 1}
            assert all(torch.equal(piece.tensor, torch.full((100,), 1.0)) for piece in restored)
        else:
            assert dying.steps() == (1, 2)
            break
    assert writes > 12


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_leaves_at_least_one_whole_snapshot(seed):
    fd = os.memfd_create("killed")
    os.ftruncate(fd, 2 * needed_bytes(pieces(0.0), {"step": 0}))
    begun, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        snapshots = Snapshots(0, Memory(fd).slots)
        for step in itertools.count(1):
            snapshots.capture(step, 0, pieces(float(step)), {"step": step})
            snapshots.seal(step)
            os.write(says, b"x")
    for _ in range(random.Random(seed).randrange(20, 60)):
        assert os.read(begun, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    memory = Memory(fd)
    found = Snapshots(0, memory.slots)
    assert found.steps()
    for step in found.steps():
        restored = pieces(0.0)
        assert found.restore(step, restored) == {"step": step}
        assert torch.equal(restored[0].tensor, torch.full((100,), float(step)))
    found.close()
    memory.close()
    for descriptor in (fd, begun, says):
        os.close(descriptor)


def put(pair: SlotPair, step: int, epoch: int = 0, content: bytes = b"x") -> Offer:
    id = SnapshotId(pair.rank, step, epoch)
    slot = pair.begin(id)
    slot.content(len(content))[:] = content
    header = SlotHeader(id, len(content), fingerprint(content))
    pair.commit(slot, header)
    return Offer(id, header.nbytes, header.fingerprint)


@pytest.mark.parametrize(
    ("puts", "kept"),
    [
        pytest.param([(1, 0)], (1,), id="first"),
        pytest.param([(1, 0), (2, 0), (3, 0)], (2, 3), id="the-oldest-goes"),
        pytest.param([(1, 0), (2, 0), (2, 1)], (2,), id="the-same-step-again-counts-once"),
        pytest.param([(1, 0), (2, 0), (1, 1)], (1,), id="a-timeline-that-is-over-goes-first"),
        pytest.param([(1, 0), (2, 0), (1, 1), (2, 1)], (1, 2), id="and-the-new-one-goes-on"),
    ],
)
def test_a_pair_keeps_the_newest_two_of_one_timeline(slots, puts, kept):
    pair = SlotPair(0, slots())
    for step, epoch in puts:
        put(pair, step, epoch)
    assert pair.steps() == kept


def test_what_is_being_written_never_replaces_the_newest(slots):
    pair = SlotPair(0, slots())
    for step in range(6):
        put(pair, step)
        pair.begin(SnapshotId(0, step + 1, 0))
        assert pair.steps() == (step,)


def test_a_discard_reaches_what_is_still_being_written(slots):
    pair = SlotPair(0, slots())
    put(pair, 1)
    slot = pair.begin(SnapshotId(0, 2, 0))
    pair.discard_newer_than(1)
    with pytest.raises(SnapshotMismatch, match="rank 0, step 2, epoch 0 was discarded"):
        pair.commit(slot, SlotHeader(SnapshotId(0, 2, 0), 0, bytes(16)))
    assert pair.steps() == (1,)


def test_a_pair_holds_an_offer_whatever_its_epoch_but_not_other_bytes(slots):
    pair = SlotPair(0, slots())
    offer = put(pair, 1, content=b"state")
    assert pair.holds(Offer(SnapshotId(0, 1, 9), offer.nbytes, offer.fingerprint))
    assert not pair.holds(Offer(SnapshotId(0, 2, 0), offer.nbytes, offer.fingerprint))
    assert not pair.holds(Offer(offer.id, offer.nbytes, bytes(16)))
    pair.find(1)[1][0] ^= 1
    assert not pair.holds(offer)


def test_slots_of_another_rank_are_not_a_source(slots):
    memory = slots()
    put(SlotPair(1, memory), 1)
    with pytest.raises(SnapshotMismatch, match="slots of rank 0 hold a snapshot of rank 1"):
        SlotPair(0, memory).verified(1)
