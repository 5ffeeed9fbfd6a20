"""What recovery costs while nothing fails: step time and CPU time with it on and with it off, in turns.

Two jobs of the same script and model, one with recovery and one without, compute step by step in turns (`bench.turns`).
A turn is timed from here, by the line that the job adds to `steps.jsonl`. What is off is the flag, under our launcher;
two more rounds compare on and off with plain torchrun, and so tell what the launcher has to do with it.

A rank's unique state is at least 64 MiB and a step has 2,048 tokens. For the speed of a mirror link see `mirror`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import place
from bench.launched import Launched, gpt, torchrun, with_recovery, without_recovery
from bench.report import Figure, write
from bench.turns import PATIENCE, Samples, compare
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal

ON, OFF, TORCHRUN = "on", "off", "plain torchrun"
ROUNDS = ((ON, OFF), (ON, TORCHRUN), (OFF, TORCHRUN))
PAIRS = 10
LEAST_UNIQUE = 64 << 20
MODEL = {
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
ENOUGH = 200
"""Steps: the jobs are ended when enough has been measured."""
_GIB = 1 << 30


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
    """One round."""
    assert MODEL["--global-batch-size"] * MODEL["--seq-length"] == _TOKENS
    model = [part for flag, value in MODEL.items() for part in (flag, str(value))]
    arguments = (*model, "--lr", "1e-4", "--train-iters", str(ENOUGH))
    records = compare(lambda what, where: _launch(what, arguments, where), *pair, PAIRS, directory, samples)
    if ON in records:
        samples["unique"] = unique_nbytes(records[ON])


def _launch(what: str, arguments: Sequence[str], directory: Path) -> Launched:
    match what:
        case "on":
            return with_recovery(gpt(*arguments, flags=PATIENCE), directory)
        case "off":
            return without_recovery(arguments, directory, PATIENCE)
        case _:
            return torchrun(arguments, directory)


def unique_nbytes(directory: Path) -> list[float]:
    """Of each rank, by what it told the controller."""
    bills = [line.body for line in read_journal(directory / FILE_NAME) if line.name == "BillNoted"]
    unique = {int(bill["rank"]): int(bill["unique_nbytes"]) for bill in bills}
    assert len(unique) == place.layout().ranks, unique
    assert min(unique.values()) >= LEAST_UNIQUE, unique
    return [float(nbytes) for nbytes in unique.values()]
