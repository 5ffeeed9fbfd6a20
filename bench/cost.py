"""What recovery costs while nothing fails: step time and CPU time with it on and with it off, in turns.

Two jobs of the same script and model live side by side, one with recovery and one without. Every process of one of them
is stopped (SIGSTOP) while the other one computes a step, turn by turn, so both halves of a pair meet the same machine a
few seconds apart. What a job had not finished when its turn ended, such as a mirror under way, it finishes in its own
next turn. A turn is timed from here, by the line that the job adds to `steps.jsonl`. What is off is the flag, under our
launcher; two more rounds compare on and off with plain torchrun, and so tell what the launcher has to do with it.

A rank's unique state is at least 64 MiB and a step has 2,048 tokens. For the speed of a mirror link see `mirror`.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.launched import Launched, gpt, torchrun, with_recovery, without_recovery
from bench.report import Figure, write
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal

ON, OFF, TORCHRUN = "on", "off", "plain torchrun"
ROUNDS = ((ON, OFF), (ON, TORCHRUN), (OFF, TORCHRUN))
PAIRS = 10
WARM_UP = 2
LEAST_UNIQUE = 64 << 20
_MODEL = {
    "--num-layers": 4,
    "--hidden-size": 1024,
    "--ffn-hidden-size": 3712,
    "--num-attention-heads": 16,
    "--seq-length": 512,
    "--max-position-embeddings": 512,
    "--micro-batch-size": 1,
    "--global-batch-size": 4,
}
_TOKENS = 2048
_ENOUGH = 200
"""Steps: the jobs are ended when enough has been measured."""
# A job that is stopped for as long as a step takes must not take its own agent for dead.
_PATIENCE = ("--heartbeat-timeout", "120", "--drain-timeout", "180")
_START_TIMEOUT, _STEP_TIMEOUT = 300.0, 120.0
_GIB = 1 << 30

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Turn:
    seconds: float
    cpu_seconds: float


def main() -> None:
    samples: Samples = {}
    for pair in ROUNDS:
        with tempfile.TemporaryDirectory() as directory:
            measure(pair, Path(directory), samples)
    write("cost", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    def pairs(what: str, a: str, b: str) -> list[tuple[float, float]]:
        return list(zip(samples[f"{what}, {a} beside {b}"], samples[f"{what}, {b} beside {a}"], strict=True))

    def ratio(what: str, a: str, b: str) -> float:
        return statistics.median(first / second for first, second in pairs(what, a, b))

    gib = sum(samples["unique"]) / _GIB
    return [
        Figure("step time, recovery on / off", ratio("step", ON, OFF), "", at_most=1.03),
        Figure("step time, recovery on / plain torchrun", ratio("step", ON, TORCHRUN), ""),
        Figure("step time, recovery off / plain torchrun", ratio("step", OFF, TORCHRUN), ""),
        Figure("step time, off", statistics.median(samples[f"step, {OFF} beside {ON}"]), "s"),
        Figure("CPU time of a step, recovery on / off", ratio("cpu", ON, OFF), ""),
        Figure("unique state of the rank that has least", min(samples["unique"]) / 2**20, "MiB", at_least=64.0),
        Figure("mirrored in a step by all ranks", gib, "GiB"),
        Figure(
            "CPU time for each GiB mirrored",
            statistics.median((on - off) / gib for on, off in pairs("cpu", ON, OFF)),
            "s/GiB",
        ),
    ]


def measure(pair: tuple[str, str], directory: Path, samples: Samples) -> None:
    """One round: two fresh jobs take ``PAIRS`` steps each, after some to warm up."""
    assert _MODEL["--global-batch-size"] * _MODEL["--seq-length"] == _TOKENS
    model = [part for flag, value in _MODEL.items() for part in (flag, str(value))]
    arguments = (*model, "--lr", "1e-4", "--train-iters", str(_ENOUGH))
    a, b = pair
    with (
        _launch(a, arguments, directory / "a") as job_a,
        _launch(b, arguments, directory / "b") as job_b,
        _taking_turns(job_a, job_b) as (player_a, player_b),
    ):
        if a == ON:
            samples["unique"] = _unique_nbytes(directory / "a")
        for number in range(-WARM_UP, PAIRS):
            order = ((a, player_a), (b, player_b)) if number % 2 else ((b, player_b), (a, player_a))
            turns = {name: player.take() for name, player in order}
            if number < 0:
                continue
            for name, other in ((a, b), (b, a)):
                samples.setdefault(f"step, {name} beside {other}", []).append(turns[name].seconds)
                samples.setdefault(f"cpu, {name} beside {other}", []).append(turns[name].cpu_seconds)


def _launch(what: str, arguments: Sequence[str], directory: Path) -> Launched:
    match what:
        case "on":
            return with_recovery(gpt(*arguments, flags=_PATIENCE), directory)
        case "off":
            return without_recovery(arguments, directory, _PATIENCE)
        case _:
            return torchrun(arguments, directory)


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
def _taking_turns(*jobs: Launched) -> Iterator[list[Player]]:
    """Once all have completed a step they stand still. At the end they are let go: whoever is stopped cannot end."""
    for job in jobs:
        job.wait_for_step(1, _START_TIMEOUT)
    players = [Player(job) for job in jobs]
    try:
        yield players
    finally:
        for player in players:
            player.go_on()


def _unique_nbytes(directory: Path) -> list[float]:
    """Of each rank, by what it told the controller."""
    bills = [line.body for line in read_journal(directory / FILE_NAME) if line.name == "BillNoted"]
    unique = {int(bill["rank"]): int(bill["unique_nbytes"]) for bill in bills}
    assert len(unique) == 8, unique
    assert min(unique.values()) >= LEAST_UNIQUE, unique
    return [float(nbytes) for nbytes in unique.values()]
