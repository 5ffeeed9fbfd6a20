"""The search for the element that is to blame, as a diagnosis of a run calls it: scan and GBGP in the time there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from megatron_flashrecovery.diagnose.diagnosis import Diagnosis
from megatron_flashrecovery.diagnose.localize import localize
from megatron_flashrecovery.diagnose.search import Search
from megatron_flashrecovery.diagnose.standardization import Standardized
from megatron_flashrecovery.diagnose.topology import Topology
from megatron_flashrecovery.diagnose.trial import Trial
from megatron_flashrecovery.runtime.case import Locate

_LEAST_SECONDS = 0.5
_HALF = 0.5
_PERMUTATIONS = Search().permutations


def within(seconds: float, clock: Callable[[], float] = time.monotonic) -> Locate:
    """For all lines of evidence together, of which the first comes first: what GBGP has no time for is said so. The
    scan takes the time that it takes. Each of the two has half of the level."""
    end = clock() + seconds

    def locate(topology: Topology, measured: Standardized, trial: Trial) -> Diagnosis:
        half = trial.level * _HALF
        search = Search(
            level=half,
            permutations=max(_PERMUTATIONS, math.ceil(1 / half)),
            seconds=max(_LEAST_SECONDS, end - clock()),
        )
        return localize(topology, measured.scores, replace(trial, level=half), measured, search).counted(_HALF)

    return locate
