"""Fifty recoveries in one run: what whoever survives them all gains with each, in memory, descriptors and threads.

Three processes are never replaced: the launcher (agent and controller), the fork server, and rank 0, which is spared.
They are sampled from `/proc` between the recoveries, once everybody steps again. Growth is the median slope between
all pairs of samples (Theil and Sen), which a few odd samples do not move. What is filled once is no growth: the first
half of the recoveries is left out of it, and the GPT has twice as many, because even undisturbed its ranks gain memory
for their first hundred steps. The record of a step is kept for as long as the run lasts, so a part of what the launcher
gains comes from the steps between two recoveries.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench import place
from bench.launched import Launched, with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.runtime.summary import read_summary
from tests.processes.launcher import GPT, TOY, Job
from tests.processes.matrix import RECOVERY

RECOVERIES = 50
GPT_RECOVERIES = 100
MOST_RESIDENT = 64 << 10
MOMENTS = ("forward", "backward", "grad_sync", "optimizer", "mirror", "between")
LAUNCHER, SERVER, RANK_0 = "the launcher", "the fork server", "rank 0"
_START_TIMEOUT, _STEP_TIMEOUT = 120.0, 60.0
_LEFT_OUT = 0.5

Sample = dict[str, int]
"""By resource."""
RESOURCES = ("resident bytes", "descriptors", "threads")


@dataclass(frozen=True)
class Trial:
    """A job that loses one rank every ``distance`` steps, each time another one at another moment, never rank 0."""

    name: str
    script: Path
    ranks: int
    arguments: tuple[str, ...]
    steps_flag: str
    recoveries: int
    distance: int

    def job(self) -> Job:
        steps = (self.steps_flag, str(self._lost_in(self.recoveries + 1)))
        kills = tuple(self._kill(number) for number in range(1, self.recoveries + 1))
        return Job(self.script, self.ranks, (*self.arguments, *steps), kills)

    def sampled_at(self, number: int) -> range:
        """How many steps are complete when recovery ``number`` is over for everybody, and nobody is lost again yet."""
        return range(self._lost_in(number) + self.distance // 3, self._lost_in(number + 1) - 1)

    def _lost_in(self, number: int) -> int:
        return number * self.distance

    def _kill(self, number: int) -> str:
        rank = 1 + number % (self.ranks - 1)
        at = MOMENTS[number // (self.ranks - 1) % len(MOMENTS)]
        return f"kill:rank={rank},step={self._lost_in(number)},at={at}"


def toy(recoveries: int) -> Trial:
    return Trial("toy of 4 ranks", TOY, 4, (), "--steps", recoveries, distance=30)


def gpt(recoveries: int) -> Trial:
    layout = place.layout()
    arguments = (RECOVERY, *layout.arguments)
    return Trial(f"GPT of {layout.ranks} ranks", GPT, layout.ranks, arguments, "--train-iters", recoveries, distance=3)


@dataclass
class Observed:
    """``samples[who]`` in order; ``numbers`` says after which recovery each was taken."""

    recoveries: int = 0
    numbers: list[int] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {LAUNCHER: [], SERVER: [], RANK_0: []})

    def growth(self, who: str, resource: str) -> float:
        """Per recovery."""
        begin = self.numbers[-1] * _LEFT_OUT
        each = zip(self.numbers, self.samples[who], strict=True)
        points = [(number, sample[resource]) for number, sample in each if number >= begin]
        pairs = itertools.combinations(points, 2)
        return statistics.median((later - earlier) / (b - a) for (a, earlier), (b, later) in pairs)


def main() -> None:
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    for trial in (toy(RECOVERIES), gpt(GPT_RECOVERIES)):
        observed = observe(trial)
        figures += figures_of(trial, observed)
        samples[f"{trial.name}: after recovery"] = [float(number) for number in observed.numbers]
        for who, of in observed.samples.items():
            samples |= {f"{trial.name}: {who}, {resource}": [float(s[resource]) for s in of] for resource in RESOURCES}
    write("endurance", figures, samples)


def figures_of(trial: Trial, observed: Observed) -> list[Figure]:
    """The growth of memory of each, and of what is counted of whoever gains most."""
    growing = f"{trial.name}, {observed.recoveries} recoveries, gained with each:"
    most = {resource: max(observed.growth(who, resource) for who in observed.samples) for resource in RESOURCES}
    return [
        *(
            Figure(
                f"{growing} memory of {who}",
                observed.growth(who, "resident bytes") / 1024,
                "KiB",
                at_most=MOST_RESIDENT / 1024,
            )
            for who in observed.samples
        ),
        Figure(f"{growing} descriptors", most["descriptors"], "", at_most=0.0),
        Figure(f"{growing} threads", most["threads"], "", at_most=0.0),
    ]


def observe(trial: Trial) -> Observed:
    """Run it to its end. Raises ``RuntimeError`` if anything but the given losses happened in it."""
    observed = Observed()
    with tempfile.TemporaryDirectory() as directory, with_recovery(trial.job(), Path(directory)) as launched:
        launched.wait_for_step(1, _START_TIMEOUT)
        processes = _never_replaced(launched)
        for number in range(1, trial.recoveries + 1):
            window = trial.sampled_at(number)
            launched.wait_for_step(window.start, _STEP_TIMEOUT)
            taken = {who: _sample(process) for who, process in processes.items()}
            if launched.steps_done() < window.stop:  # else the next loss may be seen in it already
                observed.numbers.append(number)
                for who, sample in taken.items():
                    observed.samples[who].append(sample)
        launched.must_end(_STEP_TIMEOUT)
        observed.recoveries = len(read_summary(Path(directory)).recoveries)
    if observed.recoveries != trial.recoveries or len(observed.numbers) <= trial.recoveries // 2:
        raise RuntimeError(f"{observed.recoveries} recoveries, {len(observed.numbers)} seen:\n{launched.output}")
    return observed


def _never_replaced(launched: Launched) -> dict[str, psutil.Process]:
    launcher = launched.tree()[0]
    server = next(child for child in launcher.children() if any("fork_server" in part for part in child.cmdline()))
    return {LAUNCHER: launcher, SERVER: server, RANK_0: psutil.Process(launched.pid_of(0))}


def _sample(process: psutil.Process) -> Sample:
    return {
        "resident bytes": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }
