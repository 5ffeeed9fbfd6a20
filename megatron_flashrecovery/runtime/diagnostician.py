"""Has the records of a running job diagnosed, by a process of its own that nobody waits for.

The controller's loop must not compute for seconds, and its process must not hold what a diagnosis imports. So the
command that users have, too, is started on the node of the controller with the lowest priority; it reads the same
journal, gives up by itself after a while, and is looked at now and then.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from megatron_flashrecovery import start
from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Blamed, Diagnosed, Event, NodeLost, WorkersLost
from megatron_flashrecovery.core.occasions import Occasions
from megatron_flashrecovery.core.phases import Training

DEADLINE = 60.0
"""Seconds of wall time, on a node that trains."""
_LOWEST = 19


@dataclass(frozen=True)
class Named:
    """A suspect in the command's JSON, as far as it matters here."""

    element: str
    p: float
    evidence: str
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True)
class Answer:
    """The command's JSON, as far as it matters here."""

    blamed: tuple[Named, ...]
    undetermined: str | None


class Diagnostician:
    """Owned by the controller's loop. ``environment`` is the launcher's; ``command`` is there for tests."""

    def __init__(
        self,
        log_dir: Path,
        topology: Path | None,
        environment: Mapping[str, str],
        command: tuple[str, ...] = (*start.command("megatron_flashrecovery"), "diagnose"),
        deadline: float = DEADLINE,
    ) -> None:
        where = () if topology is None else ("--topology", str(topology))
        self._command = (*command, str(log_dir), "--json", "--deadline", f"{deadline:g}", *where)
        self._environment = {**environment, "OMP_NUM_THREADS": "1"}
        self._deadline = deadline
        self._occasions = Occasions()
        self._occasion = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._output: BinaryIO
        self._began = 0.0

    def hear(self, event: Event, now: float) -> None:
        """Whatever the job is told, after it has been told."""
        match event:
            case WorkersLost(losses=losses):
                self._occasions.note_incidents(len(losses), now)
            case NodeLost():
                self._occasions.note_incidents(1, now)

    def look(self, job: Job, now: float) -> Diagnosed | None:
        """Again and again. Returns what there is to tell the job, and begins a diagnosis if there is an occasion."""
        self._occasions.note_slow(job.own_times.slow, now)
        if self._process is None:
            occasion = self._occasions.look(isinstance(job.phase, Training), now)
            if occasion is not None:
                self._begin(occasion, now)
            return None
        code = self._process.poll()
        if code is None and now < self._began + self._deadline:
            return None
        self._occasions.end(now)
        return self._end(code)

    def close(self) -> None:
        """Nobody will hear of it any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._output.close()
            self._process = None

    def _begin(self, occasion: str, now: float) -> None:
        self._occasion, self._began = occasion, now
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (open for as long as the process runs)
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _LOWEST)

    def _end(self, code: int | None) -> Diagnosed:
        self._output.seek(0)
        said = b"" if code is None else self._output.read()
        self.close()
        try:
            answer = msgspec.json.decode(said, type=Answer)
        except msgspec.DecodeError:  # it was ended, refused what it was told to do, or has a bug
            words = said.decode(errors="replace").strip().splitlines()
            reason = f"it took longer than {self._deadline:g} s" if code is None else words[-1] if words else "no word"
            return Diagnosed(self._occasion, (), f"the diagnosis failed: {reason}")
        blamed = tuple(Blamed(each.element, each.p, each.evidence, each.nodes) for each in answer.blamed)
        return Diagnosed(self._occasion, blamed, answer.undetermined or "")
