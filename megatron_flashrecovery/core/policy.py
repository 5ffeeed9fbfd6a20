"""What is done about a fault: one table from what it is, and from what happened before, to an action.

The first rule of a fault that applies is the one that counts, and the last one of each always does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class Fault(Enum):
    """What goes wrong, as far as it makes a difference to what is done."""

    PROCESS_ENDED = "process ended"
    """By a signal or an exit code."""
    EXCEPTION = "exception"
    """Of the script, uncaught."""
    OUT_OF_MEMORY = "out of host memory"
    DEVICE_ERROR = "device error"
    """The device context is lost; memory that was copied from the device before is true."""
    DEVICE_MEMORY = "out of device memory"
    DEVICE_POISONED = "uncorrectable memory error"
    """Nothing that this rank kept for itself or for others is a source any more."""
    DEVICE_LOST = "device lost"
    """Fallen off the bus: whoever is started on it again finds no device."""
    COMMUNICATOR_ERROR = "communicator error"
    HANG = "hang"
    CROWD = "hang of many"
    DEADLOCK = "everybody waits"
    DEADLINE = "missed deadline"
    PLAN_FAILED = "plan cannot be executed"
    NO_COPY = "no copy of a state left"
    NODE_LOST = "node lost"
    BAD_NUMBERS = "bad numbers"
    """NaN or Inf in loss or gradients, seen before the update. (Spikes are only noted.)"""
    CORRUPTION = "silent corruption"
    """Data-parallel peers differ."""
    SLOW = "slow rank"


class Action(Enum):
    REPLACE_PROCESS = "replace the process"
    REPLACE_NODE = "replace the node"
    RETRY = "retry the step on the same data"
    SKIP = "skip the batch and record it"
    FALL_BACK = "newest checkpoint"
    START_ANEW = "start all again"
    PLAN_ANEW = "stop everybody and plan again"
    NOTE = "note it"
    STOP = "stop"


NOTES: Mapping[Action, str] = {
    Action.FALL_BACK: "or the start, if no step was completed; the job stops if there is no checkpoint, or if all "
    "workers were started again --max-restarts times",
    Action.START_ANEW: "from the newest checkpoint, if there is one; the job stops behind --max-restarts",
    Action.REPLACE_NODE: "its seats move to nodes that have room",
    Action.NOTE: "and wait",
}
"""What an action does not say by its name."""


class NanChoice(Enum):
    """What the user wants where numbers are bad again on the same data (``--flash-recovery-nan``)."""

    STOP = "stop"
    SKIP = "skip"
    RETRY = "retry"


@dataclass(frozen=True)
class History:
    """What happened before. ``again``: the same fault, in the same step, on the same rank (of a job's faults: in the
    job), after a retry. ``setbacks``: how often this seat was lost without progress, ``suspicions``: how often this
    device was suspected, ``missed``: deadlines in this recovery, ``fruitless``: recoveries within ``window`` seconds
    without a completed step; this time is included in each.

    ``is_starting``: before every rank has come to its first step. ``is_executing``: while the ranks execute a plan.
    ``lasted``: for as long as makes sure. ``is_one_operation``: all wait in the same one. ``has_room``: of other nodes.
    ``fell_back``: the job went back to a checkpoint for this before. ``is_blamed``: a diagnosis blames its node;
    ``has_better_room``: of other nodes that none blames. ``is_recovering``: from an earlier loss.
    """

    again: bool = False
    setbacks: int = 0
    suspicions: int = 0
    max_setbacks: int = 3
    nan: NanChoice = NanChoice.STOP
    missed: int = 0
    max_missed: int = 3
    fruitless: int = 0
    max_fruitless: int = 10
    is_starting: bool = False
    is_executing: bool = False
    lasted: bool = False
    is_one_operation: bool = False
    has_room: bool = True
    fell_back: bool = False
    is_blamed: bool = False
    has_better_room: bool = True
    is_recovering: bool = False


@dataclass(frozen=True)
class Rule:
    """``when`` says in words what ``applies`` asks."""

    fault: Fault
    when: str
    action: Action
    applies: Callable[[History], bool] = lambda _: True


Condition: TypeAlias = tuple[str, Callable[[History], bool]]

ALWAYS = "always"

LOST_OFTEN: Condition = (
    "the seat was lost more than 3 times without progress",
    lambda history: history.setbacks > history.max_setbacks,
)
FRUITLESS: Condition = (
    "more than 10 recoveries in 30 minutes without a completed step",
    lambda history: history.fruitless > history.max_fruitless,
)
MISSED_OFTEN: Condition = (
    "more than 3 deadlines missed in one recovery",
    lambda history: history.missed > history.max_missed,
)
STARTING: Condition = ("before every rank has come to its first step", lambda history: history.is_starting)
SUSPECTED: Condition = ("its device was suspected before", lambda history: history.suspicions > 1)
SUSPECTED_WITH_ROOM: Condition = (
    "its device was suspected before, and another node has room",
    lambda history: history.suspicions > 1 and history.has_room,
)
SUSPECTED_WITHOUT_ROOM: Condition = (
    "its device was suspected before, and no other node has room",
    lambda history: history.suspicions > 1 and not history.has_room,
)
BLAMED: Condition = (
    "a diagnosis blames its node, another one that none blames has room, and no recovery is under way",
    lambda history: history.is_blamed and history.has_better_room and not history.is_recovering,
)
AGAIN: Condition = ("again in the same step of the same rank, after a retry", lambda history: history.again)
AGAIN_IN_STEP: Condition = ("again in the same step, after a retry", lambda history: history.again)
NO_ROOM: Condition = ("no other node has room", lambda history: not history.has_room)
NO_NODE: Condition = (
    "no spare node has room or can come, or none has come within --join-timeout",
    lambda history: not history.has_room,
)

SUSPECTS_A_DEVICE = frozenset({Fault.DEVICE_ERROR, Fault.DEVICE_POISONED, Fault.DEVICE_LOST, Fault.CORRUPTION})


def _ends_a_process(fault: Fault) -> list[Rule]:
    return [
        Rule(fault, STARTING[0], Action.START_ANEW, STARTING[1]),
        Rule(fault, LOST_OFTEN[0], Action.FALL_BACK, LOST_OFTEN[1]),
        Rule(fault, FRUITLESS[0], Action.FALL_BACK, FRUITLESS[1]),
        Rule(fault, ALWAYS, Action.REPLACE_PROCESS),
    ]


def _suspects(fault: Fault) -> list[Rule]:
    return [
        Rule(fault, SUSPECTED_WITHOUT_ROOM[0], Action.STOP, SUSPECTED_WITHOUT_ROOM[1]),
        Rule(fault, SUSPECTED[0], Action.REPLACE_NODE, SUSPECTED[1]),
    ]


def _of_a_place(fault: Fault) -> list[Rule]:
    """What may come of the machine, the device or the network there; a script has its bugs anywhere."""
    return [Rule(fault, BLAMED[0], Action.REPLACE_NODE, BLAMED[1]), *_ends_a_process(fault)]


def _of_a_device(fault: Fault) -> list[Rule]:
    return [*_suspects(fault), *_of_a_place(fault)]


POLICY: Sequence[Rule] = (
    *_of_a_place(Fault.PROCESS_ENDED),
    Rule(Fault.EXCEPTION, AGAIN[0], Action.STOP, AGAIN[1]),
    *_ends_a_process(Fault.EXCEPTION),
    *_of_a_place(Fault.OUT_OF_MEMORY),
    *_of_a_device(Fault.DEVICE_ERROR),
    Rule(Fault.DEVICE_MEMORY, AGAIN[0], Action.STOP, AGAIN[1]),
    *_ends_a_process(Fault.DEVICE_MEMORY),
    *_of_a_device(Fault.DEVICE_POISONED),
    Rule(Fault.DEVICE_LOST, NO_ROOM[0], Action.STOP, NO_ROOM[1]),
    Rule(Fault.DEVICE_LOST, ALWAYS, Action.REPLACE_NODE),
    Rule(Fault.COMMUNICATOR_ERROR, STARTING[0], Action.START_ANEW, STARTING[1]),
    Rule(Fault.COMMUNICATOR_ERROR, AGAIN_IN_STEP[0], Action.FALL_BACK, AGAIN_IN_STEP[1]),
    Rule(Fault.COMMUNICATOR_ERROR, FRUITLESS[0], Action.FALL_BACK, FRUITLESS[1]),
    Rule(Fault.COMMUNICATOR_ERROR, ALWAYS, Action.RETRY),
    *_of_a_place(Fault.HANG),
    Rule(Fault.CROWD, "for longer than --hang-timeout", Action.FALL_BACK, lambda history: history.lasted),
    Rule(Fault.CROWD, ALWAYS, Action.NOTE),
    Rule(
        Fault.DEADLOCK,
        "again in the same step, for a minute, all in the same operation",
        Action.FALL_BACK,
        lambda history: history.again and history.lasted and history.is_one_operation,
    ),
    Rule(
        Fault.DEADLOCK,
        "again in the same step, for a minute",
        Action.STOP,
        lambda history: history.again and history.lasted,
    ),
    Rule(Fault.DEADLOCK, "again in the same step, not yet for a minute", Action.NOTE, lambda history: history.again),
    Rule(Fault.DEADLOCK, FRUITLESS[0], Action.FALL_BACK, FRUITLESS[1]),
    Rule(Fault.DEADLOCK, ALWAYS, Action.RETRY),
    Rule(Fault.DEADLINE, MISSED_OFTEN[0], Action.FALL_BACK, MISSED_OFTEN[1]),
    Rule(
        Fault.DEADLINE,
        "while the ranks execute a plan: one that hangs makes all others late",
        Action.PLAN_ANEW,
        lambda history: history.is_executing,
    ),
    *_of_a_place(Fault.DEADLINE),
    *_of_a_place(Fault.PLAN_FAILED),
    Rule(Fault.NO_COPY, ALWAYS, Action.FALL_BACK),
    Rule(Fault.NODE_LOST, NO_NODE[0], Action.STOP, NO_NODE[1]),
    Rule(Fault.NODE_LOST, STARTING[0], Action.START_ANEW, STARTING[1]),
    Rule(Fault.NODE_LOST, LOST_OFTEN[0], Action.FALL_BACK, LOST_OFTEN[1]),
    Rule(Fault.NODE_LOST, FRUITLESS[0], Action.FALL_BACK, FRUITLESS[1]),
    Rule(Fault.NODE_LOST, ALWAYS, Action.REPLACE_NODE),
    Rule(Fault.BAD_NUMBERS, SUSPECTED_WITH_ROOM[0], Action.REPLACE_NODE, SUSPECTED_WITH_ROOM[1]),
    Rule(
        Fault.BAD_NUMBERS,
        "again on the same data, and --flash-recovery-nan skip",
        Action.SKIP,
        lambda history: history.again and history.nan is NanChoice.SKIP,
    ),
    Rule(
        Fault.BAD_NUMBERS,
        "again on the same data, and --flash-recovery-nan stop",
        Action.STOP,
        lambda history: history.again and history.nan is NanChoice.STOP,
    ),
    Rule(Fault.BAD_NUMBERS, "again behind the newest checkpoint", Action.STOP, lambda history: history.fell_back),
    Rule(
        Fault.BAD_NUMBERS,
        "too often in the same step",
        Action.FALL_BACK,
        lambda history: history.setbacks > history.max_setbacks,
    ),
    Rule(Fault.BAD_NUMBERS, ALWAYS, Action.RETRY),
    *_suspects(Fault.CORRUPTION),
    Rule(Fault.CORRUPTION, ALWAYS, Action.FALL_BACK),
    Rule(Fault.SLOW, ALWAYS, Action.NOTE),
)


def decide(fault: Fault, history: History) -> Rule:
    return next(rule for rule in POLICY if rule.fault is fault and rule.applies(history))
