"""How unusual each rank was in each window, by what it caused itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CAP = 6.0
"""What one window of one rank counts at most, either way: a single window proves nothing (see ``standing_out``)."""


@dataclass(frozen=True, eq=False)
class Scores:
    """``values``: (windows, ranks) robust deviations from ranks of the same role, about N(0, 1) if all is well, high is
    bad, capped; NaN where nothing was measured. ``strata``: (ranks,) ranks with the same label are exchangeable."""

    values: npt.NDArray[np.float64]
    strata: npt.NDArray[np.int64]
