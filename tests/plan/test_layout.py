"""Layouts agree with the frameworks that they describe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.layout import (
    ParallelLayout,
    deepspeed_layout,
    megatron_expert_layout,
    megatron_layout,
)

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def layout_of(sizes):
    return ParallelLayout(tuple((f"axis{at}", size) for at, size in enumerate(sizes)))


@given(sizes)
def test_coords_and_rank_at_are_inverse(sizes):
    layout = layout_of(sizes)
    assert [layout.rank_at(layout.coords(Rank(rank))) for rank in range(layout.world_size)] == list(
        range(layout.world_size)
    )


@given(sizes, st.data())
def test_the_groups_of_any_axes_partition_the_ranks(sizes, data):
    layout = layout_of(sizes)
    axes = data.draw(st.sets(st.sampled_from([name for name, _ in layout.axes])))
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert all(layout.group_of(rank, *axes) == group for group in groups for rank in group)


def test_the_fastest_axis_comes_first():
    layout = megatron_layout(8, tensor=2, pipeline=2)
    assert layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "cp-tp-dp-pp"])
@pytest.mark.parametrize("token", ["tp", "cp", "dp", "pp", "dp-cp", "tp-pp", "tp-cp-dp"])
def test_dense_groups_are_those_of_megatron(order, token):
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    theirs = parallel_state.RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order=order).get_ranks(token)
    ours = megatron_layout(24, tensor=2, pipeline=2, context=2, order=order).groups(*token.split("-"))
    assert [list(group) for group in ours] == theirs


@pytest.mark.parametrize("token", ["tp", "ep", "dp", "pp", "tp-ep"])
def test_expert_groups_are_those_of_megatron(token):
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    generator = parallel_state.RankGenerator(tp=2, ep=2, dp=3, pp=2, cp=1, order="tp-cp-ep-dp-pp")
    ours = megatron_expert_layout(24, tensor=2, pipeline=2, expert=2).groups(*token.split("-"))
    assert [list(group) for group in ours] == generator.get_ranks(token)


def test_deepspeed_puts_the_model_axis_fastest_and_pipe_slowest():
    layout = deepspeed_layout(8, pipe=2, model=2)
    assert layout.groups("model")[0] == (0, 1)
    assert layout.groups("data")[0] == (0, 2)
    assert layout.groups("pipe")[0] == (0, 4)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        pytest.param(lambda: megatron_layout(8, tensor=3), "8 ranks do not divide by --tensor-model", id="indivisible"),
        pytest.param(lambda: megatron_layout(8, pipeline=0), "--pipeline-model-parallel-size 0", id="zero"),
        pytest.param(lambda: megatron_layout(8, order="tp-xp"), "no axis 'xp'", id="unknown-axis"),
        pytest.param(lambda: megatron_layout(8, pipeline=2, order="tp-dp"), "pp has size 2", id="axis-left-out"),
        pytest.param(lambda: megatron_layout(8, order="tp-tp-dp"), "named twice", id="axis-twice"),
        pytest.param(lambda: megatron_layout(8).groups("ring"), "no axis ring", id="groups-of-nothing"),
        pytest.param(lambda: megatron_layout(8).coords(Rank(8)), "no rank 8", id="rank-outside"),
    ],
)
def test_a_wrong_layout_is_refused_by_name(build, says):
    with pytest.raises(ConfigError, match=says):
        build()
