"""GBGP over a cluster: which ranks are conspicuous together, whatever it is that they share.

A block is a layer at a moment: the hardware, and each kind of communicator, each in as many copies as there are
moments. All are under one ratio, which counts only what is measured, and two kinds of couplings tie them together: a
unit in one layer is the same unit in the others, and the same a moment later (``gbgp.layered``). Units are hosts: half
of the ranks of a host, each hardly unusual, are much for one host. Ranks are where no host has several.

What makes it affordable is that only the most conspicuous units, always as many, may be part of a region, and only
elements that two of them depend on connect: so the problem has the same size in a cluster of any size. The choice is
made anew for each permutation, so p pays for it.
"""

from __future__ import annotations

import time

import numpy as np

from megatron_flashrecovery.diagnose.gbgp import Calibration, exchange
from megatron_flashrecovery.diagnose.gbgp.limits import OutOfTime
from megatron_flashrecovery.diagnose.grain import Grain, Part, hosts_of
from megatron_flashrecovery.diagnose.histories import Histories
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.search import Region, Search, Searched
from megatron_flashrecovery.diagnose.topology import Topology


def find_regions(topology: Topology, scores: Scores, search: Search | None = None) -> Searched:
    """The same arguments give the same regions, unless time runs out: then there are fewer permutations, and so maybe
    none of them is significant.

    Permutations exchange whole histories within strata. So p asks whether conspicuous ranks are *together*: it does
    not matter how scores are distributed, nor how windows depend on each other, and a single rank is never
    significant. That is for the scan to see.
    """
    return Searching(topology, scores, search or Search()).searched()


class Searching:
    """One search, under way."""

    def __init__(self, topology: Topology, scores: Scores, search: Search) -> None:
        self._search = search
        self._end = time.monotonic() + search.seconds
        self._strata = scores.strata
        self.histories = Histories.of(scores, search.moments)
        hosts = hosts_of(topology)
        if hosts is None:
            self._grain = Grain(topology, np.arange(topology.world), search.ranks)
        else:
            self._grain = Grain(topology, hosts, search.hosts)

    def searched(self) -> Searched:
        rows: list[list[float]] = []
        observed: list[Part | None] = []
        cut_off = None
        try:
            observed = self.parts(self.histories)
            rows.append(scores_of(observed))
            self._permute(rows)
        except OutOfTime:
            done, asked = max(len(rows) - 1, 0), self._search.permutations
            cut_off = f"stopped after {done} of {asked} permutations, at {self._search.seconds:g} s"
        if len(rows) < 2:
            return Searched((), 0, cut_off)
        calibration = Calibration(np.array(rows))
        if cut_off is not None:
            p = calibration.p(calibration.best, rows[0][calibration.best])
            return Searched((), len(rows) - 1, f"{cut_off}: the best region has p {p:.2g} by then")
        return Searched(tuple(self._peeled(observed, calibration)), len(rows) - 1, None)

    def parts(self, histories: Histories) -> list[Part | None]:
        """The best for each sparsity. Raises ``OutOfTime``."""
        candidates = self._grain.candidates(histories)
        sparsities = self._grain.look.sparsities
        return [self._grain.best(candidates, histories, each, self._end - time.monotonic()) for each in sparsities]

    def shuffled(self, rng: np.random.Generator) -> Histories:
        return self.histories.exchanged(exchange(self._strata, rng))

    def _permute(self, rows: list[list[float]]) -> None:
        """Ends once so many permutations are as conspicuous that nothing can come out as significant: noise costs a
        few of them. Giving up reports nothing, so it does not make a p too small."""
        rng = np.random.default_rng(self._search.seed)
        most = round(self._search.level * (self._search.permutations + 1), 6)
        for _ in range(self._search.permutations):
            rows.append(scores_of(self.parts(self.shuffled(rng))))
            if _as_conspicuous(rows) > most:
                return

    def _peeled(self, parts: list[Part | None], calibration: Calibration) -> list[Region]:
        """The best one, then the best without its ranks, and so on; each held against what all scores make of noise,
        which is more than the rest would: p is too large rather than too small."""
        found: list[Region] = []
        histories, look = self.histories, calibration.best
        while (part := parts[look]) is not None and len(found) < self._search.most:
            p = calibration.p(look, part.score)
            if p > self._search.level:
                break
            found.append(Region(part.ranks, p, part.score))
            histories = histories.without(part.ranks)
            try:
                parts = self.parts(histories)
            except OutOfTime:
                break
            look = calibration.best_of(scores_of(parts))
        return found


def scores_of(parts: list[Part | None]) -> list[float]:
    return [0.0 if each is None else each.score for each in parts]


def _as_conspicuous(rows: list[list[float]]) -> int:
    """How many rows are, the first one included."""
    calibration = Calibration(np.array(rows))
    return round(calibration.p(calibration.best, rows[0][calibration.best]) * len(rows))
