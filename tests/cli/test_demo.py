"""The demo tells what happens while it happens, and its verdict is that of `verify`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.commands.demo_report import compare
from megatron_flashrecovery.commands.run_follower import RunFollower
from megatron_flashrecovery.core.coordinator import handle
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime.chronicle import Chronicle
from megatron_flashrecovery.runtime.dialogue import StepDone
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_messages import StepNoted
from megatron_flashrecovery.runtime.summary import (
    GroupTally,
    PhaseSeconds,
    RecoveryRecord,
    StepLine,
    StepLog,
    Summary,
    write_summary,
)
from tests.core.jobs import CONFIG, SEATS, A, B, described, lost, ready, report, stood

LINES = [StepLine.of(Step(step), 2.0 / step, 0.5, Epoch(0), 0.1) for step in (1, 2)]
RECOVERY = RecoveryRecord(
    Epoch(1),
    "rank 1: killed [SIGKILL]",
    (Rank(1),),
    Step(1),
    1,
    PhaseSeconds(0.01, 0.02, 0.5, 0.1, 0.2, 0.4, 1.23),
    GroupTally(6, 10),
    {Rank(1): "mirror at rank 0"},
)
CALM = Summary(world_size=2, steps=2, state_sha256={Rank(0): "aa", Rank(1): "bb"})
STORMY = replace(CALM, recoveries=(RECOVERY,))


def run_in(directory, lines, summary):
    directory.mkdir()
    log = StepLog(directory / "steps.jsonl")
    for line in lines:
        log.record(line)
    log.close()
    write_summary(directory, summary)
    return directory


def verdict(tmp_path, capsys, lines=LINES, summary=STORMY):
    runs = run_in(tmp_path / "undisturbed", LINES, CALM), run_in(tmp_path / "disturbed", lines, summary)
    equal = compare(*runs, {Rank(1)}, Console(highlight=False, width=120, soft_wrap=True))
    return equal, capsys.readouterr().out


def test_equal_runs_are_shown_with_the_phases_of_the_recovery(tmp_path, capsys):
    equal, said = verdict(tmp_path, capsys)
    assert equal
    assert "killed [SIGKILL]" in said
    for phase in ("detect", "park", "replace", "rebuild", "restore", "first step", "total"):
        assert phase in said
    assert "rank 1: mirror at rank 0" in said
    assert "resumed at step 1: the step under way was begun again, 1 completed step computed again" in said
    assert "NO" not in said


@pytest.mark.parametrize(
    ("lines", "summary", "says"),
    [
        pytest.param([LINES[0], replace(LINES[1], loss_hex="0x0p+0")], STORMY, "not equal: step 2: loss", id="loss"),
        pytest.param(LINES[:1], STORMY, "has 2 steps", id="shorter"),
        pytest.param(LINES, replace(STORMY, state_sha256={Rank(0): "aa"}), "did not finish", id="unfinished"),
        pytest.param(LINES, CALM, "rank 1 was to be lost", id="no-recovery"),
        pytest.param(
            LINES,
            replace(CALM, recoveries=(replace(RECOVERY, lost_ranks=(Rank(0), Rank(1))),)),
            "rank 0 had nothing done to it and was lost too",
            id="a-survivor-died-as-well",
        ),
    ],
)
def test_whatever_differs_is_shown_and_named(lines, summary, says, tmp_path, capsys):
    equal, said = verdict(tmp_path, capsys, lines, summary)
    assert not equal
    assert says in said


def follow(script, tmp_path, limit=30.0):
    said: list[str] = []
    follower = RunFollower(tmp_path, said.append)
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            return follower.until_exit(process, limit), "\n".join(said)
        finally:
            process.kill()


def test_steps_and_losses_are_told_with_the_exit_code(tmp_path):
    script = """
        import pathlib, sys
        directory = pathlib.Path(sys.argv[1])
        step = '{"step":1,"loss":2.5,"loss_hex":"","grad_norm_hex":"","epoch":0,"seconds":1}'
        (directory / "steps.jsonl").write_text(step + "\\n")
        lost = '"name":"WorkersLost","losses":[{"rank":5,"cause":"killed by SIGKILL"}]'
        (directory / "journal.jsonl").write_text('{"time":1,"now":1,"epoch":1,"kind":"event",' + lost + "}\\n{torn")
        sys.exit(3)
        """
    code, said = follow(script, tmp_path)
    assert code == 3
    assert "step 1: loss 2.500000" in said
    assert "rank 5 is lost: killed by SIGKILL" in said


def test_a_silent_run_is_not_silent_for_two_seconds(tmp_path):
    code, said = follow("import sys; sys.stdin.read()", tmp_path, limit=2.5)
    assert code == -1
    assert "... starting workers" in said
    assert "no end after" in said


def test_silence_in_mid_run_is_told_with_what_is_waited_for(tmp_path):
    job = Job(CONFIG, Seats(SEATS))
    chronicle = Chronicle(LaunchConfig(script="train.py", nproc_per_node=4, log_dir=tmp_path))
    chronicle.begin(job, 0.0)
    events = [described(A), described(B), ready(A, 0, 1), ready(B, 2, 3), lost(B, 3), stood(report(0), report(1))]
    for now, event in enumerate(events):
        chronicle.record(event, handle(job, event, float(now)), job, float(now))
    chronicle.note(StepNoted(StepDone(step=5, loss=2.5, grad_norm=1.0, skipped=False, epoch=0, seconds=0.25)))
    _, said = follow("import sys; sys.stdin.read()", tmp_path, limit=2.5)
    chronicle.close("the test is over")
    assert "... waiting for rank 2 to stop at the next operation" in said


def test_a_wrong_fault_is_refused_before_the_first_run(tmp_path, capsys):
    assert main(["demo", "--log-dir", str(tmp_path / "demo"), "--inject", "kill:rank=1", __file__], {}) == 2
    assert "step is missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_outside_a_checkout_the_demo_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"], {}) == 2
    assert "from the root of a checkout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
