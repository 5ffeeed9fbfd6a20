"""What recovery changes in a run in which nothing fails: the same script under `flashrecovery run` and under plain
torchrun, step by step and bit by bit.

Counted are the steps whose loss or gradient norm differs in any bit, and the ranks whose final state (parameters,
optimizer, random numbers) does. `flashrecovery verify` has to say the same of the two directories.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import place
from bench.launched import gpt, torchrun, with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.summary import read_steps, read_summary

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "distributed optimizer": (),
    "plain optimizer": ("--no-use-distributed-optimizer",),
    "distributed optimizer, overlapped, bf16": ("--overlap-grad-reduce", "--overlap-param-gather", "--bf16"),
    "plain optimizer, overlapped, bf16": ("--no-use-distributed-optimizer", "--overlap-grad-reduce", "--bf16"),
}
STEPS = 12
_TIMEOUT = 180.0


@dataclass(frozen=True)
class Difference:
    """Between two runs of ``steps`` steps each, or of which one did not get so far."""

    steps: int
    ranks: int
    verdict: str
    """What ``flashrecovery verify`` says."""


def main() -> None:
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    for name, arguments in CONFIGURATIONS.items():
        difference = compare(arguments, STEPS)
        steps, ranks = (
            f"{name}: steps of {STEPS} that differ",
            f"{name}: ranks of {place.layout().ranks} whose final state differs",
        )
        figures += [
            Figure(steps, difference.steps, "", at_most=0.0),
            Figure(ranks, difference.ranks, "", at_most=0.0),
        ]
        samples |= {steps: [float(difference.steps)], ranks: [float(difference.ranks)]}
        print(f"{name}: {difference.verdict}", flush=True)
    write("undisturbed", figures, samples)


def compare(arguments: tuple[str, ...], steps: int) -> Difference:
    """Raises ``RuntimeError`` if one of the runs fails, or if ``verify`` does not agree with what is counted."""
    arguments = ("--train-iters", str(steps), *arguments)
    with tempfile.TemporaryDirectory() as directory:
        ours, plain = Path(directory, "recovery"), Path(directory, "torchrun")
        with with_recovery(gpt(*arguments), ours) as launched:
            launched.must_end(_TIMEOUT)
        with torchrun(arguments, plain) as launched:
            launched.must_end(_TIMEOUT)
        return difference_of(ours, plain, steps)


def difference_of(a: Path, b: Path, steps: int) -> Difference:
    result_of = [{line.step: (line.loss_hex, line.grad_norm_hex) for line in read_steps(each)} for each in (a, b)]
    state_of = [read_summary(each).state_sha256 for each in (a, b)]
    # What is missing on one side differs, and what is missing on both sides does, too.
    wanted = [Step(step) for step in range(1, steps + 1)]
    differing = sum(result_of[0].get(step) != result_of[1].get(step) or step not in result_of[0] for step in wanted)
    ranks = sorted({*state_of[0], *state_of[1]})
    others = sum(state_of[0].get(rank) != state_of[1].get(rank) for rank in ranks)
    verify = (sys.executable, "-m", "megatron_flashrecovery", "verify", str(a), str(b))
    verified = subprocess.run(verify, capture_output=True, text=True, check=False)
    if (verified.returncode == 0) != (differing == others == 0):
        raise RuntimeError(f"{differing} steps and {others} ranks differ, but verify says: {verified.stdout}")
    return Difference(differing, others, verified.stdout.strip())
