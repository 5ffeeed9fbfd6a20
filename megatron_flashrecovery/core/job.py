"""The state of a job, owned by one writer: the coordinator."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.findings import PeersDiffered
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import Diagnosed, Event, Loss, RanksHung
from megatron_flashrecovery.core.numbers import Numbers
from megatron_flashrecovery.core.phases import Draining, Executing, Phase, Staffing, Starting, Training
from megatron_flashrecovery.core.planner import Origin
from megatron_flashrecovery.core.policy import Fault, History
from megatron_flashrecovery.core.recovery import Recovery, Timeline
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.core.slowness import OwnTimes

Device: TypeAlias = tuple[NodeId, Rank]
"""A seat does not move within its node: whoever sits there has the same device."""
_REPEATABLE = frozenset({Fault.EXCEPTION, Fault.DEVICE_MEMORY, Fault.COMMUNICATOR_ERROR})
SETTLED_AFTER = 1.0
"""Seconds: whoever hangs with others is seen at about the same time as they are."""
_NO_STEP = Step(0)
EXPLAINED_WITHIN = 0.4
"""Seconds: the end of a process is told sooner, and a communicator error has to be answered within one."""


@dataclass(frozen=True)
class JobConfig:
    """How long the coordinator waits, in seconds, and how often it tries.

    ``drain_timeout`` bounds the time from an order to stop (or to get out of the way) to the report of whoever is not
    seen to be busy; ``drain_grace`` how long operations that should complete by themselves may take. ``max_rounds`` is
    how many deadlines in a row may be missed, and how often one seat may be lost without progress, before the job falls
    back; ``max_restarts`` how often all workers may be started from the top. ``max_fruitless`` recoveries may begin
    within ``fruitless_window`` without a completed step. ``hang_timeout`` is how long many ranks may hang at the same
    time. Whoever computes ``slow_factor`` times as long as its peers is slow; 0: nobody is. ``spare_nodes``: how many
    nodes may come for the seats of lost ones, so that none is waited for that cannot come; None: any number.
    """

    drain_timeout: float = 10.0
    drain_grace: float = 2.0
    join_timeout: float = 120.0
    execute_timeout: float = 60.0
    max_rounds: int = 3
    max_restarts: int = 3
    hang_timeout: float = 600.0
    max_fruitless: int = 10
    fruitless_window: float = 1800.0
    slow_factor: float = 1.5
    spare_nodes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.drain_grace <= self.drain_timeout:
            raise ConfigError("drain_grace must be positive and at most drain_timeout")
        if self.join_timeout <= 0 or self.execute_timeout <= 0:
            raise ConfigError("join_timeout and execute_timeout must be positive")
        if self.max_rounds < 1 or self.max_restarts < 0:
            raise ConfigError("max_rounds must be at least 1 and max_restarts at least 0")
        if self.slow_factor != 0 and self.slow_factor <= 1:
            raise ConfigError(f"--slow-factor {self.slow_factor:g}: give more than 1, or 0 to look for no slow ranks")


@dataclass
class Hangs:
    """What the nodes say at the moment. ``hung_since`` is when the last one joined those that hang, ``waiting_since``
    when the first one waited for too long, ``crowd_since`` when too many hung to blame them."""

    told: dict[NodeId, RanksHung] = field(default_factory=dict)
    hung_since: float | None = None
    waiting_since: float | None = None
    crowd_since: float | None = None

    @property
    def hung(self) -> dict[Rank, str]:
        return {rank: why for event in self.told.values() for rank, why in event.hung.items()}

    @property
    def waiting(self) -> dict[Rank, str]:
        return {rank: what for event in self.told.values() for rank, what in event.waiting.items()}

    @property
    def silent(self) -> set[Rank]:
        return {rank for event in self.told.values() for rank in event.silent}

    @property
    def slow(self) -> set[Rank]:
        return {rank for event in self.told.values() for rank in event.slow}

    @property
    def since(self) -> float | None:
        return self.waiting_since if self.hung_since is None else self.hung_since


@dataclass
class Breaks:
    """Operations that have failed since everybody last trained, in the words of their ranks; ``since`` is when the
    first one was told of, and a loss that explains it comes within a moment."""

    failed: dict[Rank, str] = field(default_factory=dict)
    step: Step = _NO_STEP
    since: float | None = None

    @property
    def due(self) -> float | None:
        return None if self.since is None else self.since + EXPLAINED_WITHIN


class Job:
    """``seats`` says which ranks the agents start at first; nothing is ordered for that."""

    def __init__(self, config: JobConfig, seats: Seats) -> None:
        self.config = config
        self.seats = seats
        self.epoch = Epoch(0)
        self.number = OrderNumber(0)
        self.phase: Phase = Starting()
        self.checkpoint: Step | None = None
        self.recoveries: list[Recovery] = []
        self.capacity: dict[NodeId, int] = {}
        """Of the nodes that have come for the seats of lost ones, and are there."""
        self.joined: set[NodeId] = set()
        """All that ever came."""
        self.gone: set[WorkerId] = set()
        """Workers whose end is known: it may be told twice."""
        self.restarts = 0
        self.story: deque[tuple[float, Epoch, str, Event]] = deque(maxlen=60)
        self.last_resume: Step | None = None
        self.newest_kept: Step | None = None
        """The newest step of all that lost workers ever left."""
        self.setbacks: Counter[Rank] = Counter()
        """How often each seat was lost since the job last made progress."""
        self.rounds = 0
        """Deadlines missed since everybody last trained."""
        self.raised: set[tuple[Rank, Step | None, str]] = set()
        """The faults that ended workers, of those that a retry would repeat: exceptions of the script and the like."""
        self.begun: deque[float] = deque(maxlen=config.max_fruitless)
        """When recoveries began since the job last made progress; the last few."""
        self.suspicions: Counter[Device] = Counter()
        """How often each device was suspected. Nothing clears them but another job."""
        self.blamed: dict[NodeId, str] = {}
        """Nodes that a diagnosis blames, and what for. Nothing clears them but another job."""
        self.diagnosis: Diagnosed | None = None
        """The newest."""
        self.deadlocks: set[Step] = set()
        """The steps in which everybody waited for everybody."""
        self.unexplained: set[Step] = set()
        """The steps in which operations failed although nobody was lost."""
        self.numbers = Numbers()
        self.differing: dict[tuple[Rank, Rank], PeersDiffered] = {}
        self.differing_since = 0.0
        """When the first of these peers said that they hold different parameters. No recovery makes that untrue."""
        self.base = Epoch(0)
        self.staffed: dict[Rank, Epoch] = {}
        """The epoch that the worker of a seat was started for, if it is later than ``base``."""
        self.begin_anew()

    @classmethod
    def start(cls, config: JobConfig, seats: Mapping[NodeId, tuple[Rank, ...]], sharded: bool) -> Job:
        """``sharded`` holds until the nodes have described their seats."""
        job = cls(config, Seats(seats))
        job.seats.sharded = sharded
        return job

    def begin_anew(self) -> None:
        """Everybody trains again, or starts from the top: what was known of the recovery is of no more use."""
        self.timeline: Timeline | None = None
        self.hangs = Hangs()
        self.own_times = OwnTimes()
        self.breaks = Breaks()
        self.numbers.alarm = None
        self.lost: set[Rank] = set()
        """Seats vacated since everybody last trained."""
        self.vault: dict[Rank, tuple[Step, ...]] = {}
        self.fenced: dict[Rank, Epoch] = {}
        """For which epoch the worker was started that was fenced on a seat, until its agent says what it left."""
        self.carried: dict[GroupKey, str] = {}
        self.matched: set[GroupKey] = set()
        """Groups in which somebody issued a counterpart: what its program does next there is behind the count."""
        self.void: set[Rank] = set()
        """Ranks whose step in progress goes on with void contents."""
        self.failed: Counter[tuple[Rank, Origin, Step]] = Counter()
        """How often a rank could not be restored from a source."""
        self.poisoned: set[Rank] = set()
        """Seats whose worker had a memory that may have been wrong: what it kept is no source."""
        self.renewed: set[tuple[Rank, Step]] = set()
        """Who has executed a plan of this recovery, and to which step: then its copies of that step are new ones."""

    def note_resume(self, step: Step) -> None:
        """Everybody goes on from here. Further on than the last time is progress."""
        if self.last_resume is None or step > self.last_resume:
            self._note_progress()
            # What happens again later on, or at a later start, is another story.
            self.raised = {raised for raised in self.raised if raised[1] is not None and raised[1] > step}
            self.deadlocks = {deadlock for deadlock in self.deadlocks if deadlock > step}
            self.unexplained = {failure for failure in self.unexplained if failure > step}
        self.last_resume = step

    def note_kept(self, steps: Iterable[Step]) -> None:
        """What a lost worker left tells of steps that were completed since the last recovery, once for each step: what
        is done again after going back is no progress, and neither is a second loss in the same recovery."""
        newest = max(steps, default=None)
        if newest is not None and (self.newest_kept is None or newest > self.newest_kept):
            self.newest_kept = newest
            self._note_progress()

    def _note_progress(self) -> None:
        self.setbacks.clear()
        self.begun.clear()

    def has_happened_before(self, loss: Loss) -> bool:
        """The same exception, or the like, in the same step of the same rank. What happened now is kept."""
        if loss.fault not in _REPEATABLE:
            return False
        raised = (loss.rank, loss.step, loss.raised or loss.fault.value)
        is_known = raised in self.raised
        self.raised.add(raised)
        return is_known

    def suspect(self, rank: Rank) -> None:
        """The device of this seat, on the node where it is now."""
        self.suspicions[self.seats.node_of[rank], rank] += 1

    def note_diagnosis(self, diagnosis: Diagnosed) -> None:
        """A later one that finds nobody acquits nobody: who is not used any more does nothing wrong."""
        self.diagnosis = diagnosis
        for blamed in diagnosis.blamed:
            for node in blamed.nodes:
                self.blamed.setdefault(node, f"{blamed.element}, {blamed.evidence}")

    def history(self, now: float, rank: Rank | None = None) -> History:
        """Of the job; of a fault of this rank, also of its seat and of its device."""
        recent = sum(now - begun < self.config.fruitless_window for begun in self.begun)
        node = None if rank is None else self.seats.node_of.get(rank)
        return History(
            setbacks=0 if rank is None else self.setbacks[rank],
            max_setbacks=self.config.max_rounds,
            suspicions=0 if rank is None or node is None else self.suspicions[node, rank],
            missed=self.rounds,
            max_missed=self.config.max_rounds,
            fruitless=recent + (self.timeline is None),
            max_fruitless=self.config.max_fruitless,
            is_starting=isinstance(self.phase, Starting),
            is_executing=isinstance(self.phase, Executing),
            has_room=node is None or self.has_room_for(node),
            is_blamed=node in self.blamed,
            has_better_room=node is None or self.has_room_for(node, self.blamed),
            is_recovering=self.timeline is not None,
        )

    @property
    def spares(self) -> list[NodeId]:
        """Nodes without seats that have room for some."""
        return sorted(node for node, room in self.capacity.items() if room and not self.seats.ranks_on.get(node))

    def may_house_all(self) -> bool:
        """Whether seats without a node can get one: others have room, or may still come."""
        if self.config.spare_nodes is None or len(self.joined) < self.config.spare_nodes:
            return True
        free = (max(0, room - len(self.seats.ranks_on.get(node, ()))) for node, room in self.capacity.items())
        return sum(free) >= len(self.seats.homeless)

    def has_room_for(self, node: NodeId, left_out: Container[NodeId] = ()) -> bool:
        """Whether other nodes, without those that are left out, could take all its seats."""
        free = sum(
            max(0, capacity - len(self.seats.ranks_on.get(other, ())))
            for other, capacity in self.capacity.items()
            if other != node and other not in left_out
        )
        return free >= len(self.seats.ranks_on.get(node, ()))

    def next_number(self) -> OrderNumber:
        self.number = OrderNumber(self.number + 1)
        return self.number

    def tell(self, event: Event, why: str) -> str:
        """The whole story of an event that cannot have happened."""
        story = [f"{now:.3f} epoch {epoch} {phase}: {event}" for now, epoch, phase, event in self.story]
        return "\n  ".join([why, *story, f"now epoch {self.epoch} {type(self.phase).__name__}: {event}"])

    def started_for(self, rank: Rank) -> Epoch:
        return self.staffed.get(rank, self.base)

    @property
    def next_deadline(self) -> float | None:
        """When ``ClockTicked`` can make a difference next, at the earliest."""
        match self.phase:
            case Starting(deadline=deadline):
                return _first(deadline, self.breaks.due)
            case Draining() as phase:
                moments = [*phase.joining.values(), phase.deadline]
                if phase.stopped_since is not None:
                    moments.append(phase.stopped_since + SETTLED_AFTER)
                return min([*moments, phase.patient_until] if phase.waiting else moments)
            case Staffing(joining=joining):
                return min(joining.values(), default=None)
            case Executing(deadline=deadline):
                return _first(deadline, self.breaks.due)
            case Training() if self.hangs.crowd_since is not None:
                return _first(self.hangs.crowd_since + self.config.hang_timeout, self.breaks.due)
            case Training():
                alarm, differing = self.numbers.alarm, self.differing_since if self.differing else None
                since = (self.hangs.since, alarm.since if alarm else None, differing)
                settled = _first(*since)
                return _first(None if settled is None else settled + SETTLED_AFTER, self.breaks.due)
            case _:
                return None


def _first(*moments: float | None) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)
