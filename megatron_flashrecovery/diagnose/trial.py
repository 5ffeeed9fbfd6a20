"""How sure a diagnosis has to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """Somebody is blamed at p <= ``level``. ``rows``: arrangements of the scores that are compared, the observed one
    included; half of the level is theirs, the other half is that of single ranks (see ``scan``).

    ``windows``: how many of the newest are summed up, several to choose the best of; none for all there are, the newest
    third, and so on. ``fewest``: windows in which a rank can stand out by itself. In one, a rank stood out at
    p <= 0.001 in 9 of 600 healthy jobs whose noise was that of Student's t with four degrees of freedom; in the sum of
    five in none. A count over all the time is no such short look.

    Raises ``ValueError`` if so few rows can prove nothing."""

    level: float = 0.001
    rows: int = 2000
    seed: int = 0
    windows: tuple[int, ...] = ()
    fewest: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.rows * self.level < 2:
            raise ValueError(f"{self.rows} rows can prove nothing at the level of {self.level}: at least 2 / level")
        if any(length < 1 for length in self.windows):
            raise ValueError(f"windows {self.windows}: each has to be at least 1")

    def lengths(self, windows: int) -> tuple[int, ...]:
        """For so many windows: what to sum up, ascending; empty for no windows."""
        wanted = self.windows or tuple(windows // 3**k for k in range(windows.bit_length()))
        return tuple(sorted({min(length, windows) for length in wanted if min(length, windows)}))
