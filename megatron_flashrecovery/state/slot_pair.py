"""Two slots of one rank: the newest two generations of its state, of which one is whole at every moment."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.fingerprint import fingerprint
from megatron_flashrecovery.state.slot import Slot, SlotHeader


class SlotPair:
    """Any thread may call; of what goes into one slot, ``begin`` .. ``commit`` is one thread's at a time."""

    def __init__(self, rank: Rank, slots: Sequence[Slot]) -> None:
        assert len(slots) == 2, f"rank {rank} has {len(slots)} slots instead of two"
        self.rank = rank
        self._slots = tuple(slots)
        self._lock = threading.Lock()
        self._writing: dict[Slot, SnapshotId] = {}

    @property
    def capacity(self) -> int:
        return min(slot.capacity for slot in self._slots)

    def steps(self) -> tuple[Step, ...]:
        """Of the committed snapshots, ascending."""
        return tuple(sorted(header.id.step for header in self._headers()))

    def begin(self, id: SnapshotId) -> Slot:
        """A slot, void from now on, for the content of this snapshot. The other one keeps what it has."""
        with self._lock:
            slot = min(self._slots, key=lambda slot: self._worth(slot, id))
            slot.void()
            self._writing[slot] = id
            return slot

    def commit(self, slot: Slot, header: SlotHeader) -> None:
        """Raises ``SnapshotMismatch`` if the snapshot was discarded, or its slot begun anew, since ``begin``."""
        with self._lock:
            if self._writing.get(slot) != header.id:
                raise SnapshotMismatch(f"snapshot of {_named(header.id)} was discarded before it was complete")
            del self._writing[slot]
            slot.commit(header)
            for other in self._slots:
                if other is not slot and (held := other.header()) and held.id.step == header.id.step:
                    other.void()

    def abandon(self, id: SnapshotId) -> None:
        """What was begun will not be completed."""
        with self._lock:
            self._writing = {slot: begun for slot, begun in self._writing.items() if begun != id}

    def holds(self, offer: Offer) -> bool:
        """Whether a committed snapshot of that step has, and still has, exactly these bytes; of whatever epoch."""
        found = self.find(offer.id.step)
        if found is None or (found[0].nbytes, found[0].fingerprint) != (offer.nbytes, offer.fingerprint):
            return False
        return fingerprint(found[1]) == offer.fingerprint

    def find(self, step: Step) -> tuple[SlotHeader, memoryview] | None:
        """The committed snapshot of this step, not verified."""
        for slot in self._slots:
            header = slot.header()
            if header is not None and header.id.step == step:
                return header, slot.content(header.nbytes)
        return None

    def verified(self, step: Step) -> tuple[SlotHeader, memoryview]:
        """The committed snapshot of this step. Raises ``SnapshotMismatch``: there is none, or not as it was sealed."""
        found = self.find(step)
        if found is None:
            raise SnapshotMismatch(f"rank {self.rank} has no snapshot of step {step}, only of {list(self.steps())}")
        header, content = found
        if header.id.rank != self.rank:
            raise SnapshotMismatch(f"the slots of rank {self.rank} hold a snapshot of rank {header.id.rank}")
        if fingerprint(content) != header.fingerprint:
            raise SnapshotMismatch(f"snapshot of {_named(header.id)} is not what was sealed: take another copy")
        return header, content

    def discard_newer_than(self, step: Step) -> None:
        """Of committed snapshots and of those being written."""
        with self._lock:
            for slot in self._slots:
                header = slot.header()
                if header is not None and header.id.step > step:
                    slot.void()
            self._writing = {slot: id for slot, id in self._writing.items() if id.step <= step}

    def release(self) -> None:
        for slot in self._slots:
            slot.release()

    def _headers(self) -> list[SlotHeader]:
        return [header for slot in self._slots if (header := slot.header()) is not None]

    def _worth(self, slot: Slot, coming: SnapshotId) -> tuple[int, int]:
        """What would be lost with what the slot has now, once ``coming`` is here; the least is written over."""
        header = slot.header()
        if header is None:
            begun = self._writing.get(slot)
            return (0, 0) if begun is None or begun.step == coming.step else (1, begun.step)
        if header.id.step > coming.step and header.id.epoch < coming.epoch:
            return (2, 0)  # the job went back behind it: a timeline that is over
        return (3, header.id.step)


def _named(id: SnapshotId) -> str:
    return f"rank {id.rank}, step {id.step}, epoch {id.epoch}"
