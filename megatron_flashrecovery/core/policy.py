"""What is done about a fault: one table from what it is, and from what happened before, to an action.

The first rule of a fault that applies is the one that counts, and the last one of each always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


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
    """Nobody knows since when the memory of this device was wrong."""
    COMMUNICATOR_ERROR = "communicator error"
    HANG = "hang"
    CROWD = "hang of many"
    DEADLOCK = "everybody waits"
    DEADLINE = "missed deadline"
    NODE_LOST = "node lost"
    BAD_NUMBERS = "bad numbers"
    """NaN or Inf in loss or gradients, or a spike, seen before the update."""
    CORRUPTION = "silent corruption"
    """Data-parallel peers differ."""
    SLOW = "slow rank"


class Action(Enum):
    REFILL = "refill in place"
    REPLACE_PROCESS = "replace the process"
    REPLACE_NODE = "replace the node"
    RETRY = "retry the step on the same data"
    SKIP = "skip the batch and record it"
    ROLL_BACK = "roll back one step and retry"
    FALL_BACK = "newest checkpoint"
    NOTE = "note it"
    STOP = "stop"


class NanChoice(Enum):
    """What the user wants where numbers are bad again on the same data (``--flash-recovery-nan``)."""

    STOP = "stop"
    SKIP = "skip"
    RETRY = "retry"


@dataclass(frozen=True)
class History:
    """What happened before. ``again``: the same fault, in the same step, on the same rank (of a job's faults: in the
    job), after a retry. ``setbacks``: how often this seat was lost without progress, this time included.
    ``suspicions``: how often this device was suspected, this time included. ``fell_back``: the job went back to a
    checkpoint for this before."""

    again: bool = False
    setbacks: int = 0
    suspicions: int = 0
    max_setbacks: int = 3
    nan: NanChoice = NanChoice.STOP
    fell_back: bool = False


@dataclass(frozen=True)
class Rule:
    """``when`` says in words what ``applies`` asks."""

    fault: Fault
    when: str
    action: Action
    applies: Callable[[History], bool] = lambda _: True


_ALWAYS = "always"

_LOST_OFTEN = ("the seat was lost too often without progress", lambda history: history.setbacks > history.max_setbacks)
_SUSPECTED = ("its device was suspected before", lambda history: history.suspicions > 1)
_AGAIN = ("again in the same step of the same rank, after a retry", lambda history: history.again)


def _ends_a_process(fault: Fault) -> list[Rule]:
    return [
        Rule(fault, _LOST_OFTEN[0], Action.FALL_BACK, _LOST_OFTEN[1]),
        Rule(fault, _ALWAYS, Action.REPLACE_PROCESS),
    ]


def _of_a_device(fault: Fault) -> list[Rule]:
    return [Rule(fault, _SUSPECTED[0], Action.REPLACE_NODE, _SUSPECTED[1]), *_ends_a_process(fault)]


POLICY: Sequence[Rule] = (
    *_ends_a_process(Fault.PROCESS_ENDED),
    Rule(Fault.EXCEPTION, _AGAIN[0], Action.STOP, _AGAIN[1]),
    *_ends_a_process(Fault.EXCEPTION),
    *_ends_a_process(Fault.OUT_OF_MEMORY),
    *_of_a_device(Fault.DEVICE_ERROR),
    Rule(Fault.DEVICE_MEMORY, _AGAIN[0], Action.STOP, _AGAIN[1]),
    *_ends_a_process(Fault.DEVICE_MEMORY),
    *_of_a_device(Fault.DEVICE_POISONED),
    Rule(Fault.COMMUNICATOR_ERROR, _AGAIN[0], Action.FALL_BACK, _AGAIN[1]),
    Rule(Fault.COMMUNICATOR_ERROR, _ALWAYS, Action.RETRY),
    *_ends_a_process(Fault.HANG),
    Rule(Fault.CROWD, "for longer than --hang-timeout", Action.FALL_BACK, lambda history: history.again),
    Rule(Fault.CROWD, _ALWAYS, Action.NOTE),
    Rule(Fault.DEADLOCK, _AGAIN[0], Action.STOP, _AGAIN[1]),
    Rule(Fault.DEADLOCK, _ALWAYS, Action.RETRY),
    *_ends_a_process(Fault.DEADLINE),
    Rule(Fault.NODE_LOST, _ALWAYS, Action.REPLACE_NODE),
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
    Rule(Fault.BAD_NUMBERS, _ALWAYS, Action.RETRY),
    Rule(Fault.CORRUPTION, _SUSPECTED[0], Action.REPLACE_NODE, _SUSPECTED[1]),
    Rule(Fault.CORRUPTION, _ALWAYS, Action.FALL_BACK),
    Rule(Fault.SLOW, _ALWAYS, Action.NOTE),
)


def decide(fault: Fault, history: History) -> Rule:
    return next(rule for rule in POLICY if rule.fault is fault and rule.applies(history))
