"""The kill matrices of ``tests/processes`` and ``tests/frameworks``, on as many GPUs as there are (`make gpu`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.frameworks.megatron_lm_features import (
    FEATURES,
    ON_GPUS_ONLY,
    Machine,
    assert_feature_changes_no_bit,
    kills_with,
    why_not,
)
from tests.frameworks.megatron_lm_job import CHECKOUT, SHARDED, gpu_flags, installed_libraries, pretrain
from tests.processes.conftest import Equal, Undisturbed
from tests.processes.launcher import Job, run
from tests.processes.layouts import MAIN, Layout, layouts_for, order_of_losses
from tests.processes.matrix import MOMENTS, OPTIMIZERS, assert_changes_no_bit, everybody, gpt, kill, on_gpus

LAYOUTS = layouts_for(torch.cuda.device_count() if torch.cuda.is_available() else 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not LAYOUTS, reason="needs two GPUs: NCCL puts no two ranks on one"),
]
ON_EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS or (MAIN,), ids=lambda layout: layout.name)
WITH_A_CHECKOUT = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM")
TIMEOUT = 900.0


@ON_EVERY_LAYOUT
@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_kill_of_any_rank_at_any_moment_changes_no_bit(
    tmp_path: Path, assert_equal: Equal, layout: Layout, optimizer: str, at: str
) -> None:
    assert_changes_no_bit(on_gpus(everybody(optimizer, at, layout)), tmp_path / "run", assert_equal, at, TIMEOUT)


@ON_EVERY_LAYOUT
@pytest.mark.parametrize("at", ["backward", "optimizer"])
def test_a_rank_and_its_host_lost_in_a_row_change_no_bit(
    tmp_path: Path, assert_equal: Equal, layout: Layout, at: str
) -> None:
    """Of the next step each: the host has taken the mirror of the one that was just replaced."""
    first, host, *_ = order_of_losses(layout)
    job = on_gpus(gpt(injections=(kill(first, 4, at), kill(host, 5, at)), layout=layout))
    assert_equal(job, run(job, tmp_path / "run", timeout=TIMEOUT))


@ON_EVERY_LAYOUT
def test_a_replacement_that_starts_cold_changes_no_bit(tmp_path: Path, assert_equal: Equal, layout: Layout) -> None:
    lost = kill(order_of_losses(layout)[0], 4, "backward")
    job = replace(on_gpus(gpt(injections=(lost,), layout=layout)), flags=("--no-preload",))
    assert_equal(job, run(job, tmp_path / "run", timeout=TIMEOUT))


@WITH_A_CHECKOUT
@ON_EVERY_LAYOUT
@pytest.mark.parametrize("at", MOMENTS)
def test_a_kill_in_megatron_lm_changes_no_bit(tmp_path: Path, assert_equal: Equal, layout: Layout, at: str) -> None:
    lost = kill(order_of_losses(layout)[0], 4, at)
    assert_changes_no_bit(megatron_lm(layout, SHARDED, (lost,)), tmp_path / "run", assert_equal, at, TIMEOUT)


@WITH_A_CHECKOUT
@pytest.mark.parametrize("feature", [*FEATURES, *ON_GPUS_ONLY])
def test_kills_with_a_feature_of_megatron_lm_change_no_bit(
    tmp_path: Path, assert_equal: Equal, undisturbed: Undisturbed, feature: str
) -> None:
    layout = LAYOUTS[0]
    if reason := why_not(feature, Machine(layout, installed_libraries(), torch.cuda.get_device_capability())):
        pytest.skip(reason)
    flags = {**FEATURES, **ON_GPUS_ONLY}[feature]
    job = megatron_lm(layout, flags, kills_with(feature, layout))
    assert_feature_changes_no_bit(job, tmp_path / "run", assert_equal, undisturbed, TIMEOUT)


def megatron_lm(layout: Layout, flags: tuple[str, ...], kills: tuple[str, ...]) -> Job:
    device_flags = gpu_flags(installed_libraries())
    return on_gpus(pretrain(*flags, injections=kills, layout=layout, device_flags=device_flags))
