"""What a diagnosis says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose.elements import Element


@dataclass(frozen=True)
class Suspect:
    """``p``: the probability that a job in which nothing is wrong has a suspect as conspicuous, anywhere. ``ranks``:
    those in its reach that are unusual. ``evidence``: for people."""

    element: Element
    p: float
    score: float
    ranks: tuple[Rank, ...]
    evidence: str


@dataclass(frozen=True)
class Diagnosis:
    """``suspects``: the likeliest first. ``undetermined`` says why nobody is blamed, or why the first is not told from
    the next ones; None if the first is to blame. ``method``: ``scan`` or ``gbgp``. ``faults``: for each fault that is
    beyond chance, the surest first, all suspects that are not told apart: one alone is to blame; of several one is, and
    what they have in common (a host) is known all the same. ``region``: ranks that are conspicuous together beyond
    what the scan explains, whether or not an element explains them."""

    suspects: tuple[Suspect, ...]
    undetermined: str | None
    method: str
    faults: tuple[tuple[Suspect, ...], ...] = ()
    region: tuple[Rank, ...] = ()

    def counted(self, share: float) -> Diagnosis:
        """With p as it is if this was tried at a ``share`` of the level only, because others were or will be, too."""

        def one(suspect: Suspect) -> Suspect:
            return replace(suspect, p=min(1.0, suspect.p / share))

        faults = tuple(tuple(map(one, fault)) for fault in self.faults)
        return replace(self, suspects=tuple(map(one, self.suspects)), faults=faults)
