"""Megatron-LM's own ``pretrain_gpt.py``, unmodified: with one flag more it survives lost ranks, bit for bit.

These run where ``MEGATRON_LM`` names a checkout (see the README); none of it is a part of this repository.
"""

from __future__ import annotations

import pytest

from tests.frameworks.megatron_lm_job import CHECKOUT, SHARDED, kill, pretrain
from tests.processes.conftest import Equal, Undisturbed, assert_only_what_is_broken_is_rebuilt
from tests.processes.launcher import run

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM")

MOMENTS = ("forward", "backward", "grad_sync", "optimizer", "mirror", "between")
FEATURES: dict[str, tuple[str, ...]] = {
    "distributed": SHARDED,
    "overlap": (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"),
    "bf16": (*SHARDED, "--bf16"),
    "fp16": (*SHARDED, "--fp16", "--initial-loss-scale", "65536"),
    "dropout": (*SHARDED, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
    "untied": (*SHARDED, "--untie-embeddings-and-output-weights"),
    "recompute": (
        *SHARDED,
        *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
    "evaluation": (*SHARDED, "--eval-interval", "2", "--eval-iters", "1"),
    "workers": (*SHARDED, "--num-workers", "2"),
    "tp-only": (*SHARDED, "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "1"),
    "pp-only": (*SHARDED, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "4"),
    "dp-only": (*SHARDED, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
    "plain": (),
}


@pytest.mark.parametrize("at", MOMENTS)
def test_a_kill_changes_no_bit(tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, at: str) -> None:
    job = pretrain(*SHARDED, injections=(kill(5, 4, at),))
    outcome = run(job, tmp_path_factory.mktemp("run") / "run")
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert recovery.steps_recomputed <= 1
    assert_only_what_is_broken_is_rebuilt(outcome, recovery, at)


@pytest.mark.parametrize("feature", FEATURES)
def test_kills_with_a_feature_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, feature: str
) -> None:
    """One after another, each at another moment: also the rank that logs, and rank 0."""
    kills = (kill(5, 3, "backward"), kill(7, 5, "optimizer"), kill(0, 6, "grad_sync"), kill(2, 8, "forward"))
    job = pretrain(*FEATURES[feature], injections=kills)
    outcome = run(job, tmp_path_factory.mktemp("run") / "run", timeout=240)
    assert_equal(job, outcome)
    assert all(recovery.steps_recomputed <= 1 for recovery in outcome.recoveries)
    logged = [line for line in outcome.said.splitlines() if " iteration " in line and "consumed samples" in line]
    assert len(logged) == 9, logged


def test_without_the_flag_nothing_of_ours_changes_the_run(undisturbed: Undisturbed) -> None:
    with_recovery = undisturbed(pretrain(*SHARDED))
    plain = undisturbed(pretrain(*SHARDED, recovery=False))
    assert losses(with_recovery.said) == losses(plain.said)


def losses(said: str) -> list[str]:
    lines = [line.partition("lm loss: ")[2] for line in said.splitlines() if "lm loss: " in line]
    return [line.partition(" number of")[0] for line in lines]
