"""Megatron-LM's own `pretrain_gpt.py`, of the checkout in MEGATRON_LM: a recovery, a start, and a step with the flag.

The model is that of `tests/frameworks`, TP2 x PP2 x DP2 or what of it fits this machine's GPUs. Recovery is measured as
in `recovery`; today's way loads no optimizer state, for upstream cannot load that of torch's Adam, which favours it. A
start is timed from the moment at which the imports are done, which all workers share, to the first line of upstream's
log, with the flag and without it.
A step is measured as in `cost`, with its model and in turns, by the lines of upstream's log.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench import place
from bench.cost import ENOUGH, MODEL, OFF, ON, PAIRS, unique_nbytes
from bench.launched import Launched, launched_by_torchrun, with_recovery
from bench.recovery import newest_checkpoint
from bench.report import Figure, write
from bench.turns import PATIENCE, Samples, compare
from megatron_flashrecovery.runtime.summary import read_summary
from tests.frameworks.megatron_lm_job import CHECKOUT, SHARDED, gpu_flags, installed_libraries, pretrain
from tests.processes.launcher import Job
from tests.processes.matrix import kill

ROUNDS = 3
STARTS = 8
"""Pairs: single ones are a tenth apart on a machine that does nothing else."""
_LOST, _STEP, _STEPS = place.layout().rank(5), 6, 8
_WARM, _COLD, _TODAY = "warm", "cold", "today"
_WITH, _WITHOUT = "start with the flag", "start without it"
_START_TIMEOUT, _STEP_TIMEOUT = 180.0, 60.0
_STEP_TIMES = (f"step, {ON} beside {OFF}", f"step, {OFF} beside {ON}")
_ITERATION = re.compile(r" iteration +(\d+)/")


def main() -> None:
    if not CHECKOUT:
        print("bench megatron_lm: not measured, for MEGATRON_LM names no checkout of Megatron-LM", file=sys.stderr)
        return
    samples: Samples = {}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            for name, flags in ((_WARM, ()), (_COLD, ("--no-preload",))):
                samples.setdefault(name, []).append(recover(Path(directory, name), flags))
            samples.setdefault(_TODAY, []).append(start_again(Path(directory, _TODAY)))
    for number in range(STARTS):
        with tempfile.TemporaryDirectory() as directory:
            for name in (_WITH, _WITHOUT) if number % 2 else (_WITHOUT, _WITH):
                samples.setdefault(name, []).append(start(Path(directory, name), recovery=name == _WITH))
    with tempfile.TemporaryDirectory() as directory:
        steps(Path(directory), samples)
    write("megatron_lm", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    def median(what: str) -> float:
        return statistics.median(samples[what])

    def ratio(a: str, b: str) -> float:
        return statistics.median(one / other for one, other in zip(samples[a], samples[b], strict=True))

    it = "pretrain_gpt.py, "
    return [
        Figure(f"{it}kill to first step, warm replacement", median(_WARM), "s", at_most=1.5),
        Figure(f"{it}kill to first step, cold replacement", median(_COLD), "s", at_most=5.0),
        Figure(f"{it}kill to first step, start all again from the newest checkpoint", median(_TODAY), "s"),
        Figure(f"{it}warm replacement / start all again", ratio(_WARM, _TODAY), "", at_most=0.1),
        Figure(f"{it}start with the flag / without it", ratio(_WITH, _WITHOUT), "", at_most=1.05),
        Figure(f"{it}start without the flag", median(_WITHOUT), "s"),
        Figure(f"{it}step time, with the flag / without it", ratio(*_STEP_TIMES), "", at_most=1.03),
        Figure(f"{it}step time without the flag", median(_STEP_TIMES[1]), "s"),
        Figure(f"{it}unique state of the rank that has least", min(samples["unique"]) / 2**20, "MiB", at_least=64.0),
    ]


def recover(directory: Path, flags: tuple[str, ...]) -> float:
    """Seconds of one recovery, by the run's own record."""
    job = replace(_job(injections=(kill(_LOST, _STEP, "backward"),)), flags=flags)
    with with_recovery(job, directory) as launched:
        launched.must_end(_START_TIMEOUT)
    (recovery,) = read_summary(directory).recoveries
    return recovery.seconds.total


def start_again(directory: Path) -> float:
    """Seconds from the kill to the first step that had not been completed before it."""
    saved = directory / "checkpoints"
    job = _job("--save", str(saved), "--save-interval", "1", recovery=False)
    with launched_by_torchrun(job, directory / "before") as launched:
        saving = f"the checkpoint of step {_STEP - 1}"
        launched.wait_for(lambda: newest_checkpoint(saved) >= _STEP - 1, saving, _START_TIMEOUT)
        lost, reached, began = launched.pid_of(_LOST), max(_iterations(launched)), time.monotonic()
        os.kill(lost, signal.SIGKILL)
        if launched.until_end(_STEP_TIMEOUT) == 0:
            raise RuntimeError(f"torchrun did not notice the loss:\n{launched.output}")
    job = replace(job, arguments=(*job.arguments, "--load", str(saved), "--no-load-optim"))
    with launched_by_torchrun(job, directory / "after") as launched:
        launched.wait_for(lambda: max(_iterations(launched), default=0) > reached, "a step", _START_TIMEOUT)
        return _iterations(launched)[min(step for step in _iterations(launched) if step > reached)] - began


def start(directory: Path, recovery: bool) -> float:
    with with_recovery(_job(recovery=recovery), directory) as launched:
        launched.wait_for(lambda: 1 in _iterations(launched), "the first step", _START_TIMEOUT)
        began = next(said.time for said in launched.said if "the imports took" in said.text)
        return _iterations(launched)[1] - began


class Logged(Launched):
    """Its steps are those of upstream's log, for without the flag there is no other record."""

    def steps_done(self) -> int:
        return max(_iterations(self), default=0)


def steps(directory: Path, samples: Samples) -> None:
    """Enough of them; both jobs are ended when enough has been measured."""
    model = [part for flag, value in MODEL.items() for part in (flag, str(value))]

    def launch(name: str, where: Path) -> Logged:
        job = _job(*model, "--train-iters", str(ENOUGH), recovery=name == ON)
        return Logged(replace(job, flags=PATIENCE).command(where), where)

    records = compare(launch, ON, OFF, PAIRS, directory, samples)
    samples["unique"] = unique_nbytes(records[ON])


def _job(*arguments: str, injections: tuple[str, ...] = (), recovery: bool = True) -> Job:
    flags = (*SHARDED, "--train-iters", str(_STEPS), *arguments)
    on = gpu_flags(installed_libraries()) if place.environment() else None
    return pretrain(*flags, injections=injections, recovery=recovery, layout=place.layout(), device_flags=on)


def _iterations(launched: Launched) -> dict[int, float]:
    """When the line of each step was printed."""
    found = [(_ITERATION.search(said.text), said.time) for said in list(launched.said)]
    return {int(match[1]): at for match, at in found if match}
