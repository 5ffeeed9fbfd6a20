"""What each method says of the same scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bench.generated_cluster import Indices
from megatron_flashrecovery.diagnose import localization
from megatron_flashrecovery.diagnose.attribution import attribute
from megatron_flashrecovery.diagnose.diagnosis import Diagnosis, Suspect
from megatron_flashrecovery.diagnose.histories import Histories
from megatron_flashrecovery.diagnose.localize import combined, unexplained
from megatron_flashrecovery.diagnose.regions import find_regions
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.search import Search, Searched
from megatron_flashrecovery.diagnose.topology import Topology

METHODS = ("threshold", "scan", "gbgp", "product")
SEARCH = Search(seconds=1e6)
"""As in the product, but without its deadline: what is measured must not depend on what else the machine does."""
_FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True, eq=False)
class Answer:
    """``reaches``: of the elements that are named, the likeliest first, each reach once. ``ranks``: that are said to be
    harmed. ``blames``: whether anything is said to be wrong."""

    reaches: tuple[bytes, ...]
    ranks: Indices
    blames: bool
    seconds: float

    def named(self, reaches: Sequence[bytes], first: int) -> float:
        """The share of these that is among the first."""
        return sum(each in self.reaches[:first] for each in reaches) / len(reaches)

    def f(self, truth: Indices) -> float:
        right = np.intersect1d(self.ranks, truth).size
        return 2 * right / (self.ranks.size + truth.size) if right else 0.0


def answers(topology: Topology, scores: Scores, methods: Sequence[str]) -> Iterator[tuple[str, Answer]]:
    began = time.process_time()
    scanned = localization.localize(topology, scores)
    of_scan = time.process_time() - began
    began = time.process_time()
    # Where the scan finds nothing, the product searches the same scores: once is enough.
    searched = find_regions(topology, scores, SEARCH) if "gbgp" in methods else None
    of_search = time.process_time() - began
    if "threshold" in methods:
        yield "threshold", _threshold(scores)
    if "scan" in methods:
        yield "scan", _answer(topology, scanned, of_scan)
    if searched is not None:
        yield "gbgp", _of_regions(topology, scores, searched, of_search)
    if "product" in methods:
        began = time.process_time()
        left = unexplained(topology, scores, scanned)
        reused = searched if not scanned.faults else None
        found = combined(topology, left, scanned, reused or find_regions(topology, left, SEARCH))
        taken = time.process_time() - began + (of_search if reused else 0.0)
        yield "product", _answer(topology, found, of_scan + taken)


def _of_regions(topology: Topology, scores: Scores, searched: Searched, seconds: float) -> Answer:
    explained = [attribute(topology, scores, region.ranks.tolist(), region.p) for region in searched.regions]
    suspects = [suspect for each in explained for suspect in each.suspects]
    ranks = np.concatenate([np.empty(0, dtype=np.int64), *(region.ranks for region in searched.regions)])
    return Answer(_reaches(topology, suspects), np.unique(ranks), bool(searched.regions), seconds)


def _answer(topology: Topology, diagnosis: Diagnosis, seconds: float) -> Answer:
    harmed = [rank for fault in diagnosis.faults for rank in fault[0].ranks]
    ranks = np.unique(np.array([*harmed, *diagnosis.region], dtype=np.int64))
    blames = bool(diagnosis.faults or diagnosis.region)
    return Answer(_reaches(topology, diagnosis.suspects), ranks, blames, seconds)


def _reaches(topology: Topology, suspects: Sequence[Suspect]) -> tuple[bytes, ...]:
    number = {element: k for k, element in enumerate(topology.elements)} if suspects else {}
    return tuple(dict.fromkeys(topology.ranks_of(number[each.element]).tobytes() for each in suspects))


def _threshold(scores: Scores) -> Answer:
    """Benjamini and Hochberg, with the p of a normal tail."""
    began = time.process_time()
    z = Histories.of(scores, 1).whole
    order = np.argsort(-z, kind="stable")
    allowed = _FALSE_DISCOVERIES * np.arange(1, z.size + 1) / z.size
    limits = np.array([NormalDist().inv_cdf(1 - each) for each in allowed])
    above = np.flatnonzero(z[order] >= limits)
    ranks = np.sort(order[: above[-1] + 1]) if above.size else np.empty(0, dtype=np.int64)
    return Answer((), ranks, bool(above.size), time.process_time() - began)
