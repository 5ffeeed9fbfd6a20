"""What a run says and leaves behind, also if it fails, and whatever happens to its files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.coordinator import handle
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime.chronicle import Chronicle
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.summary import Summary, read_summary
from tests.core.jobs import CONFIG, SEATS, A, B, described, executed, lost, ready, report, stood

TRAINING = (described(A), described(B), ready(A, 0, 1), ready(B, 2, 3))
RECOVERED = (
    *(lost(B, 3), stood(report(0), report(1)), stood(report(2)), ready(B, 3, epoch=1)),
    *(executed(A, 0, 1), executed(B, 2, 3)),
)


class Run:
    """The records of a job, and its console."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.console = io.StringIO()
        config = LaunchConfig(script="train.py", nproc_per_node=4, log_dir=directory)
        self.chronicle = Chronicle(config, self.console)
        self._job = Job(CONFIG, Seats(SEATS))
        self._now = 0.0
        self.chronicle.begin(self._job, self._now)

    def tell(self, *events: core.Event) -> Run:
        for event in events:
            self._now += 0.5
            self.chronicle.record(event, handle(self._job, event, self._now), self._job, self._now)
        return self

    def end(self, failure: str) -> Summary:
        self.chronicle.close(failure)
        return read_summary(self.directory)


@pytest.mark.parametrize(("failure", "outcome"), [("", "finished"), ("no room for rank 3", "stopped")])
def test_the_summary_says_how_the_run_ended(tmp_path: Path, failure: str, outcome: str) -> None:
    summary = Run(tmp_path).tell(*TRAINING).end(failure)
    assert (summary.outcome, summary.reason) == (outcome, failure)


def test_the_summary_has_every_epoch_also_one_that_the_job_never_went_on_from(tmp_path: Path) -> None:
    summary = Run(tmp_path).tell(*TRAINING, *RECOVERED, lost(A, 1)).end("the launcher ended")
    assert [recovery.epoch for recovery in summary.recoveries] == [1]
    assert [(found.epoch, found.cause, found.is_restart) for found in summary.epochs] == [
        (1, "rank 3: killed by SIGKILL", False),
        (2, "rank 1: killed by SIGKILL", False),
    ]


def test_the_summary_has_restarts_of_all_workers(tmp_path: Path) -> None:
    summary = Run(tmp_path).tell(lost(A, 0)).end("the launcher ended")
    assert [(found.epoch, found.is_restart) for found in summary.epochs] == [(1, True)]
