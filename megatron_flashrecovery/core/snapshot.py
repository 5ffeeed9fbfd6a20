"""A snapshot: what one rank's state was after one step, as its owner announces it and its host keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_flashrecovery.core.ids import Epoch, Rank, Step


@dataclass(frozen=True)
class SnapshotId:
    """``epoch`` is the staffing in which it was taken: it keeps timelines apart, ``step`` orders one timeline."""

    rank: Rank
    step: Step
    epoch: Epoch


@dataclass(frozen=True)
class Offer:
    """What goes ahead of a state that is sent: whose it is, of which step, how long, and the owner's fingerprint.

    ``fingerprint`` is the 128-bit xxh3 of the ``nbytes`` that follow, or empty for live state, whose fingerprint is
    known only once it has been read and therefore comes after it. ``manifest`` describes live state; a snapshot
    carries its own.
    """

    id: SnapshotId
    nbytes: int
    fingerprint: bytes = b""
    manifest: bytes = b""


class Sink(Protocol):
    """Who takes in what a link receives. For one rank at a time: ``begin``, then ``commit`` or ``abandon``."""

    def begin(self, offer: Offer) -> memoryview | None:
        """Where the ``nbytes`` go, or ``None`` if they are here already. Raises ``SnapshotMismatch`` to refuse."""

    def commit(self, offer: Offer) -> None:
        """The bytes are in place and match the offer's fingerprint. Raises ``SnapshotMismatch`` if by now they are not
        wanted any more."""

    def abandon(self, offer: Offer) -> None:
        """They will not come, or were not what was offered: the place stays void."""
