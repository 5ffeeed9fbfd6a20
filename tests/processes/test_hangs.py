"""Ranks that hang are replaced, ranks that wait for each other go back once, and a bug of the script ends the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.conftest import Equal
from tests.processes.launcher import Job, run

SOON = ("--hang-timeout", "2")


@pytest.mark.parametrize(
    ("kind", "evidence"),
    [
        ("stop", "none of its threads has run"),
        ("loop", "it has computed for"),
        pytest.param("gil", "none of its threads has run", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_replaced_and_no_bit_changes(
    tmp_path: Path, assert_equal: Equal, kind: str, evidence: str
) -> None:
    job = Job(injections=(f"{kind}:rank=2,step=5,at=backward",), flags=SOON)
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == (2,)
    assert f"rank 2 hangs: {evidence}" in recovery.cause
    (words,) = outcome.journal("LastWords")
    assert (words.body["rank"], words.body["step"], words.body["doing"]) == (2, 5, "a step")
    # A process that stands still can say nothing; the others say where every thread of theirs is.
    assert ("injector.py" in words.body["stacks"]) == (kind != "stop")


@pytest.mark.parametrize("kind", ["segv", pytest.param("abort", marks=pytest.mark.slow)])
def test_who_dies_of_a_signal_says_where(tmp_path: Path, assert_equal: Equal, kind: str) -> None:
    job = Job(injections=(f"{kind}:rank=1,step=4,at=forward",))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (words,) = outcome.journal("LastWords")
    assert "Fatal Python error" in words.body["stacks"]
    assert "injector.py" in words.body["stacks"]
    signal = {"segv": "SIGSEGV", "abort": "SIGABRT"}[kind]
    assert outcome.recoveries[0].cause == f"rank 1: killed by {signal} at step 4"


def test_the_same_exception_at_the_same_step_ends_the_job_at_the_second_time(tmp_path: Path) -> None:
    outcome = run(Job(arguments=("--raise-at", "5", "--only-rank", "2")), tmp_path / "run")
    assert outcome.exit_code == 1
    assert len(outcome.recoveries) == 1
    assert "rank 2 raised the same exception in step 6 again after a retry, so it is the script's: " in outcome.said
    assert "ValueError at train_toy.py" in outcome.said
    assert "the batch is empty" in outcome.journal("LastWords")[0].body["traceback"]


@pytest.mark.slow
def test_an_exception_of_all_ranks_does_not_go_on_for_ever(tmp_path: Path) -> None:
    outcome = run(Job(arguments=("--raise-at", "5")), tmp_path / "run")
    assert outcome.exit_code == 1
    assert "raised the same exception in step 6 again after a retry" in outcome.said
    assert len(outcome.journal("RestartAll")) <= 1


def test_an_exception_that_a_retry_does_not_repeat_costs_a_step(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(injections=("exception:rank=3,step=5,at=forward",))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    assert len(outcome.recoveries) == 1


def test_ranks_that_wait_for_each_other_go_back_once(tmp_path: Path, assert_equal: Equal) -> None:
    arguments = ("--mismatch-at", "5", "--only-rank", "2")
    job = Job(arguments=(*arguments, "--once", str(tmp_path / "done")), flags=SOON)
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == ()
    assert "every rank waits for another" in recovery.cause
    assert "rank 2 in barrier of " in recovery.cause
    assert "where rank 0, 1, 3 never came" in recovery.cause


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_again_end_the_job(tmp_path: Path) -> None:
    outcome = run(Job(arguments=("--mismatch-at", "5", "--only-rank", "2"), flags=SOON), tmp_path / "run")
    assert outcome.exit_code == 1
    assert "again after all went back once, so it is the script's" in outcome.said
