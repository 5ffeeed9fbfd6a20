"""The receiving end of a link for one rank's two slots."""

from __future__ import annotations

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.snapshot import Offer
from megatron_flashrecovery.state.slot import Slot, SlotHeader
from megatron_flashrecovery.state.slot_pair import SlotPair


class Intake:
    """A ``Sink``: an offer's bytes go straight into the slot that matters least, and count once they match."""

    def __init__(self, pair: SlotPair) -> None:
        self._pair = pair
        self._begun: tuple[Offer, Slot] | None = None

    def has(self, offer: Offer) -> bool:
        """Whether exactly these bytes are here already; from any thread."""
        return self._pair.holds(offer)

    def begin(self, offer: Offer) -> memoryview | None:
        return None if self.has(offer) else self.make_room(offer)

    def make_room(self, offer: Offer) -> memoryview:
        if offer.id.rank != self._pair.rank:
            raise SnapshotMismatch(
                f"a snapshot of rank {offer.id.rank} was sent to the slots of rank {self._pair.rank}"
            )
        if offer.nbytes > self._pair.capacity:
            raise SnapshotMismatch(
                f"a snapshot of rank {offer.id.rank}, step {offer.id.step} is {offer.nbytes - self._pair.capacity} "
                f"bytes longer than its slot here: do owner and host agree on its size"
            )
        slot = self._pair.begin(offer.id)
        self._begun = (offer, slot)
        return slot.content(offer.nbytes)

    def commit(self, offer: Offer) -> None:
        begun, self._begun = self._begun, None
        assert begun is not None, f"commit of {offer.id}, but nothing was begun"
        assert begun[0] == offer, f"commit of {offer.id}, but {begun[0].id} was begun"
        self._pair.commit(begun[1], SlotHeader(offer.id, offer.nbytes, offer.fingerprint))

    def abandon(self, offer: Offer) -> None:
        self._begun = None
        self._pair.abandon(offer.id)
