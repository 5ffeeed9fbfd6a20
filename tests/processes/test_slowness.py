"""A rank whose own computing is slower than its peers' is named; nothing else happens."""

from __future__ import annotations

from pathlib import Path

from megatron_flashrecovery.core.slowness import WINDOWS
from tests.processes.launcher import Job, run

SLOW_FROM, STEPS = 20, 70
COMPUTE = ("--steps", str(STEPS), "--compute", "0.03", "--report")


def test_a_slow_rank_is_named_within_a_few_windows_and_the_job_goes_on(tmp_path: Path) -> None:
    outcome = run(Job(arguments=(*COMPUTE, "--slow-from", str(SLOW_FROM), "--only-rank", "2")), tmp_path / "run")
    assert outcome.exit_code == 0
    assert outcome.recoveries == ()
    (noted,) = outcome.journal("SlowNoted")
    assert noted.body["rank"] == 2
    assert f"rank 2 is slow: {noted.body['evidence']}" in outcome.said
    told = [line for line in outcome.journal("StepsTimed") if line.time <= noted.time]
    assert told[-1].body["step"] > SLOW_FROM
    slow = [line for line in told if line.body["step"] > SLOW_FROM]
    assert WINDOWS <= len(slow) <= WINDOWS + 1


def test_where_all_are_as_slow_nobody_is_named(tmp_path: Path) -> None:
    outcome = run(Job(arguments=(*COMPUTE, "--slow-from", str(SLOW_FROM))), tmp_path / "run")
    assert outcome.exit_code == 0
    assert outcome.journal("SlowNoted") == []
    windows = [line.body["computed"]["2"] for line in outcome.journal("StepsTimed")]
    assert windows[-1] > 2 * windows[0]
