"""How long it takes until a fault is seen: from the moment at which a rank says that it will do it to itself, to the
new epoch that the controller opens for it. Ten of each kind in one run of the toy job of four ranks.

Before a process that the out-of-memory killer has chosen is seen to have ended, the kernel must have freed its memory.
The table says how long that takes, with nothing else going on.

A hang is seen when it is longer than a limit that the run has learnt; of that the table shows what comes on top. The
toy's steps take milliseconds, so its limit is the least that there is. A slow rank is named after some steps in a row:
the table counts them, for steps of a second.

The false alarms are those of 2,000 undisturbed steps, the first of which takes twenty times as long, with evaluations
and with checkpoints that rank 0 writes alone, while both cores are busy with something else. The last figure is what it
costs a rank to say in its page what it waits in.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.launched import Launched, with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.pace import STEP, Pace
from megatron_flashrecovery.core.slowness import WINDOWS
from megatron_flashrecovery.detect.pulse import Pulse, make_page
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
from megatron_flashrecovery.runtime.summary import read_summary
from tests.processes.control_group import control_group, inside
from tests.processes.launcher import TOY, Job

TIMES, EVERY, RANKS = 10, 10, 4
ENDS = ("kill", "segv", "abort", "SIGBUS", "SIGFPE", "exception", "exit", "oom")
HANGS = ("stop", "loop", "gil", "hang_collective")
LIMIT_NBYTES = 3 << 29
"""Of the control group in which the fault ``oom`` happens."""
VICTIM_NBYTES = 5 << 28
"""What the killer's victim has by then."""
CALM_STEPS = 2000
CALM = (
    *("--steps", str(CALM_STEPS), "--report", "--slow-first", "1.0"),
    *("--evaluate-every", "100", "--save-every", "250"),
)
SLOW_RANK, SLOW_FROM, SLOW_FOR, SLOW_EVERY = 2, 20, 9, 39
"""Nine steps of a second, then thirty of a quarter: enough for it to be forgotten."""
SLOW = (
    *("--steps", str(SLOW_FROM + TIMES * SLOW_EVERY), "--compute", "0.25", "--only-rank", str(SLOW_RANK)),
    *("--slow-from", str(SLOW_FROM), "--slow-for", str(SLOW_FOR), "--slow-every", str(SLOW_EVERY)),
)
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
    with tempfile.TemporaryDirectory() as directory:
        samples["slow"] = slow_steps(Path(directory))
    with tempfile.TemporaryDirectory() as directory, busy_cores():
        samples["said to hang"], samples["said to be slow"] = ([float(n)] for n in false_alarms(Path(directory)))
    samples["page"] = page_seconds()
    samples["large"] = [end_of_a_large_process() for _ in range(TIMES)]
    write("detection", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    found = []
    for kind in (kind for kind in ENDS if kind in samples):
        found.append(Figure(f"detection of {kind}, median of {TIMES}", statistics.median(samples[kind]), "s"))
        found.append(Figure(f"detection of {kind}, worst", max(samples[kind]), "s", at_most=0.2))
    large = f"end of a process of {VICTIM_NBYTES / (1 << 30):g} GiB, in the kernel, median of {TIMES}"
    found.append(Figure(large, statistics.median(samples["large"]), "s"))
    for kind in HANGS:
        beyond = [seconds - _LIMIT for seconds in samples[kind]]
        what = f"detection of {kind}, beyond the learnt limit of {_LIMIT:g} s"
        found.append(Figure(f"{what}, median of {TIMES}", statistics.median(beyond), "s"))
        found.append(Figure(f"{what}, worst", max(beyond), "s", at_most=5.0))
    slow = f"a rank four times as slow is named, median of {TIMES}"
    found.append(Figure(slow, statistics.median(samples["slow"]), "steps"))
    found.append(
        Figure("a rank four times as slow is named, worst", max(samples["slow"]), "steps", at_most=WINDOWS + 1)
    )
    for said in ("hang", "be slow"):
        calm = f"ranks said to {said} in {CALM_STEPS} steps beside busy cores"
        found.append(Figure(calm, samples[f"said to {said}"][0], "", at_most=0.0))
    page = min(samples["page"]) * 1e6  # what is above the least is what else this machine does
    found.append(Figure("to say what a rank waits in, and that it goes on", page, "us", at_most=3.0))
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


def slow_steps(directory: Path, arguments: tuple[str, ...] = SLOW) -> list[float]:
    """How many slow steps there were when it was named, each time."""
    with with_recovery(Job(TOY, RANKS, arguments), directory) as launched:
        launched.must_end(_TIMEOUT)
    newest, steps = 0, []
    for line in read_journal(directory / FILE_NAME):
        if line.name == "StepsTimed":
            newest = int(line.body["step"])
        elif line.name == "SlowNoted" and line.body["evidence"] is not None:
            assert line.body["rank"] == SLOW_RANK, line
            steps.append(float((newest - SLOW_FROM) % SLOW_EVERY))
    return steps


def false_alarms(directory: Path, arguments: tuple[str, ...] = CALM) -> tuple[int, int]:
    """How many ranks were said to hang or to wait for too long, and how many to be slow."""
    with with_recovery(Job(TOY, RANKS, arguments), directory) as launched:
        launched.must_end(_TIMEOUT)
    lines = list(read_journal(directory / FILE_NAME))
    hung = [len(line.body["hung"]) + len(line.body["waiting"]) for line in lines if line.name == "RanksHung"]
    slow = [line for line in lines if line.name == "SlowNoted" and line.body["evidence"] is not None]
    return sum(hung), len(slow)


def page_seconds(number: int = 5000, times: int = 20) -> list[float]:
    """CPU time of entering an operation and leaving it."""
    pulse = Pulse(make_page())
    pulse.begin(Step(0))

    def enter_and_leave() -> None:
        pulse.enter("DATA_PARALLEL_GROUP[0,2,4,6]#0", "allreduce")
        pulse.leave()

    with pulse.doing(STEP, Step(1)):
        found = timeit.repeat(enter_and_leave, number=number, repeat=times, timer=time.process_time)
    return [seconds / number for seconds in found]


def end_of_a_large_process() -> float:
    """From SIGKILL until it can be reaped."""
    filled = f"taken = b'x' * {VICTIM_NBYTES}; print(flush=True); import time; time.sleep({_TIMEOUT})"
    with subprocess.Popen([sys.executable, "-c", filled], stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        watched = os.pidfd_open(process.pid)
        killed = time.monotonic()
        process.kill()
        select.select([watched], [], [])
        ended = time.monotonic()
        os.close(watched)
    return ended - killed


@contextmanager
def busy_cores(count: int = 2) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
