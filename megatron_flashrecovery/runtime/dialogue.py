"""What a worker and the agent of its node say to each other, besides the orders and reports of the core.

The agent passes orders on as they are, narrowed to the one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.core.findings import Finding
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import BeginTraining, Drain, ExecutePlan, Park, Release, Resume
from megatron_flashrecovery.core.policy import Fault, NanChoice
from megatron_flashrecovery.core.reports import Report

# --- worker to agent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryNeeded:
    """Two slots of ``own_nbytes`` for this rank, and two for each guest of the size it has asked for."""

    own_nbytes: int
    guests: Mapping[Rank, int]


@dataclass(frozen=True)
class Described:
    """What this rank is part of: sent once, before it is ready. ``groups`` are those that it is the first member of.
    ``device`` is the place on the bus of the one that it computes on, if that is known."""

    sharded: bool
    host: Rank
    peers: tuple[Rank, ...]
    groups: Mapping[GroupKey, tuple[Rank, ...]]
    unique_nbytes: int
    warning: str | None = None
    device: str = ""


@dataclass(frozen=True)
class Ready:
    """The model is built; this rank stands before its first protected step. ``startup`` is the record of its start-up
    collectives for whoever replaces it (empty from a replacement)."""

    epoch: Epoch
    startup: bytes


@dataclass(frozen=True)
class Stood:
    epoch: Epoch
    number: OrderNumber
    report: Report


@dataclass(frozen=True)
class Executed:
    """The share is done. ``seconds`` are the parts: rebuild, restore, gather, agree, mirror."""

    epoch: Epoch
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Failed:
    epoch: Epoch
    reason: str
    fault: Fault = Fault.PLAN_FAILED


@dataclass(frozen=True)
class StepDone:
    """A completed step as the reporting rank saw it. ``seconds`` is the wall time of the protected call."""

    step: Step
    epoch: Epoch
    loss: float | None
    grad_norm: float | None
    skipped: bool
    seconds: float


@dataclass(frozen=True)
class Resumed:
    """The first step after a recovery is complete on this rank."""

    epoch: Epoch
    step: Step


@dataclass(frozen=True)
class CheckpointDone:
    step: Step


@dataclass(frozen=True)
class Reported:
    """The framework's own report ``name`` of ``step`` is out: a replacement of this rank does not write it again."""

    name: str
    step: Step


@dataclass(frozen=True)
class Finished:
    epoch: Epoch
    steps: int
    state_sha256: str


@dataclass(frozen=True)
class Raised:
    """The script is about to end by this exception. ``what`` names its type and the line that raised it, and is the
    same when the same happens again; ``traceback`` is for people."""

    what: str
    traceback: str
    fault: Fault = Fault.EXCEPTION


@dataclass(frozen=True)
class OperationFailed:
    """An operation has failed here, and nobody has said yet that a member of its group was lost."""

    epoch: Epoch
    step: Step
    reason: str


@dataclass(frozen=True)
class UpdateRefused:
    """This rank stands before the update to ``step``, whose numbers are not finite, and waits to be told to stop.
    ``own`` is empty unless its own were bad before they were reduced; ``finding`` is where, if it has looked."""

    epoch: Epoch
    step: Step
    what: str
    own: str
    finding: Finding | None
    choice: NanChoice


@dataclass(frozen=True)
class Examined:
    """The step that was to be looked at closely is complete: nothing was wrong with it."""

    epoch: Epoch
    step: Step


@dataclass(frozen=True)
class GuestDiffers:
    """This rank keeps the mirror of ``guest``, one of ``peers`` data-parallel peers, and both do not hold the same in
    this part of the parameters of ``step``."""

    epoch: Epoch
    step: Step
    guest: Rank
    peers: int
    part: str


@dataclass(frozen=True)
class InjectionFired:
    """Said by a worker right before it does to itself what it was told to; ``time`` is Unix time."""

    index: int
    time: float


# --- agent to worker --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InjectionOrder:
    """With the seat, or later on. Without ``step`` in the next one, without ``at`` at the first moment."""

    index: int
    kind: str
    step: Step | None
    at: str | None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seat:
    """The first message to every worker: which seat it takes, and what it runs there. Until then it is a spare. Two
    descriptors come with it: the page that it keeps (``detect.pulse``), and the file for its stacks. ``may_move``: the
    job has spare nodes, so what a successor needs must not be with this agent alone."""

    rank: Rank
    worker: WorkerId
    node: NodeId
    epoch: Epoch
    joining: bool
    startup: bytes
    world_size: int
    ranks_per_node: int
    store_host: str
    store_port: int
    token: str
    script: str
    module: bool
    script_args: tuple[str, ...]
    environment: Mapping[str, str]
    injections: tuple[InjectionOrder, ...] = ()
    drain_timeout: float = 30.0
    execute_timeout: float = 60.0
    join_timeout: float = 600.0
    reported: Mapping[str, Step] = field(default_factory=dict)
    skip: tuple[Step, ...] = ()
    may_move: bool = False


@dataclass(frozen=True)
class MemoryGranted:
    """Descriptors come with this message: own memory first, then one per guest, in the order of ``guests``."""

    own_nbytes: int
    guests: tuple[Rank, ...] = ()
    guest_nbytes: tuple[int, ...] = ()
    refusal: str | None = None


FromWorker: TypeAlias = (
    MemoryNeeded
    | Described
    | Ready
    | Stood
    | Executed
    | Failed
    | StepDone
    | Resumed
    | CheckpointDone
    | Reported
    | Finished
    | Raised
    | OperationFailed
    | UpdateRefused
    | Examined
    | GuestDiffers
    | InjectionFired
)
ToWorker: TypeAlias = (
    Seat | MemoryGranted | InjectionOrder | BeginTraining | Park | Drain | ExecutePlan | Resume | Release
)


def dialogue_codec() -> Codec:
    return Codec(
        (
            *(MemoryNeeded, Described, Ready, Stood, Executed, Failed, StepDone, Resumed),
            *(CheckpointDone, Reported, Finished, Raised, OperationFailed, UpdateRefused, Examined, GuestDiffers),
            *(InjectionFired, Seat, MemoryGranted, InjectionOrder),
            *(BeginTraining, Park, Drain, ExecutePlan, Resume, Release),
        )
    )
