"""Two jobs that take turns: while one computes a step, every process of the other one is stopped (SIGSTOP).

So both halves of a pair meet the same machine a few seconds apart. What a job had not finished when its turn ended,
such as a mirror under way, it finishes in its own next turn.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from bench.launched import Launched

WARM_UP = 2
# A job that is stopped for as long as a step takes must not take its own agent for dead.
PATIENCE = ("--heartbeat-timeout", "120", "--drain-timeout", "180")
_START_TIMEOUT, _STEP_TIMEOUT = 300.0, 120.0

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Turn:
    seconds: float
    cpu_seconds: float


def compare(a: str, job_a: Launched, b: str, job_b: Launched, pairs: int, samples: Samples) -> None:
    """``pairs`` steps of each, after some to warm up, into ``samples`` by the names of the two."""
    with taking_turns(job_a, job_b) as (player_a, player_b):
        for number in range(-WARM_UP, pairs):
            order = ((a, player_a), (b, player_b)) if number % 2 else ((b, player_b), (a, player_a))
            turns = {name: player.take() for name, player in order}
            if number < 0:
                continue
            for name, other in ((a, b), (b, a)):
                samples.setdefault(f"step, {name} beside {other}", []).append(turns[name].seconds)
                samples.setdefault(f"cpu, {name} beside {other}", []).append(turns[name].cpu_seconds)


class Player:
    """A job that stands still except in its turns."""

    def __init__(self, launched: Launched) -> None:
        self._launched = launched
        self._processes = launched.tree()
        self.stop()

    def take(self) -> Turn:
        """Go on until one more step is complete."""
        done, before = self._launched.steps_done(), self._cpu()
        began = time.monotonic()
        self.go_on()
        self._launched.wait_for_step(done + 1, _STEP_TIMEOUT)
        self.stop()
        return Turn(time.monotonic() - began, self._cpu() - before)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self._processes]
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
