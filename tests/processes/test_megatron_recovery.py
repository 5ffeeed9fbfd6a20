"""The main job, real megatron-core at TP2 x PP2 x DP2: bit for bit, whoever is killed, whenever, with which optimizer.

A sample runs with ``make test``, every rank at every moment with ``make storm``, over NCCL with ``make gpu``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes.conftest import Equal
from tests.processes.launcher import Outcome, run, started
from tests.processes.matrix import MOMENTS, OPTIMIZERS, assert_changes_no_bit, everybody, gpt, kill

SLOW = pytest.mark.slow
# (optimizer, rank, moment): every moment at least once, with as few undisturbed runs to compare with as there can be.
SAMPLE = (
    ("distributed", 5, "backward"),
    ("distributed", 2, "between"),
    ("plain", 1, "optimizer"),
    ("overlap", 0, "grad_sync"),
    ("overlap", 3, "optimizer"),
    ("plain", 4, "mirror"),
    ("overlap", 7, "forward"),
)


@pytest.mark.parametrize(("optimizer", "rank", "at"), SAMPLE)
def test_a_kill_changes_no_bit(tmp_path: Path, assert_equal: Equal, optimizer: str, rank: int, at: str) -> None:
    job = gpt(*OPTIMIZERS[optimizer], injections=(kill(rank, 4, at),))
    assert_changes_no_bit(job, tmp_path / "run", assert_equal, at, timeout=120.0)


@pytest.mark.slow
@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_kill_of_any_rank_at_any_moment_changes_no_bit(
    tmp_path: Path, assert_equal: Equal, optimizer: str, at: str
) -> None:
    assert_changes_no_bit(everybody(optimizer, at), tmp_path / "run", assert_equal, at, timeout=240.0)


@pytest.mark.parametrize(
    "injections",
    [
        pytest.param((kill(5, 4, "backward"), kill(2, 4, "backward")), id="two-dp-groups-at-once", marks=SLOW),
        pytest.param(
            (kill(0, 3, "forward"), kill(5, 4, "optimizer"), kill(6, 5, "backward")), id="three-steps-in-a-row"
        ),
        pytest.param((kill(3, 1, "backward"),), id="before-the-first-step-ends"),
        pytest.param((kill(5, 4, "backward"), kill(7, 4, "backward")), id="a-rank-and-its-host", marks=SLOW),
    ],
)
def test_losses_together_and_in_a_row_change_no_bit(
    tmp_path: Path, assert_equal: Equal, injections: tuple[str, ...]
) -> None:
    job = gpt(injections=injections)
    assert_equal(job, run(job, tmp_path / "run"))


def test_a_kill_while_a_checkpoint_is_saved_leaves_a_whole_one(tmp_path: Path, assert_equal: Equal) -> None:
    saved = tmp_path / "checkpoints"
    job = gpt("--save", str(saved), "--save-interval", "4")
    with started(job, tmp_path / "run") as running:
        running.wait_for(saved.exists, "the first checkpoint")
        os.kill(running.pids()[5], signal.SIGKILL)
        said, _ = running.process.communicate(timeout=90)
    outcome = Outcome(tmp_path / "run", running.process.returncode, said)
    assert_equal(gpt(), outcome, also_lost=(5,))
    restarted = run(gpt("--load", str(saved)), tmp_path / "restarted")
    assert restarted.exit_code == 0, restarted.said
    assert restarted.state == outcome.state


def test_without_any_copy_the_job_falls_back_to_the_checkpoint(tmp_path: Path, assert_equal: Equal) -> None:
    plain = ("--no-use-distributed-optimizer",)
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "3")
    job = gpt(*plain, *save, injections=(kill(5, 6, "backward"), kill(7, 6, "backward")))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert "all workers start again, from the newest checkpoint" in outcome.said
    assert [line.step for line in outcome.steps] == list(range(1, 10))
