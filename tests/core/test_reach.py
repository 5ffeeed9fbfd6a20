"""The gate of invariant 1 reaches everybody, with the messages that adapters ask for."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.layout import ParallelLayout
from megatron_flashrecovery.core.reach import reaches_everybody

LAYOUTS = [(2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 1, 1), (2, 4, 3)]


def groups(tp: int, pp: int, dp: int, *axes: str) -> list[tuple[Rank, ...]]:
    return list(ParallelLayout((("tp", tp), ("dp", dp), ("pp", pp))).groups(*axes))


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize(
    ("reductions", "reached"),
    [
        pytest.param([("tp", "dp", "pp")], True, id="norm-over-the-world"),
        pytest.param([("dp",), ("tp", "pp")], True, id="message-to-peers-and-norm-over-the-replica"),
        pytest.param([("tp", "pp"), ("dp",)], True, id="the-other-way-round"),
        pytest.param([("dp",)], False, id="message-to-peers-only"),
        pytest.param([("tp", "pp")], False, id="norm-over-the-replica-only"),
    ],
)
def test_who_knows_that_everybody_is_at_the_gate(
    sizes: tuple[int, int, int], reductions: list[tuple[str, ...]], reached: bool
) -> None:
    tp, pp, dp = sizes
    ranks = [Rank(rank) for rank in range(tp * pp * dp)]
    alone_suffices = (reductions == [("tp", "pp")] and dp == 1) or (reductions == [("dp",)] and tp * pp == 1)
    made = [groups(tp, pp, dp, *axes) for axes in reductions]
    assert reaches_everybody(ranks, made) is (reached or alone_suffices)
