"""Run ``flashrecovery run`` as a user would, and read what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_flashrecovery.runtime.journal import Line, read_journal
from megatron_flashrecovery.runtime.summary import RecoveryRecord, StepLine, Summary, read_steps, read_summary

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "processes" / "train_toy.py"
GPT = ROOT / "pretrain_examples" / "pretrain_gpt.py"


@dataclass(frozen=True)
class Job:
    """What to run. ``arguments`` are the script's, ``flags`` the launcher's."""

    script: Path = TOY
    ranks: int = 4
    arguments: tuple[str, ...] = ()
    injections: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, log_dir: Path) -> list[str]:
        injected = [part for spec in self.injections for part in ("--inject", spec)]
        return [
            *(sys.executable, "-m", "megatron_flashrecovery", "run"),
            *("--nproc-per-node", str(self.ranks), "--log-dir", str(log_dir)),
            *injected,
            *self.flags,
            str(self.script),
            *self.arguments,
        ]


@dataclass(frozen=True)
class Outcome:
    log_dir: Path
    exit_code: int
    said: str

    @property
    def summary(self) -> Summary:
        return read_summary(self.log_dir)

    @property
    def steps(self) -> tuple[StepLine, ...]:
        return read_steps(self.log_dir)

    @property
    def recoveries(self) -> tuple[RecoveryRecord, ...]:
        return self.summary.recoveries

    def journal_lines(self) -> list[Line]:
        return list(read_journal(self.log_dir / "journal.jsonl"))

    def journal(self, name: str) -> list[Line]:
        return [line for line in self.journal_lines() if line.name == name]

    def groups(self) -> dict[str, tuple[int, ...]]:
        """The members of every group of the job."""
        lines = self.journal("SeatsDescribed")
        return {key: tuple(members) for line in lines for key, members in line.body["groups"].items()}

    def groups_of(self, rank: int) -> set[str]:
        return {key for key, members in self.groups().items() if rank in members}

    def rebuilt(self, epoch: int) -> dict[str, str]:
        """The groups that were rebuilt in ``epoch``, each with the reason, by what the journal names."""
        (planned,) = [line.body for line in self.journal("GroupsPlanned") if line.epoch == epoch]
        shares = [share for line in self.journal("ExecutePlan") if line.epoch == epoch for share in line.body["shares"]]
        assert {key for share in shares for key in share["rebuild"]} == planned["rebuild"].keys()
        return dict(planned["rebuild"])

    def results(self) -> list[tuple[int, str | None, str | None]]:
        """What must be equal bit for bit: losses and norms, and the final state under ``state``."""
        return [(line.step, line.loss_hex, line.grad_norm_hex) for line in self.steps]

    @property
    def state(self) -> dict[int, str]:
        return {int(rank): sha256 for rank, sha256 in self.summary.state_sha256.items()}


class Running:
    """A job that has not ended yet."""

    def __init__(self, log_dir: Path, process: subprocess.Popen[str]) -> None:
        self.log_dir = log_dir
        self.process = process

    def wait_for(self, claim: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not claim():
            assert self.process.poll() is None, f"the job ended before {what}"
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
            time.sleep(0.005)

    def pids(self) -> dict[int, int]:
        """The newest process of each rank, by what the journal says."""
        found: dict[int, int] = {}
        for line in self.journal("WorkerStarted"):
            found[int(line.body["rank"])] = int(line.body["pid"])
        return found

    def all_pids(self) -> list[int]:
        """Of every process so far, in the order in which they were started."""
        return [int(line.body["pid"]) for line in self.journal("WorkerStarted")]

    def steps_done(self) -> int:
        path = self.log_dir / "steps.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def resumed_at(self) -> int:
        """The newest step that a recovery went on from; -1 before the first."""
        return max((int(line.body["resume_step"]) for line in self.journal("Resume")), default=-1)

    def count(self, name: str) -> int:
        return len(self.journal(name))

    def journal(self, name: str) -> list[Line]:
        path = self.log_dir / "journal.jsonl"
        return [line for line in read_journal(path) if line.name == name] if path.exists() else []


@contextmanager
def started(job: Job, log_dir: Path, prefix: tuple[str, ...] = ()) -> Iterator[Running]:
    """The job, in a session of its own; whatever is left of it at the end is ended, and that is a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **job.environment}
    process = subprocess.Popen(
        [*prefix, *job.command(log_dir)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield Running(log_dir, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(job: Job, log_dir: Path, timeout: float = 120.0) -> Outcome:
    with started(job, log_dir) as running:
        said, _ = running.process.communicate(timeout=timeout)
    assert_nothing_is_left(running.process.pid)
    return Outcome(log_dir, running.process.returncode, said)


def assert_nothing_is_left(session: int) -> None:
    """Every process of the job's session is gone, within a moment of its end."""
    deadline = time.monotonic() + 5.0
    while left := processes_of(session):
        assert time.monotonic() < deadline, f"processes {left} are left of the job"
        time.sleep(0.01)


def processes_of(session: int) -> list[int]:
    """Those of the session that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found
