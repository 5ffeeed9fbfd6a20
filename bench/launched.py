"""A training job under one launcher or another: watched while it runs, and no process of it is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import psutil

from bench import place
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
from megatron_flashrecovery.runtime.summary import STEPS_NAME
from tests.processes.launcher import GPT, ROOT, Job
from tests.processes.matrix import RECOVERY

_POLL = 0.002
_GRACE = 10.0


@dataclass(frozen=True)
class Said:
    """One line of output; ``time`` is when it arrived, on the monotonic clock."""

    time: float
    text: str


class Launched:
    """Starts when it is made. ``directory`` is where the job leaves ``steps.jsonl``, and perhaps more."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self.directory = directory
        self.said: list[Said] = []
        self._steps = self._read = 0
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_along, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The launcher ends its workers when it is told to; whoever is left then is killed."""
        tree = self.tree()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._reader.join(_GRACE)

    @property
    def output(self) -> str:
        return "\n".join(said.text for said in self.said)

    def tree(self) -> list[psutil.Process]:
        """The launcher first, and everything that descends from it."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pid_of(self, rank: int) -> int:
        """Under ``flashrecovery run`` by what the journal says, else by the environment that torchrun gave it."""
        journal = self.directory / FILE_NAME
        if journal.exists():
            started = [line.body for line in read_journal(journal) if line.name == "WorkerStarted"]
            return int([body["pid"] for body in started if body["rank"] == rank][-1])
        return next(process.pid for process in self.tree()[1:] if process.environ().get("RANK") == str(rank))

    def steps_done(self) -> int:
        """By ``steps.jsonl``, which has a line for each."""
        path = self.directory / STEPS_NAME
        if path.exists() and path.stat().st_size > self._read:
            with path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += len(new)
            self._steps += new.count(b"\n")
        return self._steps

    def wait_for_step(self, step: int, timeout: float) -> None:
        self.wait_for(lambda: self.steps_done() >= step, f"step {step}", timeout)

    def wait_for(self, claim: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not claim():
            if self.process.poll() is not None:
                raise RuntimeError(f"the job ended before {what}:\n{self.output}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout} s for {what}:\n{self.output}")
            time.sleep(_POLL)

    def until_end(self, timeout: float) -> int:
        """The exit code."""
        self.process.wait(timeout)
        self._reader.join(_GRACE)
        return self.process.returncode

    def must_end(self, timeout: float) -> None:
        """Raises ``RuntimeError`` with all that it said if it does not end well."""
        if self.until_end(timeout) != 0:
            raise RuntimeError(f"the job failed with exit code {self.process.returncode}:\n{self.output}")

    def _read_along(self) -> None:
        """A pipe that nobody reads fills up, and then the job stands still."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(Said(time.monotonic(), line.rstrip("\n")))


def with_recovery(job: Job, directory: Path) -> Launched:
    return Launched(job.command(directory), directory)


def torchrun(arguments: Sequence[str], directory: Path) -> Launched:
    """As users start it without this package. The records of its steps go to ``directory``."""
    return launched_by_torchrun(_without_recovery(arguments, directory), directory)


def launched_by_torchrun(job: Job, directory: Path) -> Launched:
    """The script and its arguments, without what is ours."""
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job.ranks))
    port = ("--master-port", str(_free_port()))
    return Launched([*command, *port, str(job.script), *job.arguments], directory)


def without_recovery(arguments: Sequence[str], directory: Path, flags: Sequence[str] = ()) -> Launched:
    """Under our launcher, by a script that does not ask for recovery."""
    job = replace(_without_recovery(arguments, directory), flags=tuple(flags))
    return Launched(job.command(directory / "log"), directory)


def gpt(*arguments: str, injections: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Job:
    """The main job: real megatron-core, TP2 x PP2 x DP2, or what of it fits this machine's GPUs."""
    layout = place.layout()
    return Job(GPT, layout.ranks, (RECOVERY, *layout.arguments, *arguments), injections, flags)


def _without_recovery(arguments: Sequence[str], directory: Path) -> Job:
    layout = place.layout()
    return Job(GPT, layout.ranks, ("--dump-dir", str(directory), *layout.arguments, *arguments))


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        # Else torchrun meets the store of an earlier attempt, and a start takes longer or fails.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **place.environment(),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
