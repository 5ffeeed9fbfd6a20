"""What an agent and the controller say to each other besides the events and commands of the core.

These carry what a person or the record wants to know; no decision depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.core.devices import Trouble
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import Command, Event
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.runtime.dialogue import StepDone


@dataclass(frozen=True)
class NodeAttached:
    """With the seats that it begins with. ``room``: how many it has for those of lost nodes."""

    node: NodeId
    ranks: tuple[Rank, ...]
    room: int = 0


@dataclass(frozen=True)
class NodeWelcome:
    """Everybody is there: start the workers of these seats, which are this node's. A spare node is told at once, and
    without seats. The store outlives all workers."""

    epoch: Epoch
    store_host: str
    store_port: int
    ranks: tuple[Rank, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    node: NodeId


@dataclass(frozen=True)
class StepNoted:
    step: StepDone


@dataclass(frozen=True)
class BillNoted:
    """What mirroring costs this rank: bytes of unique state a step, its host, and a warning if the host is a poor
    one."""

    rank: Rank
    host: Rank | None
    unique_nbytes: int
    warning: str | None


@dataclass(frozen=True)
class DeathNoted:
    """When the agent saw a worker end, and when the worker said that it would (injected faults only). Unix time."""

    rank: Rank
    pid: int
    seen: float
    announced: float | None


@dataclass(frozen=True)
class LastWords:
    """What a worker that is gone did last, by the page that it kept: the step, the activity, and the operation that it
    waited in, if it did. ``raised`` and ``traceback`` are of an exception that ended it, ``stacks`` those of all
    threads, which it wrote when a signal ended it or when it was asked to, for it hung."""

    rank: Rank
    worker: WorkerId
    step: Step | None = None
    doing: str = ""
    where: str = ""
    raised: str | None = None
    traceback: str = ""
    stacks: str = ""
    fault: Fault = Fault.PROCESS_ENDED


@dataclass(frozen=True)
class DeviceNoted:
    """What the driver said of a device of this node, and which ranks compute on it. ``fault`` is empty for a note."""

    node: NodeId
    device: str
    ranks: tuple[Rank, ...]
    fault: str
    evidence: str

    @classmethod
    def of(cls, node: NodeId, trouble: Trouble, ranks: tuple[Rank, ...]) -> DeviceNoted:
        fault = "" if trouble.fault is None else trouble.fault.value
        return cls(node, trouble.device, ranks, fault, trouble.evidence)


@dataclass(frozen=True)
class NodePlaced:
    """Where the ranks of a node are: the name of its machine, the place on the bus of the device that each rank
    computes on (left out where it has none), and the UUIDs of devices by place. ``switches`` is what SLURM says of its
    place in the network (``SLURM_TOPOLOGY_ADDR``, and its ``_PATTERN``); empty if it says nothing."""

    node: NodeId
    machine: str
    ranks: tuple[Rank, ...]
    devices: Mapping[Rank, str] = field(default_factory=dict)
    uuids: Mapping[str, str] = field(default_factory=dict)
    switches: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class NodeMeasured:
    """By how much counters of a node have grown in the ``seconds`` since the last time that it was told, or since the
    agent began; those that have not grown are left out. See ``core.counting`` for their names and for when it is
    told."""

    node: NodeId
    seconds: float
    grown: Mapping[str, int]


@dataclass(frozen=True)
class HeartbeatsLate:
    """A node was heard, but late: ``late`` times since it was last told, at worst after ``worst`` seconds."""

    node: NodeId
    late: int
    worst: float


@dataclass(frozen=True)
class InjectionNoted:
    """A rank is about to inflict what it was told to. Unix time."""

    rank: Rank
    spec: str
    time: float


@dataclass(frozen=True)
class InjectionAnswered:
    """Of the request ``name``: empty, or why it cannot be done."""

    name: str
    refusal: str


@dataclass(frozen=True)
class ExecutionNoted:
    """How long a rank's share took, in its parts, and when it was done (Unix time)."""

    rank: Rank
    epoch: Epoch
    seconds: Mapping[str, float]
    time: float


@dataclass(frozen=True)
class FirstStepNoted:
    """A rank has completed its first step after a recovery. Unix time."""

    rank: Rank
    epoch: Epoch
    step: Step
    time: float


@dataclass(frozen=True)
class FinalNoted:
    rank: Rank
    steps: int
    state_sha256: str


@dataclass(frozen=True)
class WorkerStarted:
    """A process has taken a seat."""

    rank: Rank
    worker: WorkerId
    pid: int
    epoch: Epoch


@dataclass(frozen=True)
class StartRefused:
    """The script says that it cannot be run like this (exit code 2 before its first step): restarting will not help."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class SignalPassedOn:
    """The launcher of this node was told to end, and has told its workers. Their ends are no losses from here on."""

    node: NodeId
    signal: str
    workers: int


@dataclass(frozen=True)
class NodeDone:
    """Every worker of this node has exited; ``epoch`` is the newest that it had heard of. ``failure`` says why that is
    not a good end."""

    node: NodeId
    epoch: Epoch
    failure: str = ""


@dataclass(frozen=True)
class Inject:
    """A user wants a rank of this node to inflict a fault; ``name`` is that of the request."""

    name: str
    spec: str


@dataclass(frozen=True)
class Dismiss:
    """The job is over. ``failure`` is empty if it ended well. ``at_once``: others may have taken the seats of this
    node, so its workers must not write any more."""

    failure: str
    exit_code: int
    at_once: bool = False


FromAgent: TypeAlias = (
    NodeAttached
    | Heartbeat
    | StepNoted
    | BillNoted
    | DeathNoted
    | LastWords
    | InjectionNoted
    | InjectionAnswered
    | DeviceNoted
    | NodePlaced
    | NodeMeasured
    | ExecutionNoted
    | FirstStepNoted
    | FinalNoted
    | WorkerStarted
    | StartRefused
    | SignalPassedOn
    | NodeDone
)
ToAgent: TypeAlias = NodeWelcome | Inject | Dismiss


def control_codec() -> Codec:
    return Codec((*get_args(Event), *get_args(Command), *get_args(FromAgent), *get_args(ToAgent)))
