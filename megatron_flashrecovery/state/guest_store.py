"""What a host keeps of its guests: two slots each, filled by a link, given back to a guest's replacement."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.snapshot import Offer
from megatron_flashrecovery.state.content import read_content
from megatron_flashrecovery.state.intake import Intake
from megatron_flashrecovery.state.slot import Slot
from megatron_flashrecovery.state.slot_pair import SlotPair


class GuestStore:
    """A ``Sink`` for the offers of all guests of one host."""

    def __init__(self, host: Rank) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._epoch = Epoch(0)
        self._pair_of: dict[Rank, SlotPair] = {}
        self._intake_of: dict[Rank, Intake] = {}

    def add(self, guest: Rank, slots: Sequence[Slot]) -> None:
        with self._lock:
            self._pair_of[guest] = SlotPair(guest, slots)
            self._intake_of[guest] = Intake(self._pair_of[guest])

    def remove(self, guest: Rank) -> None:
        """The rank is no guest any more; its slots are the caller's again."""
        with self._lock:
            self._pair_of.pop(guest, None)
            self._intake_of.pop(guest, None)

    def open_epoch(self, epoch: Epoch) -> None:
        """From now on offers of older epochs are refused, also those whose bytes are under way."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)

    def begin(self, offer: Offer) -> memoryview | None:
        with self._lock:
            intake = self._intake(offer)
        # Not with the lock: it reads all of the mirror, and a report of this rank waits for the lock.
        is_here = intake.has(offer)
        with self._lock:
            intake = self._intake(offer)
            return None if is_here else intake.make_room(offer)

    def commit(self, offer: Offer) -> None:
        with self._lock:
            self._intake(offer).commit(offer)

    def abandon(self, offer: Offer) -> None:
        with self._lock:
            if (intake := self._intake_of.get(offer.id.rank)) is not None:
                intake.abandon(offer)

    def guests(self) -> tuple[Rank, ...]:
        return tuple(sorted(self._pair_of))

    def steps(self) -> dict[Rank, tuple[Step, ...]]:
        """Of the committed mirrors, per guest, ascending."""
        with self._lock:
            return {guest: pair.steps() for guest, pair in sorted(self._pair_of.items())}

    def content(self, guest: Rank, step: Step) -> tuple[Offer, memoryview]:
        """A mirror and its bytes, to be given back. Raises ``SnapshotMismatch``: there is none, or it is damaged."""
        with self._lock:
            pair = self._pair_of.get(guest)
        if pair is None:
            raise SnapshotMismatch(f"rank {guest} is no guest of rank {self._host}")
        header, content = pair.verified(step)
        return Offer(header.id, header.nbytes, header.fingerprint), content

    def body(self, guest: Rank, step: Step) -> memoryview | None:
        """The tensors of a mirror, if there is one; not verified."""
        with self._lock:
            pair = self._pair_of.get(guest)
            found = None if pair is None else pair.find(step)
        return None if found is None else read_content(found[1]).body

    def discard_newer_than(self, step: Step) -> None:
        """Committed or half received: a mirror of a later step does not exist any more."""
        with self._lock:
            for pair in self._pair_of.values():
                pair.discard_newer_than(step)

    def _intake(self, offer: Offer) -> Intake:
        if offer.id.epoch < self._epoch:
            raise SnapshotMismatch(
                f"offer of rank {offer.id.rank} in epoch {offer.id.epoch}, but this is {self._epoch}"
            )
        intake = self._intake_of.get(offer.id.rank)
        if intake is None:
            raise SnapshotMismatch(f"rank {offer.id.rank} is no guest of rank {self._host}")
        return intake
