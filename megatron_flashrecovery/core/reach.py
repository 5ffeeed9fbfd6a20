"""Whether what every rank knows at its gate has reached everybody behind a sequence of reductions.

The gate of invariant 1 costs no message of its own where the reductions that an update needs anyway connect all ranks:
whoever leaves a reduction knows that every member has entered it, and what they knew then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_flashrecovery.core.ids import Rank


def reaches_everybody(ranks: Iterable[Rank], reductions: Sequence[Iterable[Sequence[Rank]]]) -> bool:
    """``reductions`` are in their order; each is made by several groups at once, and a rank is in at most one of
    them."""
    known = {rank: frozenset((rank,)) for rank in ranks}
    for groups in reductions:
        for members in groups:
            together = frozenset().union(*(known[rank] for rank in members))
            known.update(dict.fromkeys(members, together))
    return all(len(each) == len(known) for each in known.values())
