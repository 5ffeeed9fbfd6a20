"""What a group handle asks of the session: may I start this operation, and what now that it failed?

The handle calls these on whatever thread issues the operation (the main thread, or an autograd thread that it drives).
They may block for as long as a recovery takes, and they end in one of three ways: the operation goes ahead (possibly
on a new communicator), it is answered with results that somebody else has, or ``Interrupted`` unwinds to the protected
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.reports import Spot


class Interrupted(BaseException):
    """A recovery discards the call that is under way. Caught by the session's protected call, and by nobody else: it is
    no ``Exception``, so that a framework's own ``except Exception`` does not swallow it."""

    def __init__(self, resume_step: Step) -> None:
        super().__init__(f"unwinding to resume at step {resume_step}")
        self.resume_step = resume_step


@dataclass(frozen=True)
class Proceed:
    """Start the operation (again) on the handle's communicator as it is now."""


@dataclass(frozen=True)
class Answer:
    """Do not communicate: the operation's output tensors are these bytes, one entry per output, in order."""

    payloads: Sequence[bytes]


Verdict: TypeAlias = Proceed | Answer


class Parking(Protocol):
    def before(self, spot: Spot) -> Verdict:
        """Called before an operation is issued. Returns at once while nothing is wrong. Raises ``Interrupted``."""

    def failed(self, spot: Spot, error: Exception) -> Verdict:
        """Called when an issued operation raised. If no recovery comes within its deadline, raises ``error``."""

    def completed(self, spot: Spot, results: Sequence[bytes] | None) -> None:
        """Called when an operation has completed on the device. ``results`` are given for reductions of at most 256
        bytes in all: one entry per output tensor."""

    def blocked_by(self, rank: Rank) -> None:
        """Called when a handle sees that a peer's connection is gone, before anybody has said so; may do nothing."""
