"""The search for the element that is to blame, as a diagnosis of a run calls it."""

from __future__ import annotations

from megatron_flashrecovery.diagnose.diagnosis import Diagnosis
from megatron_flashrecovery.diagnose.localization import localize
from megatron_flashrecovery.diagnose.standardization import Standardized
from megatron_flashrecovery.diagnose.topology import Topology
from megatron_flashrecovery.diagnose.trial import Trial


def locate(topology: Topology, measured: Standardized, trial: Trial) -> Diagnosis:
    return localize(topology, measured.scores, trial, measured)
