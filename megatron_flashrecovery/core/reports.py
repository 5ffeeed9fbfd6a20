"""Where a stopped rank stands, what it holds, and how its operations count: what a report says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from megatron_flashrecovery.core.ids import GroupKey, Rank, Step


class Standing(Enum):
    """Where a rank's main thread stands once it has been told to park."""

    PARKED = "parked"
    """At the entry of an operation that it has not started, or between two protected calls."""
    CAUGHT = "caught"
    """In an operation that failed because its communicator was severed or lost a member."""
    BLOCKED = "blocked"
    """Inside an operation of a communicator that is still whole, waiting for somebody."""


class Update(Enum):
    """How far a rank is with the step that it is in."""

    BEFORE = "before"
    """Live memory is the state of the last completed step, early pieces aside."""
    ARMED = "armed"
    """The same, and the reduced gradients are final: only reductions are missing for the update."""
    WRITING = "writing"
    """Masters or moments may be half written: live memory is no source for any step."""
    APPLIED = "applied"
    """The last inner optimizer is done, but the protected call has not returned."""


@dataclass(frozen=True)
class PairCount:
    """Point-to-point operations with one peer, as one side counts them; ``open`` are issued and not yet completed.
    ``sends`` and ``receives`` are the forms of the last few, the newest last (see ``Match``)."""

    sent: int = 0
    received: int = 0
    open: int = 0
    sends: tuple[bytes, ...] = field(default=(), compare=False)
    receives: tuple[bytes, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class GroupCount:
    """What one member knows of a communicator. ``digest`` is a running hash over the collectives issued; an operation
    in which somebody is blocked is issued and not completed. ``recent`` are the forms of the last few collectives
    issued, the newest last (see ``Match``)."""

    issued: int = 0
    completed: int = 0
    digest: int = 0
    pairs: Mapping[Rank, PairCount] = field(default_factory=dict)
    broken: str | None = None
    recent: tuple[bytes, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Spot:
    """The operation at which a rank stands. ``number`` counts the collectives of the group (this one included), or is 0
    for point-to-point operations, whose partners are in ``sends_to`` and ``receives_from``."""

    group: GroupKey
    operation: str
    number: int = 0
    sends_to: tuple[Rank, ...] = ()
    receives_from: tuple[Rank, ...] = ()


@dataclass(frozen=True)
class Told:
    """The result of a small reduction after the gate of the update to ``step``: enough for a peer to finish its own
    update. Without a step nobody can be told it: the results of two steps look alike, and the wrong one corrupts."""

    operation: str
    payload: bytes
    step: Step | None = None


@dataclass(frozen=True)
class Match:
    """The counterpart of what a peer has issued in a whole group: to be issued with tensors that nobody reads, so that
    the peer's operation ends, with void contents, and both count the same.

    ``form`` is the operation as the peer issued it, in the words of ``comm``; an empty one has no counterpart.
    ``number`` is that of a collective, or 0: then a receive from ``peer``, or a send to it.
    """

    group: GroupKey
    form: bytes
    number: int = 0
    peer: Rank | None = None
    is_send: bool = False


@dataclass(frozen=True)
class Report:
    """What a stopped rank holds, and where it stopped. A replacement holds nothing until it has been restored: its live
    memory is not the state of any step, so its update is ``WRITING``.

    ``step`` is the last step whose protected call completed here; ``own`` and ``guests`` are committed snapshots.
    ``told`` are the results since the gate before last: a rank that is past the gate of a step still has those of the
    step before, for peers that have not completed that one.
    """

    rank: Rank
    standing: Standing
    step: Step
    update: Update
    spot: Spot | None = None
    counts: Mapping[GroupKey, GroupCount] = field(default_factory=dict)
    own: tuple[Step, ...] = ()
    guests: Mapping[Rank, tuple[Step, ...]] = field(default_factory=dict)
    told: tuple[Told, ...] = ()
