"""Tells what happens in a run while it happens, from the records that it writes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashrecovery.runtime import journal, summary
from megatron_flashrecovery.runtime.status import status_of

if TYPE_CHECKING:
    from megatron_flashrecovery.runtime.journal import Line
    from megatron_flashrecovery.runtime.summary import StepLine

_POLL = 0.2
_SILENCE = 1.8
"""A person wonders after two seconds."""


class RunFollower:
    """``say`` takes one line. Reads the whole files each time: a demo's are small."""

    def __init__(self, log_dir: Path, say: Callable[[str], object]) -> None:
        self._log_dir = log_dir
        self._say = say
        self._steps = 0
        self._lines = 0
        self._spoke = self._begun = time.monotonic()

    def forget(self) -> None:
        """Delete the records of an earlier run, so that none of them is told as news."""
        for name in (journal.FILE_NAME, summary.STEPS_NAME, summary.SUMMARY_NAME):
            (self._log_dir / name).unlink(missing_ok=True)

    def until_exit(self, process: subprocess.Popen[bytes], limit: float) -> int:
        """The exit code; -1 if the run took longer than ``limit`` seconds."""
        while time.monotonic() - self._begun < limit:
            try:
                code = process.wait(timeout=_POLL)
            except subprocess.TimeoutExpired:
                self._tell()
                continue
            self._tell()
            return code
        self._tell_line(f"no end after {limit:.0f} s")
        return -1

    def _tell(self) -> None:
        for step in self._new_steps():
            self._tell_line(f"step {step.step}: loss {_shown(step.loss)}, {step.seconds:.2f} s")
        for line in self._new_lines():
            if (text := notable(line)) is not None:
                self._tell_line(text)
        if time.monotonic() - self._spoke > _SILENCE:
            self._tell_line(f"... {self._awaited()}")

    def _awaited(self) -> str:
        if not self._steps:
            return "starting workers and building the model"
        if (whom := status_of(self._log_dir).waiting_for) is not None:
            return f"waiting for {whom}"
        return f"step {self._steps + 1} is being computed, or the run ends"

    def _new_steps(self) -> tuple[StepLine, ...]:
        if not (self._log_dir / summary.STEPS_NAME).exists():
            return ()
        new = summary.read_steps(self._log_dir)[self._steps :]
        self._steps += len(new)
        return new

    def _new_lines(self) -> list[Line]:
        path = self._log_dir / journal.FILE_NAME
        if not path.exists():
            return []
        new = list(journal.read_journal(path))[self._lines :]
        self._lines += len(new)
        return new

    def _tell_line(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._say(f"  {self._spoke - self._begun:6.1f} s  {text}")


def notable(line: Line) -> str | None:
    """What a person wants to hear of the journal while the run goes on."""
    match line.name:
        case "WorkersLost":
            return "; ".join(f"rank {loss['rank']} is lost: {loss['cause']}" for loss in line.body["losses"])
        case "NodeLost":
            return f"node {line.body['node']} is lost: {line.body['cause']}"
        case "StartWorkers":
            return f"starting a replacement for rank {', '.join(map(str, line.body['ranks']))}"
        case "Resume":
            return f"every rank goes on from step {line.body['resume_step']}"
        case "RestartAll" | "Stop" | "Fence":
            return f"{line.name}: {line.body['reason']}"
        case _:
            return None


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.6f}"
