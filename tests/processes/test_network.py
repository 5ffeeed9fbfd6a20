"""A connection that goes while everybody lives: all go back to the step, on new communicators."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.conftest import Undisturbed
from tests.processes.launcher import Job, run


@pytest.mark.parametrize("at", ["forward", "between", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_a_connection_that_is_cut_costs_a_step_and_no_rank(tmp_path: Path, undisturbed: Undisturbed, at: str) -> None:
    job = Job(injections=(f"network:rank=2,step=5,at={at}",))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    calm = undisturbed(job)
    assert outcome.results() == calm.results()
    assert outcome.state == calm.state
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == ()
    assert recovery.cause.startswith("communication failed in step ")
    assert recovery.steps_recomputed <= 1
    (told, *_) = outcome.journal("OperationsFailed")
    (park,) = outcome.journal("Park")
    assert park.time - told.time < 1.0
