"""`flashrecovery verify` finds the first bit that differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.core.ids import Epoch, Step
from megatron_flashrecovery.runtime.summary import StepLine, StepLog, Summary, write_summary

LINES = [StepLine.of(Step(step), 2.0 / step, 0.5, Epoch(0), 0.1) for step in (1, 2)]
SUMMARY = Summary(world_size=2, steps=2, state_sha256={0: "aa", 1: "bb"})


def run_in(directory, lines=LINES, summary=SUMMARY):
    directory.mkdir()
    log = StepLog(directory / "steps.jsonl")
    for line in lines:
        log.record(line)
    log.close()
    write_summary(directory, summary)
    return str(directory)


def test_equal_runs_are_one_line_and_exit_code_0(tmp_path, capsys):
    later = [replace(line, epoch=Epoch(1), seconds=9.0) for line in LINES]
    assert main(["verify", run_in(tmp_path / "a"), run_in(tmp_path / "b", later)], {}) == 0
    assert capsys.readouterr().out == "equal bit for bit: 2 steps, the final state of 2 ranks\n"


@pytest.mark.parametrize(
    ("lines", "summary", "says"),
    [
        pytest.param([LINES[0], replace(LINES[1], loss_hex="0x0p+0")], SUMMARY, "step 2: loss", id="loss"),
        pytest.param([replace(LINES[0], grad_norm_hex=None), LINES[1]], SUMMARY, "step 1: grad norm", id="norm"),
        pytest.param(LINES[:1], SUMMARY, "has 2 steps", id="shorter"),
        pytest.param([LINES[1]], SUMMARY, "has step 1 where", id="step-missing"),
        pytest.param(LINES, replace(SUMMARY, state_sha256={0: "aa", 1: "cc"}), "rank 1: final state", id="state"),
        pytest.param(LINES, replace(SUMMARY, state_sha256={0: "aa"}), "did not finish", id="unfinished"),
        pytest.param(LINES, replace(SUMMARY, world_size=3), "ranks", id="world-size"),
    ],
)
def test_the_first_difference_is_one_line_and_exit_code_1(lines, summary, says, tmp_path, capsys):
    assert main(["verify", run_in(tmp_path / "a"), run_in(tmp_path / "b", lines, summary)], {}) == 1
    said = capsys.readouterr().out
    assert says in said
    assert said.count("\n") == 1


def test_a_directory_without_a_run_is_bad_input(tmp_path, capsys):
    assert main(["verify", run_in(tmp_path / "a"), str(tmp_path)], {}) == 2
    assert "summary.json does not exist" in capsys.readouterr().err


def test_a_damaged_summary_is_named(tmp_path, capsys):
    a = run_in(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text("{")
    assert main(["verify", a, a], {}) == 2
    assert "is not a summary" in capsys.readouterr().err
