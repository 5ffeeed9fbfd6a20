"""A launcher that is told to end: its workers may end by themselves, and none stays."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes.launcher import Job, Outcome, Running, started

FOR_EVER = ("--steps", "1000000")


@contextmanager
def some_steps_later(job: Job, log_dir: Path) -> Iterator[Running]:
    with started(job, log_dir) as running:
        running.wait_for(lambda: running.steps_done() > 3, "some steps")
        pids = running.pids()
        yield running
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]


def outcome_of(running: Running) -> Outcome:
    said, _ = running.process.communicate(timeout=30)
    return Outcome(running.log_dir, running.process.returncode, said)


def test_workers_that_do_not_care_end_at_once(tmp_path: Path) -> None:
    with some_steps_later(Job(arguments=FOR_EVER), tmp_path / "run") as running:
        running.process.send_signal(signal.SIGTERM)
        outcome = outcome_of(running)
    assert outcome.exit_code == 128 + signal.SIGTERM
    assert "SIGTERM: passed on to 4 workers" in outcome.said
    assert "the job stops: told to end by SIGTERM" in outcome.said
    assert outcome.recoveries == ()


def test_workers_that_want_to_end_in_order_may(tmp_path: Path) -> None:
    job = Job(arguments=(*FOR_EVER, "--on-sigterm", "leave"))
    with some_steps_later(job, tmp_path / "run") as running:
        running.process.send_signal(signal.SIGTERM)
        outcome = outcome_of(running)
    assert outcome.exit_code == 128 + signal.SIGTERM
    logs = "".join(log.read_text() for log in (tmp_path / "run" / "logs").glob("rank*.log"))
    left = re.findall(r"rank \d leaves after step (\d+)", logs)
    assert (len(left), len(set(left))) == (4, 1)
    assert outcome.recoveries == ()


def test_a_rank_that_is_lost_meanwhile_is_replaced(tmp_path: Path) -> None:
    job = Job(arguments=(*FOR_EVER, "--on-sigterm", "leave"))
    with some_steps_later(job, tmp_path / "run") as running:
        os.kill(running.pids()[3], signal.SIGSTOP)  # so that nobody can leave before rank 2 is lost
        running.process.send_signal(signal.SIGTERM)
        running.wait_for(lambda: running.count("SignalPassedOn") == 1, "the signal")
        os.kill(running.pids()[2], signal.SIGKILL)
        os.kill(running.pids()[3], signal.SIGCONT)
        outcome = outcome_of(running)
    assert outcome.exit_code == 128 + signal.SIGTERM
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(2,)]
    left = [log.read_text().count("leaves after step") for log in (tmp_path / "run" / "logs").glob("rank*.log")]
    assert sum(left) == 4


def test_who_does_not_end_is_ended(tmp_path: Path) -> None:
    job = Job(arguments=(*FOR_EVER, "--on-sigterm", "ignore"), flags=("--shutdown-timeout", "1"))
    with some_steps_later(job, tmp_path / "run") as running:
        running.process.send_signal(signal.SIGTERM)
        outcome = outcome_of(running)
    assert outcome.exit_code == 128 + signal.SIGTERM
    assert "rank 0, 1, 2, 3 had not ended 1 s after SIGTERM" in outcome.said


@pytest.mark.parametrize(
    "how", ["SIGINT", *(pytest.param(how, marks=pytest.mark.slow) for how in ("second signal", "no time"))]
)
def test_a_launcher_in_a_hurry_ends_them_at_once(tmp_path: Path, how: str) -> None:
    flags = ("--shutdown-timeout", "0") if how == "no time" else ()
    job = Job(arguments=(*FOR_EVER, "--on-sigterm", "ignore"), flags=flags)
    number = signal.SIGINT if how == "SIGINT" else signal.SIGTERM
    with some_steps_later(job, tmp_path / "run") as running:
        running.process.send_signal(number)
        if how == "second signal":
            running.wait_for(lambda: running.count("SignalPassedOn") == 1, "the signal")
            running.process.send_signal(number)
        outcome = outcome_of(running)
    assert outcome.exit_code == 128 + number
    assert f"{number.name}: ending 4 workers" in outcome.said
