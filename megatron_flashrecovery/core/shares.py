"""What one rank does in a recovery."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_flashrecovery.core.ids import GroupKey, Rank


class Source(Enum):
    """Where a rank gets its state of the resume step."""

    LIVE = "live"
    """Its memory holds it already; only the partial step is discarded and early pieces are put back."""
    OWN = "own"
    """Its own snapshot, in memory that the agent of its node holds."""
    MIRROR = "mirror"
    """The mirror that its host keeps."""
    PEER = "peer"
    """A data-parallel peer whose live state is the same (replicated optimizer); unique pieces from the mirror or the
    own copy."""


@dataclass(frozen=True)
class Share:
    """What one rank does in a recovery.

    ``source`` says from where its state comes; ``giver`` is the rank that sends it (a host for MIRROR, a data-parallel
    peer for PEER), and ``unique_from`` is who has the unique pieces when the source is PEER (``None``: its own copy).
    ``gives`` are the ranks to which this one sends: its guests' mirrors, or its own live state to a data-parallel peer.
    ``rebuild`` are the groups of this rank whose communicators are replaced; a replacement gets all of its groups.
    """

    rank: Rank
    source: Source
    giver: Rank | None = None
    unique_from: Rank | None = None
    gives_mirror_to: tuple[Rank, ...] = ()
    gives_state_to: tuple[Rank, ...] = ()
    rebuild: tuple[GroupKey, ...] = ()
    host: Rank | None = None
    guests: tuple[Rank, ...] = ()
