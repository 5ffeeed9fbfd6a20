"""What nodes tell the controller and what the controller orders: facts in the past tense, orders in the imperative.

Both are per node and name exceptions only, so that none costs more than the ranks of one node. Every order carries its
epoch and a number that grows within the job: a worker obeys an order once, in the order of the numbers, and only in the
epoch that it belongs to; a park order alone is obeyed for any epoch newer than its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from megatron_flashrecovery.core.findings import NumbersBad, NumbersSound, PeersDiffered
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.shares import Share


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


# --- events: what nodes tell the controller -------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """One worker that is gone. ``cause`` is for people: ``killed by SIGKILL``, ``exit code 1``, ``missed a deadline``.

    ``epoch`` is the one that it was started for, so that the end of a fenced worker is not taken for the end of its
    replacement. ``step`` is the one that it was computing, if it had begun with any; ``raised`` is the exception that
    ended it, and where, if it was one of the script's own.
    """

    rank: Rank
    worker: WorkerId
    cause: str
    epoch: Epoch | None = None
    step: Step | None = None
    raised: str | None = None


@dataclass(frozen=True)
class WorkersLost:
    """Workers of one node ended without having been told to, or were fenced. ``vault`` are the committed snapshots that
    the agent of this node still holds for each lost rank (they outlive the worker)."""

    node: NodeId
    losses: tuple[Loss, ...]
    vault: Mapping[Rank, tuple[Step, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RanksHung:
    """All ranks of one node that hang, with the evidence, and those that have waited in an operation for longer than
    they ever did, with which; of the first, ``silent`` are those none of whose threads runs; ``slow`` may hang soon.
    Told when that changes, and now and then: whoever is not in it any more moves again. ``step`` is the newest in which
    one of them is."""

    node: NodeId
    epoch: Epoch
    hung: Mapping[Rank, str]
    waiting: Mapping[Rank, str]
    step: Step
    silent: tuple[Rank, ...] = ()
    slow: tuple[Rank, ...] = ()


@dataclass(frozen=True)
class NodeLost:
    """An agent is gone, and with it its workers and whatever they and it held."""

    node: NodeId
    cause: str


@dataclass(frozen=True)
class NodeJoined:
    """An agent is there that has room for seats whose node is gone: a spare node, or one that came back empty."""

    node: NodeId
    room: int


@dataclass(frozen=True)
class SeatsDescribed:
    """What never changes about the seats of one node: who hosts each rank's mirror, which ranks hold the same
    replicated pieces (itself included), and the members, in order, of every group whose first member sits here. A rank
    without a host is left out of ``hosts``. Sent once per start of the whole job, and in any order with the others."""

    node: NodeId
    epoch: Epoch
    sharded: bool
    hosts: Mapping[Rank, Rank]
    peers: Mapping[Rank, tuple[Rank, ...]]
    groups: Mapping[GroupKey, tuple[Rank, ...]]


@dataclass(frozen=True)
class RanksReady:
    """Workers have built their model and stand before their first protected step of this epoch."""

    node: NodeId
    epoch: Epoch
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class RanksStood:
    """Where ranks of one node stand now; a later report of a rank replaces an earlier one of the same epoch.

    ``number`` is the newest order of this epoch that each of these ranks had obeyed, to its end, before it looked: a
    report that is older than an order to the same rank says nothing about what the order did. (The newest order that
    the node has passed on would not do: an older report may still be on its way up to the agent.)
    """

    node: NodeId
    epoch: Epoch
    number: OrderNumber
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class PlanExecuted:
    """Groups rebuilt, state restored, data-parallel peers agree, and the new mirrors acknowledged, on these ranks."""

    node: NodeId
    epoch: Epoch
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class PlanFailed:
    """A rank could not execute its share: it is as good as lost, and says why."""

    node: NodeId
    epoch: Epoch
    rank: Rank
    worker: WorkerId
    reason: str


@dataclass(frozen=True)
class RanksFinished:
    """Ranks that have completed their last step and wait for the others before they exit."""

    node: NodeId
    epoch: Epoch
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class CheckpointWritten:
    """The framework's own checkpoint of ``step`` is complete: from now on there is something to fall back to."""

    step: Step


@dataclass(frozen=True)
class ClockTicked:
    """Nothing but time has passed."""


Event: TypeAlias = (
    WorkersLost
    | RanksHung
    | NumbersBad
    | NumbersSound
    | PeersDiffered
    | NodeLost
    | NodeJoined
    | SeatsDescribed
    | RanksReady
    | RanksStood
    | PlanExecuted
    | PlanFailed
    | RanksFinished
    | CheckpointWritten
    | ClockTicked
)


# --- commands: what the controller orders ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StartWorkers:
    """Start workers for these ranks of this node, as replacements that join in ``epoch`` (or in the newest epoch that
    the agent has heard of since). Whatever older worker still sits there is ended first; the seats are this node's."""

    node: NodeId
    epoch: Epoch
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class RestartAll:
    """End every worker, forget every snapshot, and start all workers from the top, as ``epoch``; with the framework's
    own newest checkpoint, or as at the first start. To every node, and once more when seats move to a node that may not
    have heard it: an agent obeys it once for each epoch. ``skip``: see ``ExecutePlan``."""

    epoch: Epoch
    reason: str
    from_checkpoint: bool
    skip: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Park:
    """Stop before the next operation, sever every group that has a lost member, and report. To every node. ``lost`` are
    all seats that were vacated since everybody last trained: an older park order may never have arrived."""

    epoch: Epoch
    number: OrderNumber
    lost: tuple[Rank, ...]


@dataclass(frozen=True)
class Drain:
    """Get stopped ranks of one node out of each other's way: let ``advance`` do the one operation before which they
    stand, sever ``sever`` (with the reason), let ``answer`` finish their update with results that others have, and let
    ``match`` issue these counterparts and stand where they stood."""

    node: NodeId
    epoch: Epoch
    number: OrderNumber
    advance: tuple[Rank, ...] = ()
    sever: Mapping[GroupKey, str] = field(default_factory=dict)
    answer: Mapping[Rank, tuple[Told, ...]] = field(default_factory=dict)
    match: Mapping[Rank, tuple[Match, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ExecutePlan:
    """Go to ``resume_step``, each rank of this node by its share. ``regather``: parameters are gathered again from the
    shards (sharded optimizers). The update of steps in ``skip`` is left out; ``examine`` is to be looked at closely."""

    node: NodeId
    epoch: Epoch
    number: OrderNumber
    resume_step: Step
    regather: bool
    shares: tuple[Share, ...]
    skip: tuple[Step, ...] = ()
    examine: Step | None = None


@dataclass(frozen=True)
class Resume:
    """Everybody has executed the plan: train. To every node."""

    epoch: Epoch
    number: OrderNumber
    resume_step: Step


@dataclass(frozen=True)
class Fence:
    """End the workers of these seats of this node for good (they missed a deadline, or could not execute the plan), but
    only those that were started for an epoch older than ``epoch``: an order that comes late hits no replacement."""

    node: NodeId
    ranks: tuple[Rank, ...]
    reason: str
    epoch: Epoch


@dataclass(frozen=True)
class Release:
    """Every rank has finished: exit. To every node."""

    epoch: Epoch
    number: OrderNumber


@dataclass(frozen=True)
class Stop:
    """The job cannot go on: end every worker, and say why in this one line. To every node."""

    reason: str


Command: TypeAlias = StartWorkers | RestartAll | Park | Drain | ExecutePlan | Resume | Fence | Release | Stop
