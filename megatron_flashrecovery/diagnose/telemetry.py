"""What is measured of each rank that it, or what it sits on, causes itself; never what it waits for others.

In synchronous training everybody waits for the slowest, so waiting spreads a fault over the job and hides its source.
Lateness is not derived from waiting either: the sums of waiting that a rank keeps say in no group who came last, and in
sum a rank waits little exactly if it computes long, which is measured already. Who can time arrivals within one group
by one clock may give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.elements import Kind


class Metric(StrEnum):
    """In each window: seconds of a rank's own computing in a step; seconds that it arrives in collectives after the
    first of its group; packets that its links sent again; errors that its device or links counted; seconds since its
    last heartbeat."""

    COMPUTE = "compute"
    LATENESS = "lateness"
    RETRANSMITS = "retransmits"
    ERRORS = "errors"
    SILENCE = "silence"


@dataclass(frozen=True)
class Nature:
    """How a metric is compared. A deviation counts in units of the spread among peers, but at least of ``relative``
    times what is usual and of ``absolute``: in a healthy job that is almost free of noise a difference that nobody
    would mind shall not count. ``is_count``: its square root is compared, whose spread does not depend on the rate."""

    relative: float
    absolute: float
    is_count: bool = False


NATURE: Mapping[Metric, Nature] = {
    # A tenth slower is five units; the scheduler of a host takes half a millisecond now and then.
    Metric.COMPUTE: Nature(relative=0.02, absolute=0.0005),
    Metric.LATENESS: Nature(relative=0.02, absolute=0.001),
    # 2 sqrt(n + 3/8) has a deviation of one for a Poisson number (Anscombe).
    Metric.RETRANSMITS: Nature(relative=0.0, absolute=1.0, is_count=True),
    Metric.ERRORS: Nature(relative=0.0, absolute=1.0, is_count=True),
    Metric.SILENCE: Nature(relative=0.0, absolute=0.5),
}

_CANNOT_CAUSE: Mapping[Metric, frozenset[Kind]] = {
    # Without waiting, a rank computes on its device and host: no network is part of it.
    Metric.COMPUTE: frozenset({Kind.NIC, Kind.LEAF, Kind.SPINE}),
    # A device that is broken sends nothing again.
    Metric.RETRANSMITS: frozenset({Kind.DEVICE, Kind.POWER}),
}


def can_cause(kind: Kind, metric: Metric) -> bool:
    """Whether a fault of such an element can show in this metric. Communicators: always, for what their ranks do in
    common may be the program's."""
    return kind not in _CANNOT_CAUSE.get(metric, frozenset())


@dataclass(frozen=True, eq=False)
class Telemetry:
    """``values``: (windows, ranks) of each metric, all of one shape, the newest window last, NaN where nothing was
    measured. ``roles``: (ranks,) ranks with the same label do the same work (a pipeline stage, see ``stages_of``).

    Raises ``ValueError`` where the shapes differ, or something is negative."""

    values: Mapping[Metric, npt.NDArray[np.float64]]
    roles: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        windows = {len(each) for each in self.values.values()}
        for metric, each in self.values.items():
            if each.ndim != 2 or each.shape[1:] != self.roles.shape or len(windows) > 1:
                raise ValueError(f"{metric} of shape {each.shape} for {self.roles.size} ranks: (windows, ranks) each")
            if (each < 0).any():
                raise ValueError(f"{metric} is negative somewhere: give seconds and counts")

    @property
    def windows(self) -> int:
        return len(next(iter(self.values.values()), ()))
