"""What nodes tell the controller and what the controller orders: facts in the past tense, orders in the imperative.

Both are per node and name exceptions only, so that none costs more than the ranks of one node. Every order carries its
epoch and a number that grows within the job: a worker obeys an order once, in the order of the numbers, and only in the
epoch that it belongs to; a park order alone is obeyed for any epoch newer than its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_flashrecovery.core.findings import NumbersBad, NumbersSound, PeersDiffered
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.reports import Match, Report, Told
from megatron_flashrecovery.core.shares import Share

# --- events: what nodes tell the controller -------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """One worker that is gone. ``cause`` is for people: ``killed by SIGKILL``, ``exit code 1``, ``missed a deadline``;
    ``fault`` is its class, by which it is decided what to do.

    ``epoch`` is the one that it was started for, so that the end of a fenced worker is not taken for the end of its
    replacement. ``step`` is the one that it was computing, if it had begun with any; ``raised`` is the exception that
    ended it, and where, if it was one; ``fault`` is what is known to be behind it.
    """

    rank: Rank
    worker: WorkerId
    cause: str
    epoch: Epoch | None = None
    step: Step | None = None
    raised: str | None = None
    fault: Fault = Fault.PROCESS_ENDED


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
    one of them is. While ranks stop, ``busy`` are those that compute, and not for too long yet."""

    node: NodeId
    epoch: Epoch
    hung: Mapping[Rank, str]
    waiting: Mapping[Rank, str]
    step: Step
    silent: tuple[Rank, ...] = ()
    slow: tuple[Rank, ...] = ()
    busy: tuple[Rank, ...] = ()


@dataclass(frozen=True)
class StepsTimed:
    """Mean seconds of a step that each rank of one node has computed, and has waited for others, in the steps since the
    last time, up to ``step``. Told at most once in a second, and seldom while nothing changes."""

    node: NodeId
    epoch: Epoch
    step: Step
    computed: Mapping[Rank, float]
    waited: Mapping[Rank, float]


@dataclass(frozen=True)
class OperationsFailed:
    """Operations of these ranks of one node have failed, each in the words of its communicator. Who waited for a rank
    that has died says so, too, and sooner than the agent of that rank. ``step`` is the newest in which one of them
    is."""

    node: NodeId
    epoch: Epoch
    failed: Mapping[Rank, str]
    step: Step


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
    """A rank could not execute its share: it is as good as lost, and says why. Of ``CORRUPTION`` nobody knows whose
    fault it is: data-parallel peers hold different parameters behind it."""

    node: NodeId
    epoch: Epoch
    rank: Rank
    worker: WorkerId
    reason: str
    fault: Fault = Fault.PLAN_FAILED


@dataclass(frozen=True)
class RanksFinished:
    """Ranks that have completed their last step and wait for the others before they exit."""

    node: NodeId
    epoch: Epoch
    ranks: tuple[Rank, ...]


FAILED = "the diagnosis failed: "


@dataclass(frozen=True)
class Blamed:
    """A part of the cluster, in words, that a diagnosis takes for a cause, with how often a healthy job would have such
    a suspect (``p``), and why. ``nodes``: those that it takes in and that show it: no seat shall come there again.
    ``ranks``: those that show it."""

    element: str
    p: float
    evidence: str
    nodes: tuple[NodeId, ...] = ()
    ranks: tuple[Rank, ...] = ()


@dataclass(frozen=True)
class Diagnosed:
    """What a diagnosis of the records made of ``occasion``. ``undetermined`` says why nobody is blamed, else it is
    empty."""

    occasion: str
    blamed: tuple[Blamed, ...]
    undetermined: str

    @property
    def is_of_slow_ranks(self) -> bool:
        return self.occasion.startswith("rank ")

    @property
    def verdict(self) -> str:
        """For people, where nobody is blamed: no acquittal."""
        return self.undetermined if self.undetermined.startswith(FAILED) else f"undetermined: {self.undetermined}"


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
    | StepsTimed
    | OperationsFailed
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
    | Diagnosed
    | CheckpointWritten
    | ClockTicked
)


# --- commands: what the controller orders ---------------------------------------------------------------------------


@dataclass(frozen=True)
class BeginTraining:
    """Everybody, started from the top as ``epoch``, is at their first step, and the state that training starts from has
    its second copy: train. To every node. A loss before this starts everybody again, any later one is recovered."""

    epoch: Epoch


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
    only those that were started for an epoch older than ``epoch``: an order that comes late hits no replacement.
    ``fault`` is the class of what they are ended for, and that of the losses that follow."""

    node: NodeId
    ranks: tuple[Rank, ...]
    reason: str
    epoch: Epoch
    fault: Fault = Fault.DEADLINE


@dataclass(frozen=True)
class Release:
    """Every rank has finished: exit. To every node."""

    epoch: Epoch
    number: OrderNumber


@dataclass(frozen=True)
class Stop:
    """The job cannot go on: end every worker, and say why in this one line. To every node."""

    reason: str


Command: TypeAlias = (
    BeginTraining | StartWorkers | RestartAll | Park | Drain | ExecutePlan | Resume | Fence | Release | Stop
)
