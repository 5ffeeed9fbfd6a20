"""While a job stops for a recovery: who is only busy is waited for, and who will never stop is not."""

from __future__ import annotations

from pathlib import Path

from tests.processes.conftest import Equal
from tests.processes.launcher import Job, run

SOON = ("--drain-timeout", "4")
"""Half as long as the nap."""


def test_a_rank_that_is_busy_for_longer_than_the_deadline_is_not_lost(tmp_path: Path, assert_equal: Equal) -> None:
    nap = ("--nap-at", "1", "--only-rank", "2", "--once", str(tmp_path / "napped"))
    job = Job(arguments=nap, injections=("kill:rank=1,step=2,at=forward",), flags=SOON)
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    assert outcome.journal("Fence") == []
    (recovery,) = outcome.recoveries
    assert recovery.seconds.park > 4.0, "it was past its deadline"
    assert any(2 in line.body["busy"] for line in outcome.journal("RanksHung"))


def test_a_rank_that_stands_still_is_ended_long_before_the_deadline(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(injections=("stop:rank=2,step=6,at=forward", "kill:rank=1,step=6,at=forward"))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    (fence,) = outcome.journal("Fence")
    assert fence.body["ranks"] == [2]
    assert "rank 2 hangs: none of its threads has run" in fence.body["reason"]
