"""How GBGP searches a cluster, and what it has found."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_flashrecovery.diagnose.topology import Indices


@dataclass(frozen=True)
class Strengths:
    """Of the couplings: a unit in the physical layer and in a logical one, and a unit and itself a moment later."""

    sits_on: float = 0.02
    moment_later: float = 0.05


@dataclass(frozen=True)
class Look:
    """``sparsities``: half of the sizes that are looked for, in each layer; several are paid for in p. ``most``: so
    many units, the highest, are looked at. ``tau``: what the summed score of a unit has to exceed, ``cap``: what it
    counts at most."""

    sparsities: tuple[int, ...]
    most: int
    tau: float = 1.5
    cap: float = 8.0
    rounds: int = 3
    strengths: Strengths = field(default_factory=Strengths)


_HOSTS = Look(sparsities=(4,), most=60)
_RANKS = Look(sparsities=(8,), most=150)


@dataclass(frozen=True)
class Search:
    """``hosts``: how hosts are looked at; ``ranks``: ranks, which is done only where no host is known to have several.
    ``moments``: into how many stretches windows are summed up. ``seconds``: of the whole search. Regions are reported
    at p <= ``level``, at most ``most``. The defaults were chosen on faults of other clusters than those of the bench
    (docs/diagnose.md). Raises ``ValueError`` if so few permutations can prove nothing."""

    hosts: Look = _HOSTS
    ranks: Look = _RANKS
    moments: int = 1
    permutations: int = 499
    level: float = 0.002
    most: int = 5
    seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level * (self.permutations + 1) < 1:
            raise ValueError(f"{self.permutations} permutations can prove nothing at the level of {self.level}: more!")


@dataclass(frozen=True, eq=False)
class Region:
    """``ranks``: sorted. ``p``: the probability that a job in which nothing is wrong has such a region anywhere.
    ``score``: the sum of what exceeds tau / sqrt(number of units)."""

    ranks: Indices
    p: float
    score: float


@dataclass(frozen=True, eq=False)
class Searched:
    """``regions``: the significant ones, the most conspicuous first, without a rank in common. ``cut_off``: what time
    did not suffice for; None if all was done."""

    regions: tuple[Region, ...]
    permutations: int
    cut_off: str | None
