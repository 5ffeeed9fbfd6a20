"""What a run says and leaves behind, also if it fails, and whatever happens to its files."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.coordinator import handle
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime import journal, reserve
from megatron_flashrecovery.runtime import summary as summary_module
from megatron_flashrecovery.runtime.chronicle import Chronicle
from megatron_flashrecovery.runtime.dialogue import StepDone
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_messages import StepNoted
from megatron_flashrecovery.runtime.status import status_of
from megatron_flashrecovery.runtime.summary import MoveRecord, Summary, read_summary
from tests.core.jobs import CONFIG, SEATS, A, B, described, executed, lost, ready, report, stood

SPARE = NodeId("spare")
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


def test_nodes_that_come_and_go_are_told_and_where_their_seats_went_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path).tell(*TRAINING, core.NodeJoined(SPARE, 2), core.NodeLost(B, "connection closed"))
    assert run.end("the launcher ended").moves == (MoveRecord(Epoch(1), (Rank(2), Rank(3)), B, SPARE),)
    said = run.console.getvalue().splitlines()
    assert "flashrecovery: spare is there as a spare node" in said
    assert "flashrecovery: b is lost (connection closed): its ranks 2 and 3 move to spare" in said


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """From the call on, nothing more can be written to the disk of a run but what it has reserved room for."""

    def fill(run: Run) -> None:
        append = journal.append_whole

        def append_if_there_is_room(fd: int, line: bytes) -> None:
            if (run.directory / reserve.NAME).exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(fd, line)

        monkeypatch.setattr(journal, "append_whole", append_if_there_is_room)
        monkeypatch.setattr(summary_module, "append_whole", append_if_there_is_room)

    return fill


def test_on_a_full_disk_the_console_says_all_that_it_says_otherwise(
    tmp_path: Path, full_disk: Callable[[Run], None]
) -> None:
    runs = []
    for name in ("roomy", "full"):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name).tell(*TRAINING)
        if name == "full":
            full_disk(run)
        run.tell(*RECOVERED).chronicle.note(StepNoted(StepDone(7, 2.5, 1.0, False, 1, 0.25)))
        run.end("")
        runs.append(run.console.getvalue().splitlines())
    roomy, full = runs
    (warning,) = [line for line in full if "WARNING: the records in" in line]
    assert "No space left" in warning
    assert [line for line in full if line != warning] == roomy
    assert any("epoch 1: rank 3: killed by SIGKILL" in line for line in roomy)


def test_on_a_full_disk_there_is_still_room_to_say_how_the_job_ended(
    tmp_path: Path, full_disk: Callable[[Run], None]
) -> None:
    run = Run(tmp_path).tell(*TRAINING)
    assert (tmp_path / reserve.NAME).stat().st_blocks * 512 >= max(reserve.NBYTES)
    full_disk(run)
    assert run.tell(*RECOVERED).end("no room for rank 3").reason == "no room for rank 3"
    status = status_of(tmp_path)
    assert (status.phase, status.failure) == ("ended", "no room for rank 3")
    assert not (tmp_path / reserve.NAME).exists()
