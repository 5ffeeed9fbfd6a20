"""Whether the highest of many values stands out: more than the rest of their own tail can explain.

Permutations say nothing of a single rank, for whoever gets its score stands out as much. So its distance to the next
ones is compared with the distances below. Of values with an exponential tail the normalized spacings j (x_j - x_(j+1)),
x_1 the highest, are independent and exponential (Sukhatme, Renyi), so the ratio of one of them to the mean of m below
is distributed as F(2, 2m): P(ratio > f) = (1 + f / m)^-m. Tails that are lighter (normal, bounded) make it rarer.
Nothing has to be known of how far ranks are apart by nature, or whether windows depend on each other. Heavier tails
make it more frequent, which is why scores are capped. A sum over several independent windows has lighter tails, so its
power 1.5 is taken first, whose tail is still lighter than an exponential one if the sum is normal; what that is worth,
and what is left for other distributions, is in ``docs/diagnose.md``.

Where the others are closer together than those of a N(0, 1) would be (counters that are all zero), they count as being
that far apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BELOW = 32
_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 8)
"""Of the level, for one that stands out, two, three and four: two faults at once hide each other from the first test,
and so do the ranks of one small element."""
_MANY = 6.0
"""So many independent windows make a sum normal enough."""
_LEAST = (0.3, 0.7)
"""For the power 1, and 1.5. Of 256 from N(0, 1) the means of the highest 32 spacings are 0.5 and 1.1, and they fall
slowly with the number of values."""

_SUREST = 1e-6
"""Nobody has looked at so many healthy jobs that their tail were known any further."""


def p_of_highest(values: npt.NDArray[np.float64], windows: float = 1.0) -> npt.NDArray[np.float64]:
    """(n,) of (n,) finite values, spread by one or more: p of the claim that this one and all that are higher stand
    out; 1 for all but the highest four, and for everybody where there are less than eight. ``windows``: how many
    independent ones were summed up. Conservative for light tails."""
    p = np.ones(values.size)
    share = float(np.clip((windows - 1) / (_MANY - 1), 0, 1))
    order = np.argsort(-values, kind="stable")
    highest = np.sign(values[order]) * np.abs(values[order]) ** (1 + share / 2)
    least = (1 - share) * _LEAST[0] + share * _LEAST[1]
    spacings = (highest[:-1] - highest[1:]) * np.arange(1, highest.size)
    most = min(_BELOW, values.size // 4)
    for j, part in enumerate(_SHARES):
        below = spacings[j + 1 : j + 1 + most]
        if below.size < 2:
            break
        ratio = spacings[j] / max(least, below.mean())
        claim = min(1.0, max(_SUREST, (1 + ratio / below.size) ** -below.size / part))
        # Whoever is among those that stand out together does so itself.
        p[order[: j + 1]] = np.minimum(p[order[: j + 1]], claim)
    return p
