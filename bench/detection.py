"""How long it takes until a fault is seen: from the moment at which a rank says that it will do it to itself, to the
new epoch that the controller opens for it. Ten of each kind in one run of the toy job of four ranks.

A hang is seen when it is longer than a limit that the run has learnt; of that the table shows what comes on top. The
toy's steps take milliseconds, so its limit is the least that there is. The last figure counts the ranks that were said
to hang in 2,000 undisturbed steps while both cores are busy with something else.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.launched import Launched, with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.core.pace import Pace
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
from megatron_flashrecovery.runtime.summary import read_summary
from tests.processes.control_group import control_group, inside
from tests.processes.launcher import TOY, Job

TIMES, EVERY, RANKS = 10, 10, 4
ENDS = ("kill", "segv", "abort", "SIGBUS", "SIGFPE", "exception", "exit", "oom")
HANGS = ("stop", "loop", "gil", "hang_collective")
LIMIT_NBYTES = 3 << 29
"""Of the control group in which the fault ``oom`` happens."""
CALM_STEPS = 2000
_TIMEOUT = 580.0
_LIMIT = Pace().least

Samples = dict[str, list[float]]


def main() -> None:
    samples: Samples = {}
    for kind in (*ENDS, *HANGS):
        with tempfile.TemporaryDirectory() as directory:
            try:
                samples[kind] = detect(kind, Path(directory))
            except OSError as error:
                if kind != "oom":
                    raise
                print(f"detection of oom is left out: no memory control group can be made here ({error})")
    with tempfile.TemporaryDirectory() as directory, busy_cores():
        samples["false alarms"] = [float(false_alarms(Path(directory)))]
    write("detection", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    found = []
    for kind in (kind for kind in ENDS if kind in samples):
        found.append(Figure(f"detection of {kind}, median of {TIMES}", statistics.median(samples[kind]), "s"))
        found.append(Figure(f"detection of {kind}, worst", max(samples[kind]), "s", at_most=0.2))
    for kind in HANGS:
        beyond = [seconds - _LIMIT for seconds in samples[kind]]
        what = f"detection of {kind}, beyond the learnt limit of {_LIMIT:g} s"
        found.append(Figure(f"{what}, median of {TIMES}", statistics.median(beyond), "s"))
        found.append(Figure(f"{what}, worst", max(beyond), "s", at_most=5.0))
    calm = f"ranks said to hang in {CALM_STEPS} steps beside busy cores"
    found.append(Figure(calm, samples["false alarms"][0], "", at_most=0.0))
    return found


def detect(kind: str, directory: Path) -> list[float]:
    faults = tuple(f"{kind}:rank={number % RANKS},step={EVERY * (number + 1)},at=forward" for number in range(TIMES))
    steps = str(EVERY * (TIMES + 1))
    command = Job(TOY, RANKS, ("--steps", steps), injections=faults).command(directory)
    with ExitStack() as stack:
        if kind == "oom":
            command = inside(stack.enter_context(control_group(LIMIT_NBYTES)), command)
        stack.enter_context(Launched(command, directory)).must_end(_TIMEOUT)
    recoveries = read_summary(directory).recoveries
    assert len(recoveries) == TIMES, [recovery.cause for recovery in recoveries]
    if kind == "hang_collective":
        return _until_all_go_back(directory)
    return [recovery.seconds.detect for recovery in recoveries]


def _until_all_go_back(directory: Path) -> list[float]:
    """Nobody dies of it, so the journal has to say when it began."""
    lines = [line for line in read_journal(directory / FILE_NAME) if line.name in ("InjectionNoted", "Park")]
    return [park.time - began.time for began, park in zip(lines[::2], lines[1::2], strict=True)]


def false_alarms(directory: Path) -> int:
    with with_recovery(Job(TOY, RANKS, ("--steps", str(CALM_STEPS), "--report")), directory) as launched:
        launched.must_end(_TIMEOUT)
    told = [line.body for line in read_journal(directory / FILE_NAME) if line.name == "RanksHung"]
    return sum(len(body["hung"]) + len(body["waiting"]) for body in told)


@contextmanager
def busy_cores(count: int = 2) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
