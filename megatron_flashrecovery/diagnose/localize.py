"""Which element is to blame: the scan of all that the topology knows, and GBGP for what that leaves unexplained.

The scan knows the reach of every element, so of known elements it finds more, in less time. What its faults reach is
taken out, and GBGP looks for ranks that are conspicuous together in the rest: in a healthy rest that costs a few
permutations, and a cause that the topology does not know is found (measured: docs/diagnose.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import util

import numpy as np

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose import localization
from megatron_flashrecovery.diagnose.attribution import attribute
from megatron_flashrecovery.diagnose.diagnosis import Diagnosis
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.search import Search, Searched
from megatron_flashrecovery.diagnose.standardization import Standardized
from megatron_flashrecovery.diagnose.topology import Topology
from megatron_flashrecovery.diagnose.trial import Trial

_MISSING = "causes that the topology does not know were not looked for: pip install 'megatron-flashrecovery[diagnose]'"


def localize(
    topology: Topology,
    scores: Scores,
    trial: Trial | None = None,
    measured: Standardized | None = None,
    search: Search | None = None,
) -> Diagnosis:
    """``trial``: of the scan; ``measured``: what the scores are made of, for the evidence; ``search``: of GBGP, with
    its limit in seconds. Without the extra ``diagnose`` the scan is all there is; where it blames nobody,
    ``undetermined`` says so.

    The same arguments give the same diagnosis, unless the search runs out of time, which ``undetermined`` says too.
    Seconds where there is something for GBGP to find, milliseconds where there is not. Raises ``ValueError`` if scores
    are not those of these ranks."""
    scanned = localization.localize(topology, scores, trial, measured)
    if not is_installed():
        return _noted(scanned, _MISSING)
    # Here: the scan has to work without what this imports.
    from megatron_flashrecovery.diagnose.regions import find_regions

    left = unexplained(topology, scores, scanned)
    return combined(topology, left, scanned, find_regions(topology, left, search), trial, measured)


def is_installed() -> bool:
    """Whether the extra ``diagnose`` is."""
    return all(util.find_spec(name) is not None for name in ("scipy", "pcst_fast"))


def unexplained(topology: Topology, scores: Scores, scanned: Diagnosis) -> Scores:
    """Without those whom a fault that was found can harm."""
    if not scanned.faults:
        return scores
    named = {fault[0].element for fault in scanned.faults}
    values = scores.values.copy()
    for number, element in enumerate(topology.elements):
        if element in named:
            values[:, topology.ranks_of(number)] = np.nan
    return Scores(values, scores.strata)


def combined(
    topology: Topology,
    left: Scores,
    scanned: Diagnosis,
    searched: Searched,
    trial: Trial | None = None,
    measured: Standardized | None = None,
) -> Diagnosis:
    """Of what the scan has found, and what GBGP in the scores that were ``left``, one diagnosis."""
    if not searched.regions:
        why = f"the search for causes that the topology does not know {searched.cut_off}" if searched.cut_off else None
        return _noted(scanned, why)
    explained = [
        attribute(topology, left, region.ranks.tolist(), region.p, trial, measured) for region in searched.regions
    ]
    ranks = np.sort(np.concatenate([region.ranks for region in searched.regions]))
    return replace(_joined(scanned, explained), region=tuple(Rank(int(rank)) for rank in ranks))


def _noted(scanned: Diagnosis, note: str | None) -> Diagnosis:
    """A note matters only where nobody is blamed."""
    if note is None or scanned.undetermined is None:
        return scanned
    return replace(scanned, undetermined=f"{scanned.undetermined}; {note}")


def _joined(scanned: Diagnosis, explained: Sequence[Diagnosis]) -> Diagnosis:
    """The scan's faults first, then what explains the regions, the most conspicuous of them first. A region that
    nothing explains may be due to what is behind the scan's faults as well: then these are victims."""
    faults = (*scanned.faults, *(fault for each in explained for fault in each.faults))
    of_scan = scanned.suspects if scanned.faults else ()
    of_regions = (suspect for each in explained for suspect in each.suspects)
    suspects = {suspect.element: suspect for suspect in (*of_scan, *of_regions)}
    unknown = next((each.undetermined for each in explained if each.undetermined is not None), None)
    if scanned.faults and unknown is not None:
        named = ", ".join(str(fault[0].element) for fault in scanned.faults)
        unknown = f"beside {named}, perhaps for the same cause: {unknown}"
    elif scanned.faults:
        unknown = scanned.undetermined
    return Diagnosis(tuple(suspects.values()), unknown, explained[0].method, faults)
