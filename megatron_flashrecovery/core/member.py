"""One rank's state machine: which order is obeyed when, and what the rank may say of itself.

```
Joining ──ready──► Waiting ─┐
   │                        ├─ExecutePlan──► Executing ──executed──► Executed ──Resume──► Training
   │             Stopped ───┘                                                               ▲  │
   │                ▲                                                                       │  └─finished─► Done
   │                └─Park, from anywhere but Joining, Waiting and Left                     │                │
   └─ready, when all start from the top─► Ready ─BeginTraining──────────────────────────────┘      Left ◄─Release
```
A rank parks only for an epoch newer than its own. It obeys every other order only for exactly its epoch, and only if
the number is higher than that of the last order it obeyed; so repeating an order changes nothing, and neither does one
that comes late.

``BeginTraining`` has no number, for there is one in an epoch at most, and it is the first order of it.

An order *ahead of its predecessor* is refused, not kept. The coordinator gives a rank no further order before it has
seen what the one before did (``coordinator``), so the predecessor of an order that arrives has always been obeyed: what
seems to be ahead belongs to another life of this seat. Park orders alone may overtake others, and they make them void.

A rank that joins does not stop for a park order: it has nothing to stop. It takes note of the epoch, and says that it
is ready in that epoch when it is, or again if it had been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, TypeAlias

from megatron_flashrecovery.core.errors import ImpossibleTransition
from megatron_flashrecovery.core.ids import Epoch, GroupKey, OrderNumber, Rank, Step
from megatron_flashrecovery.core.messages import BeginTraining, Drain, ExecutePlan, Park, Release, Resume
from megatron_flashrecovery.core.reports import Match, Told
from megatron_flashrecovery.core.shares import Share


class Mode(Enum):
    JOINING = "joining"
    """Running the script from the top; not before its first protected step."""
    WAITING = "waiting"
    """A replacement that is ready, and waits for the plan."""
    READY = "ready"
    """Started from the top together with all others, and waits for them."""
    TRAINING = "training"
    STOPPED = "stopped"
    """Told to park; on its way to the next operation, or there."""
    EXECUTING = "executing"
    EXECUTED = "executed"
    DONE = "done"
    """Completed its last step; waits for the others."""
    LEFT = "left"


@dataclass(frozen=True)
class SetOut:
    """Everybody is there: train."""


@dataclass(frozen=True)
class StandStill:
    """Stop before the next operation, sever the groups that have a member in ``lost``, and report where you stand. If
    ``is_executing``, the plan that is being executed is void: live memory may be half restored."""

    lost: tuple[Rank, ...]
    is_executing: bool


@dataclass(frozen=True)
class SayReady:
    """Say again that you are ready: nobody has heard it in this epoch."""


@dataclass(frozen=True)
class GetOutOfTheWay:
    """Sever these groups of yours; then do the one operation before which you stand (``advance``), or finish your
    update with these results (``answer``, if not ``None``), or issue these counterparts (``match``) without moving
    from where you stand; and report again."""

    advance: bool
    sever: Mapping[GroupKey, str]
    answer: tuple[Told, ...] | None
    match: tuple[Match, ...] = ()


@dataclass(frozen=True)
class CarryOut:
    """Execute this share: discard every snapshot newer than ``resume_step``, rebuild groups, restore, mirror."""

    resume_step: Step
    regather: bool
    share: Share


@dataclass(frozen=True)
class GoOn:
    """Everybody has executed the plan: train."""

    resume_step: Step


@dataclass(frozen=True)
class Leave:
    """Everybody has finished: exit."""


Action: TypeAlias = SetOut | StandStill | SayReady | GetOutOfTheWay | CarryOut | GoOn | Leave
Order: TypeAlias = BeginTraining | Park | Drain | ExecutePlan | Resume | Release

_STARTING = frozenset({Mode.JOINING, Mode.WAITING})


class Member:
    """``is_first``: every worker is being started from the top, so that nobody waits for a plan. ``epoch`` is the
    newest one that the agent knew when it started this worker."""

    def __init__(self, rank: Rank, epoch: Epoch, is_first: bool) -> None:
        self.rank = rank
        self.epoch = epoch
        self.is_first = is_first
        self.mode = Mode.JOINING
        self.number = OrderNumber(0)
        """The newest order of this epoch that was obeyed; what a report has to carry."""

    def receive(self, order: Order) -> Action | None:
        """What to do about an order that arrived; ``None``: nothing, it is not (any more) for us."""
        match order:
            case Park():
                return self._park(order)
            case BeginTraining():
                if order.epoch != self.epoch or self.mode is not Mode.READY:
                    return None
                self.mode = Mode.TRAINING
                return SetOut()
            case Drain() | ExecutePlan() | Resume() | Release():
                if order.epoch != self.epoch or order.number <= self.number:
                    return None
                action = self._obey(order)
                if action is not None:
                    self.number = order.number
                return action
            case _:
                _unreachable(order)

    def ready(self) -> None:
        """The worker has built its model and stands before its first protected step."""
        self._step(Mode.JOINING, Mode.READY if self.is_first else Mode.WAITING)

    def executed(self) -> None:
        """The share is executed: groups rebuilt, state restored, the new mirror acknowledged."""
        self._step(Mode.EXECUTING, Mode.EXECUTED)

    def finished(self) -> None:
        """The last step is completed."""
        self._step(Mode.TRAINING, Mode.DONE)

    def _step(self, origin: Mode, goal: Mode) -> None:
        if self.mode is not origin:
            raise ImpossibleTransition(
                f"rank {self.rank} in epoch {self.epoch} is {self.mode.value} and cannot become {goal.value}"
            )
        self.mode = goal

    def _park(self, order: Park) -> Action | None:
        if order.epoch <= self.epoch or self.mode is Mode.LEFT:
            return None
        before, self.epoch, self.number = self.mode, order.epoch, order.number
        if before is Mode.JOINING and not self.is_first:
            return None
        if before is Mode.WAITING:
            return SayReady()
        self.mode = Mode.STOPPED
        return StandStill(order.lost, is_executing=before is Mode.EXECUTING)

    def _obey(self, order: Drain | ExecutePlan | Resume | Release) -> Action | None:
        match order:
            case Drain() if self.mode is Mode.STOPPED:
                answer, match = order.answer.get(self.rank), order.match.get(self.rank, ())
                return GetOutOfTheWay(self.rank in order.advance, order.sever, answer, match)
            case ExecutePlan() if self.mode in (Mode.STOPPED, Mode.WAITING):
                share = next((share for share in order.shares if share.rank == self.rank), None)
                if share is None:
                    return None
                self.mode = Mode.EXECUTING
                return CarryOut(order.resume_step, order.regather, share)
            case Resume() if self.mode is Mode.EXECUTED:
                self.mode = Mode.TRAINING
                return GoOn(order.resume_step)
            case Release() if self.mode is Mode.DONE:
                self.mode = Mode.LEFT
                return Leave()
            case Drain() | ExecutePlan() | Resume() | Release():
                return None
            case _:
                _unreachable(order)


def _unreachable(value: NoReturn) -> NoReturn:
    raise AssertionError(f"unhandled {value!r}")
