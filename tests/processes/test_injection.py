"""Faults that a user injects, from the start on or into a run that goes on."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes.conftest import Equal
from tests.processes.control_group import control_group, inside
from tests.processes.launcher import ROOT, Job, Outcome, run, started

SOON = ("--hang-timeout", "2")


def inject(log_dir: Path, spec: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_flashrecovery", "inject", str(log_dir), spec]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_run_that_goes_on_loses_whom_the_user_names(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(arguments=("--steps", "1000"), flags=("--allow-injection",))
    with started(job, tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 5, "some steps")
        for number, spec in enumerate(("kill:rank=2", "exception:rank=1,how=async,at=backward"), start=1):
            said = inject(tmp_path / "run", spec)
            assert said.returncode == 0, said.stderr
            assert f"is told: {spec.partition(':')[0]} in the next step" in said.stdout
            running.wait_for(lambda number=number: running.count("Resume") == number, "the recovery")
        late = inject(tmp_path / "run", "kill:rank=2,step=3")
        assert (late.returncode, "is completed already: name a later one" in late.stderr) == (2, True), late.stderr
        nobody = inject(tmp_path / "run", "kill:rank=7")
        assert "there is no rank 7" in nobody.stderr
        said_last, _ = running.process.communicate(timeout=120)
    outcome = Outcome(tmp_path / "run", running.process.returncode, said_last)
    assert_equal(job, outcome, also_lost=(1, 2))
    assert [line.body["spec"] for line in outcome.journal("InjectionNoted")] == [
        "kill:rank=2",
        "exception:rank=1,at=backward,how=async",
    ]
    assert "has ended" in inject(tmp_path / "run", "kill:rank=2").stderr


def test_a_run_that_was_not_started_for_it_takes_none(tmp_path: Path) -> None:
    with started(Job(arguments=("--steps", "100000")), tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 2, "some steps")
        said = inject(tmp_path / "run", "kill:rank=2")
        running.process.terminate()
        running.process.communicate(timeout=60)
    assert said.returncode == 2
    assert "start it with `flashrecovery run --allow-injection ...`" in said.stderr


@pytest.mark.parametrize("kind", ["SIGBUS", pytest.param("SIGFPE", marks=pytest.mark.slow)])
def test_any_signal_can_be_sent(tmp_path: Path, assert_equal: Equal, kind: str) -> None:
    job = Job(injections=(f"signal:rank=1,step=4,at=optimizer,signal={kind}",))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    assert outcome.recoveries[0].cause == f"rank 1: killed by {kind} at step 4"


def test_a_collective_that_the_others_do_not_enter_sends_all_back_once(tmp_path: Path, undisturbed) -> None:
    job = Job(injections=("hang_collective:rank=2,step=5,at=backward",), flags=SOON)
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert (outcome.results(), outcome.state) == (undisturbed(job).results(), undisturbed(job).state)
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == ()
    assert "every rank waits for another in step 5" in recovery.cause
    assert "rank 2 in barrier of " in recovery.cause


def test_who_is_slow_is_not_lost_and_changes_no_bit(tmp_path: Path, undisturbed) -> None:
    job = Job(injections=("slow:rank=2,step=3,at=forward,seconds=0.3,steps=4",))
    outcome = run(job, tmp_path / "run")
    assert outcome.recoveries == ()
    assert (outcome.results(), outcome.state) == (undisturbed(job).results(), undisturbed(job).state)
    seconds = {line.step: line.seconds for line in outcome.steps}
    assert all(seconds[step] > 0.3 for step in (4, 5, 6)), seconds
    assert min(seconds.values()) < 0.3, seconds


def test_the_out_of_memory_killer_is_told_apart(tmp_path: Path, assert_equal: Equal) -> None:
    """The launcher joins the control group first, so that all its workers are in there."""
    job = Job(injections=("oom:rank=2,step=5,at=forward",))
    with ExitStack() as stack:
        try:
            group = stack.enter_context(control_group(3 << 30))
        except OSError as error:
            pytest.skip(f"no memory control group can be made here: {error}")
        command = inside(group, job.command(tmp_path / "run"))
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    outcome = Outcome(tmp_path / "run", process.returncode, process.stdout + process.stderr)
    assert_equal(job, outcome)
    assert outcome.recoveries[0].cause == "rank 2: killed by the out-of-memory killer at step 5"
    (lost,) = outcome.journal("WorkersLost")
    assert lost.body["losses"][0]["fault"] == "out of host memory"


def test_memory_is_not_taken_without_a_limit(tmp_path: Path) -> None:
    outcome = run(Job(injections=("oom:rank=2,step=5,at=forward",)), tmp_path / "run")
    if outcome.exit_code == 0:
        pytest.skip("this machine has a limit")
    assert outcome.exit_code == 2
    assert "--inject oom:rank=2,step=5,at=forward: there is no memory limit" in outcome.said


def test_the_agent_of_node_0_takes_the_job_along(tmp_path: Path) -> None:
    outcome = run(Job(injections=("agent:rank=2,step=5,at=forward",)), tmp_path / "run")
    assert outcome.exit_code == -9
