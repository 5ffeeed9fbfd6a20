"""From the loss of a rank to the first step after it: a warm replacement, a cold one, and what users do today.

The model is the demo's. With recovery, a rank (5 of 8) is killed in the backward pass of step 6, and the time is the
run's own record (`seconds.total` in `summary.json`: from the kill until every rank has completed a step). Today: the
same script under plain torchrun saves a `torch_dist` checkpoint after every step; the rank is killed when the one of
step 5 is complete, so that nothing is lost; torchrun ends the others; the same command is started at once; and the time
goes from the kill to the line of step 6. The three take turns.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench import place
from bench.launched import Launched, gpt, torchrun, with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.runtime.summary import PhaseSeconds, read_summary

ROUNDS = 5
_LOST, _STEP, _STEPS = place.layout().rank(5), 6, 8
_WARM, _COLD, _TODAY = "warm", "cold", "today"
_PHASES = ("detect", "park", "replace", "rebuild", "restore", "first_step")
_START_TIMEOUT, _STEP_TIMEOUT = 180.0, 60.0
_MARKER = "latest_checkpointed_iteration.txt"

Samples = dict[str, list[float]]


def main() -> None:
    samples: Samples = {}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            _note(samples, _WARM, recover(Path(directory, _WARM)))
            _note(samples, _COLD, recover(Path(directory, _COLD), "--no-preload"))
            samples.setdefault(_TODAY, []).append(start_again(Path(directory, _TODAY)))
    write("recovery", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    def median(what: str) -> float:
        return statistics.median(samples[what])

    def share(what: str) -> float:
        # Each beside the restart of the same round: what else the machine does meets both.
        return statistics.median(a / b for a, b in zip(samples[f"{what} total"], samples[_TODAY], strict=True))

    return [
        Figure("kill to first step, warm replacement", median(f"{_WARM} total"), "s", at_most=1.5),
        Figure("kill to first step, cold replacement", median(f"{_COLD} total"), "s", at_most=5.0),
        Figure("kill to first step, start all again from the newest checkpoint", median(_TODAY), "s"),
        Figure("warm replacement / start all again", share(_WARM), "", at_most=0.1),
        Figure("cold replacement / start all again", share(_COLD), ""),
        *(Figure(f"warm replacement, {phase}", median(f"{_WARM} {phase}"), "s") for phase in _PHASES),
    ]


def recover(directory: Path, *flags: str) -> PhaseSeconds:
    """One run with one loss."""
    kill = f"kill:rank={_LOST},step={_STEP},at=backward"
    job = gpt("--train-iters", str(_STEPS), injections=(kill,), flags=flags)
    with with_recovery(job, directory) as launched:
        launched.must_end(_START_TIMEOUT)
    (recovery,) = read_summary(directory).recoveries
    return recovery.seconds


def start_again(directory: Path) -> float:
    """Seconds from the kill to the first step that had not been completed before it."""
    saved = directory / "checkpoints"
    to_and_from = ("--save", str(saved), "--save-interval", "1", "--load", str(saved))
    arguments = ("--train-iters", str(_STEPS), *to_and_from)
    with torchrun(arguments, directory / "before") as launched:
        launched.wait_for(
            lambda: newest_checkpoint(saved) >= _STEP - 1, f"the checkpoint of step {_STEP - 1}", _START_TIMEOUT
        )
        lost = launched.pid_of(_LOST)
        reached = max(_steps(launched))
        began = time.monotonic()
        os.kill(lost, signal.SIGKILL)
        if launched.until_end(_STEP_TIMEOUT) == 0:
            raise RuntimeError(f"torchrun did not notice the loss:\n{launched.output}")
    with torchrun(arguments, directory / "after") as launched:
        launched.wait_for(lambda: max(_steps(launched), default=0) > reached, "a step", _START_TIMEOUT)
        first = min(step for step in _steps(launched) if step > reached)
        return _steps(launched)[first] - began


def newest_checkpoint(saved: Path) -> int:
    """The marker is written last, and is empty for a moment before it is whole."""
    marker = saved / _MARKER
    return int((marker.exists() and marker.read_text()) or 0)


def _steps(launched: Launched) -> dict[int, float]:
    """When the line of each step was printed."""
    lines = [(said.time, said.text.split()) for said in list(launched.said)]
    return {int(words[1].partition("/")[0]): at for at, words in lines if words[:1] == ["step"]}


def _note(samples: Samples, name: str, seconds: PhaseSeconds) -> None:
    for phase, value in asdict(seconds).items():
        samples.setdefault(f"{name} {phase}", []).append(value)
