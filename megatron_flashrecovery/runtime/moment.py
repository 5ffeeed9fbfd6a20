"""The moments of a step; in a module without torch, for which a launcher would have to wait."""

from __future__ import annotations

from enum import Enum


class Moment(Enum):
    """The moments of a step that an adapter marks, in their order; faults can be injected at each."""

    FORWARD = "forward"
    BACKWARD = "backward"
    GRAD_SYNC = "grad_sync"
    OPTIMIZER = "optimizer"
    MIRROR = "mirror"
    BETWEEN = "between"
