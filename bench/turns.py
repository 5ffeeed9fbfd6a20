"""Two jobs that take turns: while one computes a step, every process of the other one is stopped (SIGSTOP).

So both halves of a pair meet the same machine a few seconds apart. What a job had not finished when its turn ended,
such as a mirror under way, it finishes in its own next turn. On GPUs a job that is stopped leaves kernels behind that
wait for each other: there the two run one after the other, again and again, and a step is the mean of some in the
middle of a run.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench import place
from bench.launched import Launched

WARM_UP = 2
# A job that is stopped for as long as a step takes must not take its own agent for dead.
PATIENCE = ("--heartbeat-timeout", "120", "--drain-timeout", "180")
_START_TIMEOUT, _STEP_TIMEOUT = 300.0, 120.0
_BEFORE, _MEASURED = 20, 100
"""Steps of a run on GPUs."""

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Turn:
    seconds: float
    cpu_seconds: float


def compare(
    launch: Callable[[str, Path], Launched], a: str, b: str, pairs: int, directory: Path, samples: Samples
) -> dict[str, Path]:
    """``pairs`` steps of each, after some to warm up, into ``samples`` by the names of the two; ``launch`` starts the
    job of a name, with a directory for its records. Returns these directories."""
    if place.environment():
        return _one_after_the_other(launch, (a, b), pairs, directory, samples)
    with (
        launch(a, directory / a) as job_a,
        launch(b, directory / b) as job_b,
        taking_turns(job_a, job_b) as (player_a, player_b),
    ):
        for number in range(-WARM_UP, pairs):
            order = ((a, player_a), (b, player_b)) if number % 2 else ((b, player_b), (a, player_a))
            turns = {name: player.take() for name, player in order}
            if number >= 0:
                _keep(turns, samples)
    return {name: directory / name for name in (a, b)}


def _one_after_the_other(
    launch: Callable[[str, Path], Launched], names: tuple[str, str], pairs: int, directory: Path, samples: Samples
) -> dict[str, Path]:
    """Whoever was second before is first."""
    where: dict[str, Path] = {}
    for number in range(pairs):
        turns = {}
        for name in names if number % 2 else reversed(names):
            where[name] = directory / f"{number}-{name}"
            turns[name] = _mean_step(launch(name, where[name]))
        _keep(turns, samples)
    return where


def _mean_step(job: Launched) -> Turn:
    with job:
        job.wait_for_step(_BEFORE, _START_TIMEOUT)
        first, began, before = job.steps_done(), time.monotonic(), cpu_seconds(job.tree())
        job.wait_for_step(first + _MEASURED, _STEP_TIMEOUT)
        seconds, cpu = time.monotonic() - began, cpu_seconds(job.tree()) - before
        count = job.steps_done() - first
        return Turn(seconds / count, cpu / count)


def _keep(turns: Mapping[str, Turn], samples: Samples) -> None:
    for name, turn in turns.items():
        (other,) = turns.keys() - {name}
        samples.setdefault(f"step, {name} beside {other}", []).append(turn.seconds)
        samples.setdefault(f"cpu, {name} beside {other}", []).append(turn.cpu_seconds)


class Player:
    """A job that stands still except in its turns."""

    def __init__(self, launched: Launched) -> None:
        self._launched = launched
        self._processes = launched.tree()
        self.stop()

    def take(self) -> Turn:
        """Go on until one more step is complete."""
        done, before = self._launched.steps_done(), cpu_seconds(self._processes)
        began = time.monotonic()
        self.go_on()
        self._launched.wait_for_step(done + 1, _STEP_TIMEOUT)
        self.stop()
        return Turn(time.monotonic() - began, cpu_seconds(self._processes) - before)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


@contextmanager
def taking_turns(*jobs: Launched) -> Iterator[list[Player]]:
    """Once all have completed a step they stand still. At the end they are let go: whoever is stopped cannot end."""
    for job in jobs:
        job.wait_for_step(1, _START_TIMEOUT)
    players = [Player(job) for job in jobs]
    try:
        yield players
    finally:
        for player in players:
            player.go_on()
