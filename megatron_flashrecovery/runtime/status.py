"""Where a run is, by its own records: also while it runs, and after it has died without a word."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Diagnosed
from megatron_flashrecovery.core.moves import Move
from megatron_flashrecovery.core.waiting import whom_for
from megatron_flashrecovery.runtime.journal import FILE_NAME, JobStarted, Line, decode_as, read_journal
from megatron_flashrecovery.runtime.replay import replay
from megatron_flashrecovery.runtime.summary import STEPS_NAME, read_steps

FIRST_EPOCH = Epoch(0)


@dataclass(frozen=True)
class LauncherNoted:
    """The process that writes the records; ``created`` (Unix time) tells it from a later one of the same number."""

    host: str
    pid: int
    created: float

    @classmethod
    def this_one(cls) -> LauncherNoted:
        return cls(platform.node(), os.getpid(), psutil.Process().create_time())

    def is_gone(self) -> bool | None:
        """``None``: it is, or was, on another machine."""
        if self.host != platform.node():
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - self.created) > 1.0
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class LastRecovery:
    epoch: Epoch
    cause: str
    lost_ranks: tuple[Rank, ...]
    resume_step: Step
    seconds: float


@dataclass(frozen=True)
class Status:
    """``phase`` is ``waiting for the nodes``, one of the core's phases in lower case, ``ended`` or ``died``. Times are
    Unix time, in seconds. ``diagnosis`` is the newest, ``blamed`` says of all nodes that any has blamed what for."""

    phase: str
    since: float
    last_word: float
    epoch: Epoch = FIRST_EPOCH
    ranks: int = 0
    nodes: int = 0
    step: Step | None = None
    step_time: float | None = None
    step_seconds: float | None = None
    loss: float | None = None
    waiting_for: str | None = None
    recoveries: int = 0
    last_recovery: LastRecovery | None = None
    restarts: int = 0
    checkpoint: Step | None = None
    slow: Mapping[Rank, str] = field(default_factory=dict)
    easing: Mapping[Rank, int] = field(default_factory=dict)
    """Of the slow ones: for how many looks in a row they were not."""
    diagnosis: Diagnosed | None = None
    blamed: Mapping[NodeId, str] = field(default_factory=dict)
    spares: tuple[NodeId, ...] = ()
    """Nodes that wait for seats."""
    moved: tuple[Move, ...] = ()
    """Where seats are that began elsewhere."""
    homeless: tuple[Rank, ...] = ()
    """Seats that wait for a node."""
    failure: str | None = None
    launcher: LauncherNoted | None = None

    @property
    def is_bad(self) -> bool:
        return self.phase == "died" or bool(self.failure)


def status_of(directory: Path) -> Status:
    """Raises ``RecordDamaged`` if there are no records of a run, or none that can be read."""
    path = directory / FILE_NAME
    lines = list(read_journal(path))
    if not lines:
        return Status("waiting for the nodes", since=path.stat().st_mtime, last_word=path.stat().st_mtime)
    job = replay(lines).job
    steps = read_steps(directory) if (directory / STEPS_NAME).exists() else ()
    newest = max(steps, key=lambda line: line.step, default=None)
    end = _newest(lines, "_Ended")
    phase = _newest(lines, "_PhaseEntered")
    noted = _newest(lines, LauncherNoted.__name__)
    launcher = None if noted is None else decode_as(LauncherNoted, noted)
    is_dead = end is None and launcher is not None and launcher.is_gone()
    recovery = job.recoveries[-1] if job.recoveries else None
    word = "died" if is_dead else "ended" if end is not None else type(job.phase).__name__.lower()
    step_time = (directory / STEPS_NAME).stat().st_mtime if newest is not None else None
    return Status(
        phase=word if phase is not None or end is not None or is_dead else "waiting for the nodes",
        since=(end or phase or lines[0]).time,
        epoch=job.epoch,
        ranks=len(job.seats),
        nodes=len(job.seats.ranks_on),
        step=None if newest is None else newest.step,
        step_time=step_time,
        step_seconds=None if newest is None else newest.seconds,
        loss=None if newest is None else newest.loss,
        waiting_for=None if end is not None or is_dead else whom_for(job),
        recoveries=len(job.recoveries),
        last_recovery=None
        if recovery is None
        else LastRecovery(
            recovery.epoch, recovery.cause, recovery.lost_ranks, recovery.resume_step, recovery.seconds["total"]
        ),
        restarts=job.restarts,
        checkpoint=job.checkpoint,
        slow=dict(job.own_times.slow),
        easing=job.own_times.easing(),
        diagnosis=job.diagnosis,
        blamed=dict(job.blamed),
        spares=tuple(job.spares),
        moved=_moved(decode_as(JobStarted, lines[0]).seats, job),
        homeless=tuple(sorted(job.seats.homeless)),
        failure=None if end is None else str(end.body["failure"]),
        last_word=max(lines[-1].time, step_time or 0.0),
        launcher=launcher,
    )


def _moved(first: Mapping[NodeId, Sequence[Rank]], job: Job) -> tuple[Move, ...]:
    now: dict[tuple[NodeId, NodeId], list[Rank]] = {}
    for origin, ranks in first.items():
        for rank in ranks:
            target = job.seats.node_of.get(rank)
            if target is not None and target != origin:
                now.setdefault((origin, target), []).append(rank)
    return tuple(Move(tuple(ranks), *nodes) for nodes, ranks in sorted(now.items()))


def _newest(lines: Sequence[Line], name: str) -> Line | None:
    return next((line for line in reversed(lines) if line.name == name), None)
