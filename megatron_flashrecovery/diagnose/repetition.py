"""Whose incidents come again: elements that were hit more often than the rest of the cluster, by chance alone.

If nothing is wrong with any place, each incident comes to some rank, one as likely as another (one that takes a whole
host, to some host). An element with n of N ranks then has a share n/N of them. Its score is the likelihood ratio of the
share that it has against that one, k log(f/q) + (m - k) log((1-f)/(1-q)) for k = fm of m: for rates far from 1 that is
what a Poisson test of its rate against that of the others asks, but without an assumption about how often things
break. Since all elements are tried, and they overlap, p comes from throwing the same incidents at random again: five
losses under one leaf switch of forty blame it, five anywhere blame nobody, and one blames nobody ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose.diagnosis import Diagnosis, Suspect
from megatron_flashrecovery.diagnose.elements import Element
from megatron_flashrecovery.diagnose.topology import Indices, Topology

Values = npt.NDArray[np.float64]
METHOD = "repeated incidents"
_MOST = 5
_NAMED = 3
_EQUAL = 1e-9
_ENOUGH = 20
_AT_ONCE = 50


@dataclass(frozen=True)
class Throws:
    """``permutations`` of all incidents; ``level``: the share of healthy jobs in which somebody may be blamed."""

    permutations: int = 999
    level: float = 0.01
    seed: int = 0


def find_repeated(
    topology: Topology, hosts: Indices, incidents: Sequence[Sequence[Rank]], throws: Throws | None = None
) -> Diagnosis:
    """``hosts``: (world,) the number of the host of each rank. ``incidents``: the ranks that each has hit, all of one
    host; what hits several hosts at once is one for each, and what hits several ranks of a host has hit the host. Costs
    O(permutations * incidents * elements per rank).

    The first suspect explains the incidents inside it best; what it does not explain is looked at again."""
    throws = throws or Throws()
    rng, search = np.random.default_rng(throws.seed), _Search(topology, hosts)
    units = np.array([search.unit(ranks) for ranks in incidents], dtype=np.int64)
    suspects: list[Suspect] = []
    why = "no incident speaks against a place" if not units.size else None
    while units.size and len(suspects) < _MOST:
        scores = search.scores(units[None])[0]
        alike = np.flatnonzero(scores >= scores.max() - _EQUAL)
        best = int(alike[0])  # of equals: hardware before communicators, the smaller before the larger
        reach = topology.ranks_of(best)
        is_inside = np.array([np.isin(search.ranks_of(unit), reach).all() for unit in units])
        p = search.p(scores[best], units, throws, rng)
        if p > throws.level:
            why = _too_likely(units.size, int(is_inside.sum()), topology.elements[best], p)
            break
        hit = np.unique(np.concatenate([search.ranks_of(unit) for unit in units[is_inside]]))
        evidence = (
            f"{is_inside.sum()} of {units.size} incidents, and it has {reach.size / topology.world:.1%} of the ranks"
        )
        evidence += _not_told_from([topology.elements[k] for k in alike[1:]])
        ranks = tuple(Rank(int(rank)) for rank in hit)
        suspects.append(Suspect(topology.elements[best], p, float(scores[best]), ranks, evidence))
        units = units[~is_inside]
    return Diagnosis(tuple(suspects), None if suspects else why, METHOD, tuple((suspect,) for suspect in suspects))


def _too_likely(incidents: int, inside: int, element: Element, p: float) -> str:
    number = f"{incidents} {'incident' if incidents == 1 else 'incidents'}"
    return f"{number}, at most {inside} in one place ({element}): chance alone does that in {p:.0%} of all cases"


def _not_told_from(alike: Sequence[Element]) -> str:
    if not alike:
        return ""
    more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    return f"; not told from {', '.join(map(str, alike[:_NAMED]))}{more}, with the same ones"


class _Search:
    """Incidents are units here: a rank, or behind all ranks a host. ``_above`` lists the elements each is inside of."""

    def __init__(self, topology: Topology, hosts: Indices) -> None:
        self._world, self._sizes = topology.world, np.diff(topology.start)
        owner = np.repeat(np.arange(self._sizes.size), self._sizes)
        over = np.split(owner[np.argsort(topology.ranks, kind="stable")], _bounds(topology))
        by_host = np.argsort(hosts, kind="stable")
        on_host = np.split(by_host, np.flatnonzero(np.diff(hosts[by_host])) + 1)
        self._host_of = np.empty(self._world, dtype=np.int64)
        for number, ranks in enumerate(on_host):
            self._host_of[ranks] = number
        self._hosts = len(on_host)
        above = over + [_common([over[rank] for rank in ranks]) for ranks in on_host]
        self._above = np.concatenate(above)
        self._first = np.cumsum([0, *(each.size for each in above)])
        whole = np.arange(self._world, self._world + self._hosts)
        self._hosts_inside = self.counts(whole[None])[0] / self._hosts

    def unit(self, ranks: Sequence[Rank]) -> int:
        return int(ranks[0]) if len(ranks) == 1 else self._world + int(self._host_of[ranks[0]])

    def ranks_of(self, unit: int) -> Indices:
        return np.array([unit]) if unit < self._world else np.flatnonzero(self._host_of == unit - self._world)

    def counts(self, units: Indices) -> Indices:
        """(throws, incidents) -> (throws, elements): how many are inside each."""
        lengths = (self._first[units + 1] - self._first[units]).ravel()
        starts = np.repeat(self._first[units].ravel() - np.cumsum(lengths) + lengths, lengths)
        elements = self._above[starts + np.arange(starts.size)]
        throw = np.repeat(np.repeat(np.arange(len(units)), units.shape[1]), lengths)
        found = np.bincount(throw * self._sizes.size + elements, minlength=len(units) * self._sizes.size)
        return found.reshape(len(units), -1)

    def scores(self, units: Indices) -> Values:
        """(throws, incidents) -> (throws, elements), 0 where no more are inside than chance brings there."""
        total = units.shape[1]
        wide = float(np.mean(units[0] >= self._world))
        chance = np.clip((1 - wide) * self._sizes / self._world + wide * self._hosts_inside, 1e-12, 1.0)
        share = self.counts(units) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            more = np.where(share > 0, share * np.log(share / chance), 0.0)
            rest = np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - chance)), 0.0)
        return np.where((share > chance) & (chance < 1), total * (more + rest), 0.0)

    def p(self, score: float, units: Indices, throws: Throws, rng: np.random.Generator) -> float:
        """Enough throws to be sure that it is not significant are enough."""
        as_good = done = 0
        while done < throws.permutations and as_good < _ENOUGH:
            number = min(_AT_ONCE, throws.permutations - done)
            thrown = np.where(
                units < self._world,
                rng.integers(self._world, size=(number, units.size)),
                self._world + rng.integers(self._hosts, size=(number, units.size)),
            )
            as_good += int((self.scores(thrown).max(axis=1) >= score - _EQUAL).sum())
            done += number
        return (1 + as_good) / (1 + done)


def _bounds(topology: Topology) -> Indices:
    return np.cumsum(np.bincount(topology.ranks, minlength=topology.world))[:-1]


def _common(lists: Sequence[Indices]) -> Indices:
    found, number = np.unique(np.concatenate(lists), return_counts=True)
    common: Indices = found[number == len(lists)]
    return common
