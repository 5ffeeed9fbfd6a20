"""When to stop, whether or not the best has been found."""

from __future__ import annotations

import time
from dataclasses import dataclass


class OutOfTime(Exception):
    """What was under way is given up. The solver catches it and returns the best that it has."""


@dataclass(frozen=True)
class Limits:
    """``rounds``: projections and ascents at most. ``seconds``: of the whole call; looked at between two trees, so it
    is overrun by one of them at most."""

    rounds: int = 10
    seconds: float | None = None
    ascent_steps: int = 200

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.ascent_steps < 1:
            raise ValueError(f"no round or no step is allowed at all: {self}")

    def deadline(self) -> Deadline:
        return Deadline(None if self.seconds is None else time.monotonic() + self.seconds)


@dataclass(frozen=True)
class Deadline:
    """A time of the monotonic clock, which all processes of a machine share."""

    at: float | None = None

    def check(self) -> None:
        """Raises ``OutOfTime`` from then on."""
        if self.at is not None and time.monotonic() >= self.at:
            raise OutOfTime
