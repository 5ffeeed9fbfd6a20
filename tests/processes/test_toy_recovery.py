"""The runtime on a toy job of four processes: every kind of loss that the machinery must come through, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.processes.conftest import Equal, assert_only_what_is_broken_is_rebuilt
from tests.processes.launcher import Job, Outcome, Running, run, started

SHARDED: tuple[str, ...] = ()
REPLICATED = ("--replicated",)
MOMENTS = ("forward", "backward", "grad_sync", "optimizer", "mirror", "between")


def kill(rank: int, step: int, at: str) -> str:
    return f"kill:rank={rank},step={step},at={at}"


@pytest.mark.parametrize("optimizer", [pytest.param(SHARDED, id="sharded"), pytest.param(REPLICATED, id="replicated")])
@pytest.mark.parametrize("at", MOMENTS)
def test_a_kill_at_any_moment_changes_no_bit(
    tmp_path: Path, assert_equal: Equal, at: str, optimizer: tuple[str, ...]
) -> None:
    job = Job(arguments=optimizer, injections=(kill(3, 5, at),))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == (3,)
    assert recovery.steps_recomputed <= 1


@pytest.mark.parametrize("optimizer", [pytest.param(SHARDED, id="sharded"), pytest.param(REPLICATED, id="replicated")])
@pytest.mark.parametrize("rank", [0, 3, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2))])
def test_a_kill_between_steps_rebuilds_exactly_the_groups_of_the_lost_rank(
    tmp_path: Path, assert_equal: Equal, rank: int, optimizer: tuple[str, ...]
) -> None:
    job = Job(arguments=optimizer, injections=(kill(rank, 5, "between"),))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert_only_what_is_broken_is_rebuilt(outcome, recovery, "between")


@pytest.mark.parametrize("at", MOMENTS)
def test_every_other_group_that_is_rebuilt_has_a_reason(tmp_path: Path, assert_equal: Equal, at: str) -> None:
    job = Job(injections=(kill(2, 5, at),))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert_only_what_is_broken_is_rebuilt(outcome, recovery, at)


@pytest.mark.parametrize(
    ("injections", "optimizer"),
    [
        pytest.param((kill(0, 5, "backward"), kill(3, 5, "backward")), SHARDED, id="two-dp-groups-at-once"),
        pytest.param((kill(0, 5, "backward"), kill(3, 5, "backward")), REPLICATED, id="two-at-once-replicated"),
        pytest.param(
            (kill(1, 5, "backward"), kill(2, 6, "optimizer"), kill(3, 7, "forward")), SHARDED, id="3-in-a-row"
        ),
        pytest.param((kill(1, 5, "backward"), kill(1, 5, "backward")), SHARDED, id="the-replacement-too"),
        pytest.param((kill(1, 1, "backward"),), SHARDED, id="in-the-first-step"),
        pytest.param((kill(0, 10, "optimizer"),), REPLICATED, id="in-the-last-step"),
        pytest.param((kill(1, 10, "between"),), SHARDED, id="after-the-last-step"),
        pytest.param((kill(0, 5, "backward"), kill(2, 5, "backward")), SHARDED, id="a-rank-and-its-host"),
    ],
)
def test_losses_that_come_together_or_at_the_edges_change_no_bit(
    tmp_path: Path, assert_equal: Equal, injections: tuple[str, ...], optimizer: tuple[str, ...]
) -> None:
    job = Job(arguments=optimizer, injections=injections)
    assert_equal(job, run(job, tmp_path / "run"))


def test_nobody_begins_the_first_step_before_its_loss_could_be_recovered(tmp_path: Path, assert_equal: Equal) -> None:
    """Although one rank comes late to it, for which the others would not wait."""
    late = ("--late", "2", "--only-rank", "2")
    job = Job(arguments=late, injections=(kill(1, 1, "forward"),))
    assert_equal(job, run(job, tmp_path / "run"))


@pytest.mark.parametrize("flags", [("--no-preload",), ("--spares-per-node", "1")], ids=["cold", "spare"])
def test_a_replacement_may_start_cold_or_from_a_spare(
    tmp_path: Path, assert_equal: Equal, flags: tuple[str, ...]
) -> None:
    job = Job(injections=(kill(2, 5, "backward"),), flags=flags)
    assert_equal(job, run(job, tmp_path / "run"))


def test_without_any_copy_the_job_says_whose_state_is_gone_and_stops(tmp_path: Path) -> None:
    job = Job(arguments=REPLICATED, injections=(kill(0, 5, "backward"), kill(2, 5, "backward")))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 1
    assert "no copy of step 4 is left of rank 0, 2; there is no checkpoint to fall back to" in outcome.said


def test_a_loss_before_everybody_is_ready_restarts_all_workers(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(arguments=("--fail-once", str(tmp_path / "failed")))
    outcome = run(job, tmp_path / "run")
    assert "all workers start again, from the top" in outcome.said
    calm = Job()
    assert_equal(calm, outcome)


def test_a_job_that_never_starts_stops_after_its_restarts(tmp_path: Path) -> None:
    outcome = run(Job(arguments=("--fail-always",), flags=("--max-restarts", "1")), tmp_path / "run")
    assert outcome.exit_code == 1
    assert "all workers were restarted 1 times already" in outcome.said


def test_a_replacement_killed_while_it_joins_is_replaced_again(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(injections=(kill(2, 5, "backward"),), arguments=("--join-delay", "2.0"))
    with started(job, tmp_path / "run") as running:
        first = _wait_for_pid(running, 2)
        running.wait_for(lambda: running.pids().get(2, first) != first, "the replacement of rank 2")
        os.kill(running.pids()[2], signal.SIGKILL)
        said, _ = running.process.communicate(timeout=90)
    outcome = Outcome(tmp_path / "run", running.process.returncode, said)
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert recovery.epoch == 2, "the second loss opens a second epoch of the same recovery"


def test_a_connection_that_fails_while_a_plan_is_carried_out_costs_another_plan_and_nobody(
    tmp_path: Path, assert_equal: Equal
) -> None:
    """Who says so need not be to blame, and may be the last that has its state."""
    failing = Job(
        arguments=("--raise-in-plan", "0", "--once", str(tmp_path / "once")), injections=(kill(3, 5, "backward"),)
    )
    outcome = run(failing, tmp_path / "run")
    assert_equal(failing, outcome)
    (recovery,) = outcome.recoveries
    assert recovery.epoch == 2
    assert "rank 0: while a plan was carried out: DistNetworkError: Connection reset by peer" in outcome.said


def test_the_loss_of_the_fork_server_is_named_and_changes_no_bit(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(ranks=2)
    with started(job, tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 3, "some steps")
        os.kill(psutil.Process(running.pids()[0]).ppid(), signal.SIGKILL)
        said, _ = running.process.communicate(timeout=90)
    outcome = Outcome(tmp_path / "run", running.process.returncode, said)
    assert_equal(job, outcome, also_lost=(0, 1))
    assert "is gone: killed by SIGKILL; workers that ended with it: 2; replacements start cold until" in said
    (epoch,) = outcome.summary.epochs
    for rank in (0, 1):
        assert f"rank {rank}: ended together with the fork server of its node (killed by SIGKILL)" in epoch.cause


def _wait_for_pid(running: Running, rank: int) -> int:
    running.wait_for(lambda: rank in running.pids(), f"rank {rank}")
    return running.pids()[rank]
