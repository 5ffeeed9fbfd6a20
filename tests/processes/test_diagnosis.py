"""A job by itself says who is to blame, and so does the command afterwards; a healthy one blames nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.runtime.replay import replay
from tests.processes.launcher import Job, Outcome, run

SLOW = "slow:rank=2,step=20,at=forward,seconds=0.1,steps=1000"


def diagnose(outcome: Outcome, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = main(["diagnose", str(outcome.log_dir), *flags], {})
    return code, " ".join(capsys.readouterr().out.split())


def test_a_slow_rank_is_blamed_by_the_job_itself_and_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    job = Job(arguments=("--steps", "220", "--compute", "0.03"), injections=(SLOW,))
    outcome = run(job, tmp_path / "run", timeout=280.0)
    assert outcome.exit_code == 0
    (line,) = outcome.journal("Diagnosed")
    (blamed,) = line.body["blamed"]
    (placed,) = outcome.journal("NodePlaced")
    device = f"device {placed.body['machine']}/2"
    assert (blamed["element"], blamed["nodes"], line.body["occasion"]) == (device, ["node0"], "rank 2 is slow")
    assert f"rank 2 is slow: {device} is to blame" in outcome.said
    assert outcome.said.strip().endswith(f"; to blame: {device}")
    assert [each.element for each in outcome.summary.blamed] == [device]
    assert replay(outcome.journal_lines()).difference is None

    code, said = diagnose(outcome, capsys, "--picture", str(tmp_path / "it.svg"))
    assert (code, f"to blame: {device}" in said) == (0, True)
    assert (tmp_path / "it.svg").stat().st_size > 10_000
    assert main(["status", str(outcome.log_dir)], {}) == 0
    assert f"to blame: {device}" in capsys.readouterr().out


def test_a_healthy_run_is_undetermined_and_nothing_in_it_is_significant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(Job(arguments=("--steps", "150", "--compute", "0.03")), tmp_path / "run", timeout=280.0)
    assert outcome.exit_code == 0
    assert outcome.journal("Diagnosed") == []
    code, said = diagnose(outcome, capsys, "--json")
    report = json.loads(said)
    assert (code, report["blamed"]) == (1, [])
    assert report["undetermined"]
    assert all(suspect["p"] > 0.01 for line in report["lines"] for suspect in line["suspects"])
