"""The inner problem: raise the objective over the allowed entries of the box, by projected gradients."""

from __future__ import annotations

import numpy as np

from megatron_flashrecovery.diagnose.gbgp.limits import Deadline
from megatron_flashrecovery.diagnose.gbgp.network import Mask, Vector
from megatron_flashrecovery.diagnose.gbgp.objective import Objective, WithStart

_ENOUGH = 1e-4
"""The part of the gain that the gradient promises which a step must give, else it is halved (Armijo)."""
_HALVINGS = 40
_STALL, _LITTLE = 3, 1e-8
"""So many steps in a row that give less than this part of the value are the last: with many entries the moves stay
large as a norm long after the supports have settled."""


def best_within(objective: Objective, x: Vector, allowed: Mask, steps: int, deadline: Deadline) -> Vector:
    """A point of [0, 1]^size that is 0 outside of ``allowed`` and no worse than ``x`` there, nor than the start that
    the objective knows. A local maximum if ``steps`` suffice: the objective need not be concave."""
    begin = np.where(allowed, np.clip(x, 0.0, 1.0), 0.0)
    if isinstance(objective, WithStart):
        known = objective.start(allowed)
        if objective.value(known) > objective.value(begin):
            begin = known
    return _climb(objective, begin, allowed, steps, deadline)


def _climb(objective: Objective, x: Vector, allowed: Mask, steps: int, deadline: Deadline) -> Vector:
    value, slope = objective.value(x), np.where(allowed, objective.gradient(x), 0.0)
    step = 1 / max(float(np.abs(slope).max()), 1e-12)
    stalled = 0
    for _ in range(steps):
        deadline.check()
        for _ in range(_HALVINGS):
            there = np.clip(x + step * slope, 0.0, 1.0)
            move = there - x
            found = objective.value(there)
            if found >= value + _ENOUGH * float(slope @ move):
                break
            step /= 2
        else:
            return x
        slope_there = np.where(allowed, objective.gradient(there), 0.0)
        bend = abs(float(move @ (slope_there - slope)))
        length = float(move @ move)
        stalled = stalled + 1 if found - value <= _LITTLE * abs(found) else 0
        x, value, slope = there, found, slope_there
        if stalled >= _STALL:
            break
        # Barzilai and Borwein: the curvature along the last move is a better guess than the last step.
        step = min(length / bend, 1e6) if bend > 0 else 2 * step
    return x
