"""The phases of a job; each holds only what is valid in it.

```
Starting ──► Training ──► Draining ──► Staffing ──► Executing ──► Training
   │             │           │            │             │
   │             │           └────────────┴─────────────┘  a loss, or a missed deadline: Draining, in a new epoch
   │             └──► Finished
   └──► Starting             a loss before everybody was ready; also from anywhere, when the job falls back
any ──► Halted               nothing to fall back to
```
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.drain import Wait
from megatron_flashrecovery.core.ids import GroupKey, NodeId, OrderNumber, Rank
from megatron_flashrecovery.core.messages import RanksHung, RestartAll
from megatron_flashrecovery.core.planner import RecoveryPlan


@dataclass
class Starting:
    """Every worker was started from the top, by ``order`` unless it is the first start. ``deadline`` is set while seats
    wait for a node."""

    order: RestartAll | None = None
    deadline: float | None = None
    ready: set[Rank] = field(default_factory=set)


@dataclass
class Training:
    """Everybody trains, or waits at the end for the others."""

    finished: set[Rank] = field(default_factory=set)


@dataclass
class Draining:
    """Ranks stop, say where they stand, and get out of each other's way.

    ``silent`` counts the ranks that have to report (again), ``heard`` are those that need not; ``since`` is the order
    that a report of a rank must have obeyed, if it is a later one than the park order. ``joining`` are replacements
    that are not ready, with the moment at which they are overdue.
    """

    census: Census
    parked: OrderNumber
    silent: int
    joining: dict[Rank, float]
    deadline: float
    severed: set[GroupKey]
    heard: set[Rank] = field(default_factory=set)
    since: dict[Rank, OrderNumber] = field(default_factory=dict)
    answered: dict[Rank, int] = field(default_factory=dict)
    missing: dict[GroupKey, int] = field(default_factory=dict)
    """How much was missing in a group when it was matched."""
    waiting: Wait | None = None
    patient_until: float = 0.0
    unchanged: dict[GroupKey, tuple[int, int, int]] = field(default_factory=dict)
    """The groups waited for in which nothing has completed since, with their marks."""
    watched: dict[NodeId, RanksHung] = field(default_factory=dict)
    """What the nodes see of those that have not stopped."""
    stopped_since: float | None = None
    """When the last rank joined those none of whose threads runs."""


@dataclass
class Staffing:
    """Nobody moves any more; replacements are still joining."""

    census: Census
    joining: dict[Rank, float]


@dataclass
class Executing:
    """Every rank carries out its share of the plan."""

    plan: RecoveryPlan
    deadline: float
    executed: set[Rank] = field(default_factory=set)


@dataclass
class Finished:
    """Every rank has completed its last step and was released."""


@dataclass
class Halted:
    """The job cannot go on."""

    reason: str


Phase: TypeAlias = Starting | Training | Draining | Staffing | Executing | Finished | Halted
