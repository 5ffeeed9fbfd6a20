"""Has the records of a running job diagnosed, by a process of its own that nobody waits for.

The controller's loop must not compute for seconds, and its process must not hold what a diagnosis imports. So the
command that users have, too, is started on the node of the controller with the lowest priority; it reads the same
journal, gives up by itself after a while, and is looked at now and then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from megatron_flashrecovery import start
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import FAILED, Blamed, Diagnosed, Event, NodeLost, WorkersLost
from megatron_flashrecovery.core.occasions import Occasions
from megatron_flashrecovery.core.phases import Training

DEADLINE = 60.0
"""Seconds of wall time, on a node that trains."""
_LOWEST = 19
_FIRST_TO_GO = "1000"
_REAPED_WITHIN = 0.2
_MOST_NBYTES = 1 << 24
"""Of an answer, which the controller's loop reads."""
_LONGEST = 500


@dataclass(frozen=True)
class Named:
    """A suspect in the command's JSON, as far as it matters here."""

    element: str
    p: float
    evidence: str
    nodes: tuple[NodeId, ...]
    ranks: tuple[Rank, ...]


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
        self._stuck: subprocess.Popen[bytes] | None = None
        self._said: BinaryIO
        self._complained: BinaryIO
        self._began = 0.0

    def hear(self, event: Event, now: float) -> None:
        """Whatever the job is told, after it has been told."""
        match event:
            case WorkersLost(node=node) | NodeLost(node=node):
                self._occasions.note_incident(node, now)

    def look(self, job: Job, now: float) -> Diagnosed | None:
        """Again and again. Returns what there is to tell the job, and begins a diagnosis if there is an occasion."""
        self._occasions.note_slow(job.own_times.slow, now)
        if self._process is None:
            if self._stuck is not None and self._stuck.poll() is None:
                return None
            self._stuck = None
            occasion = self._occasions.look(isinstance(job.phase, Training), now)
            return None if occasion is None else self._begin(occasion, now)
        code = self._process.poll()
        if code is None and now < self._began + self._deadline:
            return None
        self._occasions.end(now)
        return self._end(code)

    def close(self) -> None:
        """Nobody will hear of it any more. It may be stuck in the file system of the records, killed as it is: then it
        goes when that lets go of it, and nobody waits for it."""
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_REAPED_WITHIN)
            self._said.close()
            self._complained.close()
            self._process, self._stuck = None, self._process

    def _begin(self, occasion: str, now: float) -> Diagnosed | None:
        """A machine without room for a process or a file loses the diagnosis, not the job."""
        self._occasion, self._began = occasion, now
        with ExitStack() as opened:
            try:
                # Apart from each other: a warning of a library shall not spoil an answer.
                self._said = opened.enter_context(tempfile.TemporaryFile())
                self._complained = opened.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=self._said,
                    stderr=self._complained,
                )
            except OSError as error:
                self._occasions.end(now)
                return self._failed(f"it could not be started: {error}")
            opened.pop_all()
        self._stand_back(self._process.pid)
        return None

    @staticmethod
    def _stand_back(pid: int) -> None:
        """Whoever trains comes first; and where memory runs short, the diagnosis is what the kernel shall end."""
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, _LOWEST)
        with suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text(_FIRST_TO_GO)

    def _end(self, code: int | None) -> Diagnosed:
        try:
            diagnosed = self._answer(code)
        except OSError as error:
            diagnosed = self._failed(f"what it said cannot be read: {error}")
        self.close()
        return diagnosed

    def _answer(self, code: int | None) -> Diagnosed:
        if code in (None, -signal.SIGALRM):  # it has the same deadline, and may have come first
            return self._failed(f"it took longer than {self._deadline:g} s")
        try:
            answer = msgspec.json.decode(_from_the_top(self._said), type=Answer)
        except msgspec.DecodeError:  # it was ended, refused what it was told to do, or has a bug
            words = _from_the_top(self._complained).decode(errors="replace").strip().splitlines()
            ended = f"it ended with {code}" if code >= 0 else f"it was ended by signal {-code}"
            return self._failed(words[-1][:_LONGEST] if words else ended)
        blamed = tuple(Blamed(each.element, each.p, each.evidence, each.nodes, each.ranks) for each in answer.blamed)
        return Diagnosed(self._occasion, blamed, answer.undetermined or "")

    def _failed(self, reason: str) -> Diagnosed:
        return Diagnosed(self._occasion, (), f"{FAILED}{reason}")


def _from_the_top(output: BinaryIO) -> bytes:
    output.seek(0)
    return output.read(_MOST_NBYTES)
