"""What a job knows of steps whose numbers were bad, and when a number is a spike."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_flashrecovery.core.findings import Finding
from megatron_flashrecovery.core.ids import NodeId, Rank, Step
from megatron_flashrecovery.core.policy import NanChoice

SPIKE_MULTIPLE = 10.0
"""Deviations above the median: gradient norms have long tails, and a note that comes every day is not read."""
SPIKE_WINDOW = 100
SPIKE_NEEDS = 20
"""Steps before anything can be called a spike."""
_LEAST_DEVIATION = 0.05
"""As a share of the median: numbers that hardly move make every step look like a spike."""


@dataclass(frozen=True)
class BadStep:
    """One step whose numbers were bad, and how it ended. ``origin`` is where it began, in words; ``suspect`` the rank
    whose device is suspected."""

    step: Step
    what: str
    times: int
    outcome: str
    origin: str = ""
    suspect: Rank | None = None


@dataclass
class Alarm:
    """What ranks say of the step that everybody is in, and since when."""

    step: Step
    since: float
    what: str
    choice: NanChoice
    ranks: set[Rank] = field(default_factory=set)
    own: dict[Rank, str] = field(default_factory=dict)
    findings: dict[Rank, Finding] = field(default_factory=dict)


@dataclass
class Numbers:
    """``times``: how often the numbers of a step that is not complete were bad; ``own``: whose own ones were at first,
    and on which of the ``nodes`` these ranks sat. ``skipped`` are steps whose update is left out whenever they are
    computed, ``fell_back`` those for which the job has gone back to a checkpoint."""

    alarm: Alarm | None = None
    times: Counter[Step] = field(default_factory=Counter)
    what: dict[Step, str] = field(default_factory=dict)
    own: dict[Step, Mapping[Rank, str]] = field(default_factory=dict)
    nodes: dict[Step, Mapping[Rank, NodeId]] = field(default_factory=dict)
    skipped: set[Step] = field(default_factory=set)
    fell_back: set[Step] = field(default_factory=set)
    ended: list[BadStep] = field(default_factory=list)

    def to_examine(self, resume_step: Step) -> Step | None:
        """Behind this step the next one is to be looked at closely, because its numbers were bad before."""
        due = Step(resume_step + 1)
        return due if self.times[due] and due not in self.skipped else None

    def to_skip(self, resume_step: Step) -> tuple[Step, ...]:
        return tuple(sorted(step for step in self.skipped if step > resume_step))


def is_spike(value: float, before: Sequence[float]) -> bool:
    """Whether a number is far above those of the steps before it (the newest ``SPIKE_WINDOW`` count)."""
    known = [number for number in before[-SPIKE_WINDOW:] if math.isfinite(number)]
    if len(known) < SPIKE_NEEDS or not math.isfinite(value):
        return False
    median = statistics.median(known)
    deviation = statistics.median(abs(number - median) for number in known)
    return value > median + SPIKE_MULTIPLE * max(deviation, _LEAST_DEVIATION * abs(median))
