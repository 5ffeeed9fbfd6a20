"""What recovery costs while nothing fails: step time and CPU time with it on and with it off, in turns.

Two jobs of the same script and model live side by side, one under `flashrecovery run` with recovery on, one under plain
torchrun. Every process of one of them is stopped (SIGSTOP) while the other one computes a step, turn by turn, so both
halves of a pair meet the same machine a few seconds apart. What a job had not finished when its turn ended, such as a
mirror under way, it finishes in its own next turn. A turn is timed from here, by the line that the job adds to
`steps.jsonl`. There are two rounds of fresh jobs, because where a process lies in memory is a matter of luck.

A rank's unique state is at least 64 MiB and a step has 2,048 tokens. For the speed of a mirror link see `mirror`.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.launched import Launched, gpt, torchrun, with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal

ROUNDS = 2
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
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            measure(Path(directory), samples)
    write("cost", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    pairs = list(zip(samples["step on"], samples["step off"], strict=True))
    cpu_pairs = zip(samples["cpu on"], samples["cpu off"], samples["mirrored"], strict=True)
    return [
        Figure("step time, recovery on / off", statistics.median(on / off for on, off in pairs), "", at_most=1.03),
        Figure("step time, recovery on", statistics.median(samples["step on"]), "s"),
        Figure("step time, recovery off", statistics.median(samples["step off"]), "s"),
        Figure("unique state of the rank that has least", min(samples["unique"]) / 2**20, "MiB", at_least=64.0),
        Figure("mirrored in a step, all ranks", statistics.median(samples["mirrored"]), "GiB"),
        Figure(
            "CPU time with recovery on more than off, for each GiB mirrored",
            statistics.median((on - off) / gib for on, off, gib in cpu_pairs),
            "s/GiB",
        ),
    ]


def measure(directory: Path, samples: Samples) -> None:
    """One round: two fresh jobs take ``PAIRS`` steps each, after some to warm up."""
    assert _MODEL["--global-batch-size"] * _MODEL["--seq-length"] == _TOKENS
    flags = [part for flag, value in _MODEL.items() for part in (flag, str(value))]
    steps = ("--lr", "1e-4", "--train-iters", str(WARM_UP + PAIRS + 2))
    with ExitStack() as stack:
        on = stack.enter_context(_taking_turns(with_recovery(gpt(*flags, *steps, flags=_PATIENCE), directory / "on")))
        off = stack.enter_context(_taking_turns(torchrun((*flags, *steps), directory / "off")))
        unique = _unique_nbytes(directory / "on")
        for number in range(-WARM_UP, PAIRS):
            order = (on, off) if number % 2 else (off, on)
            turns = {id(player): player.take() for player in order}
            if number < 0:
                continue
            for name, player in (("on", on), ("off", off)):
                samples.setdefault(f"step {name}", []).append(turns[id(player)].seconds)
                samples.setdefault(f"cpu {name}", []).append(turns[id(player)].cpu_seconds)
            samples.setdefault("mirrored", []).append(sum(unique) / _GIB)
        samples.setdefault("unique", []).extend(map(float, unique))


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
        self._launched.wait_for(lambda: self._launched.steps_done() > done, "the next step", _STEP_TIMEOUT)
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
def _taking_turns(launched: Launched) -> Iterator[Player]:
    """From its first complete step on it stands still. At the end it is let go, for whoever is stopped cannot end."""
    with launched:
        launched.wait_for(lambda: launched.steps_done() > 0, "the first step", _START_TIMEOUT)
        player = Player(launched)
        try:
            yield player
        finally:
            player.go_on()


def _unique_nbytes(directory: Path) -> list[int]:
    """Of each rank, by what it told the controller."""
    bills = [line.body for line in read_journal(directory / FILE_NAME) if line.name == "BillNoted"]
    unique = {int(bill["rank"]): int(bill["unique_nbytes"]) for bill in bills}
    assert len(unique) == 8, unique
    assert min(unique.values()) >= LEAST_UNIQUE, unique
    return list(unique.values())
