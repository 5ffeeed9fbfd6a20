"""Megatron-LM's own ``pretrain_gpt.py``, unmodified: with one flag more it survives lost ranks, bit for bit.

These run where ``MEGATRON_LM`` names a checkout (see the README); none of it is a part of this repository.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.frameworks.megatron_lm_job import CHECKOUT, SHARDED, STEPS, kill, pretrain
from tests.processes.conftest import Equal, Undisturbed, assert_only_what_is_broken_is_rebuilt
from tests.processes.launcher import Outcome, run, started

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
    "evaluation-overlap": (
        *SHARDED,
        *("--eval-interval", "2", "--eval-iters", "1", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "fp16-overlap": (
        *(*SHARDED, "--fp16", "--initial-loss-scale", "4294967296", "--hysteresis", "1"),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "log-interval-3": (*SHARDED, "--log-interval", "3"),
    "interleaved": (
        *(*SHARDED, "--num-layers", "8", "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "4"),
        # With its communication overlapped, the interleaved schedule of upstream races over gloo without us as well.
        *("--num-layers-per-virtual-pipeline-stage", "1", "--no-overlap-p2p-communication"),
    ),
    "instances": (
        *(*SHARDED, "--tensor-model-parallel-size", "1", "--num-distributed-optimizer-instances", "2"),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "duration": (*SHARDED, "--exit-duration-in-mins", "60"),
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
    tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, undisturbed: Undisturbed, feature: str
) -> None:
    """One after another, each at another moment: also the rank that logs, and rank 0."""
    # Where the loss scale overflows, there is no optimizer step to die in.
    second = "backward" if feature == "fp16-overlap" else "optimizer"
    kills = (kill(5, 3, "backward"), kill(7, 5, second), kill(0, 6, "grad_sync"), kill(2, 8, "forward"))
    job = pretrain(*FEATURES[feature], injections=kills)
    outcome = run(job, tmp_path_factory.mktemp("run") / "run", timeout=240)
    assert_equal(job, outcome)
    assert all(recovery.steps_recomputed <= 1 for recovery in outcome.recoveries)
    # A recovered step is logged once, and as it is without a recovery.
    assert losses(outcome.said) == losses(undisturbed(job).said)


def test_a_checkpoint_written_in_spite_of_a_loss_is_one_to_start_from(
    tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, undisturbed: Undisturbed
) -> None:
    """Rank 5 is killed while the first one is saved; another run goes on from the last one, and loses a rank, too.

    Without the optimizer: upstream cannot load that of torch's Adam, with or without recovery.
    """
    directory = tmp_path_factory.mktemp("run")
    saved = directory / "checkpoints"
    steady = (*SHARDED, "--lr-decay-iters", "20")
    calm = undisturbed(pretrain(*steady, "--train-iters", "12"))
    with started(pretrain(*steady, "--save", str(saved), "--save-interval", "4"), directory / "run") as running:
        running.wait_for(saved.exists, "the first checkpoint")
        os.kill(running.pids()[5], signal.SIGKILL)
        said, _ = running.process.communicate(timeout=120)
    outcome = Outcome(directory / "run", running.process.returncode, said)
    assert outcome.exit_code == 0, outcome.said
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(5,)]
    assert outcome.results() == calm.results()[:STEPS]
    load = (*steady, "--train-iters", "12", "--load", str(saved), "--no-load-optim")
    goes_on = pretrain(*load, injections=(kill(2, 11, "backward"),))
    again = run(goes_on, directory / "again")
    assert_equal(goes_on, again)
    assert [line.step for line in again.steps] == [10, 11, 12]


def test_without_the_flag_nothing_of_ours_changes_the_run(undisturbed: Undisturbed) -> None:
    with_recovery = undisturbed(pretrain(*SHARDED))
    plain = undisturbed(pretrain(*SHARDED, recovery=False))
    assert losses(with_recovery.said) == losses(plain.said)


def losses(said: str) -> list[str]:
    lines = [line.partition("learning rate: ")[2] for line in said.splitlines() if "lm loss: " in line]
    return [line.rstrip() for line in lines] + [line for line in said.splitlines() if "lm loss value: " in line]
