"""In which step wrong numbers are seen, on the toy job: a gradient that becomes NaN on one rank (ten ranks, once each,
in one run whose result is compared with an undisturbed one), and one wrong bit in a parameter of one of two
data-parallel peers (ten runs, with a comparison spread over every ten steps).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench.detection_nodes import journal_of
from bench.launched import with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
from megatron_flashrecovery.runtime.summary import read_steps
from tests.processes.launcher import TOY, Job

TIMES, EVERY, COMPARED_IN = 10, 10, 10
_RANKS = 4
_SPOILT = range(EVERY, EVERY * (TIMES + 1), EVERY)
_STEPS = ("--steps", str(EVERY * (TIMES + 1)))
_TIMEOUT = 580.0

Samples = dict[str, list[float]]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        samples = bad_gradients(Path(directory))
    samples["wrong bit"] = []
    for number in range(TIMES):
        with tempfile.TemporaryDirectory() as directory:
            samples["wrong bit"].append(wrong_bit(number, Path(directory)))
    write("detection_numbers", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    seconds, bits = samples["seconds"], samples["wrong bit"]
    kept = f"steps that {TIMES} NaNs in gradients have changed"
    compared = f"one wrong bit in a parameter, comparing in every {COMPARED_IN} steps"
    return [
        Figure("detection of a NaN in a gradient, updates with it", max(samples["updates"]), "", at_most=0.0),
        Figure(f"detection of a NaN in a gradient, median of {TIMES}", statistics.median(seconds), "s"),
        Figure("detection of a NaN in a gradient, worst", max(seconds), "s"),
        Figure(kept, samples["changed"][0], "", at_most=0.0),
        Figure(f"{compared}, median of {TIMES}", statistics.median(bits), "steps"),
        Figure(f"{compared}, worst", max(bits), "steps", at_most=COMPARED_IN),
    ]


def bad_gradients(directory: Path) -> Samples:
    """A rank each, for a device that is suspected twice would not be used again. Seconds are those from the moment at
    which the gradient is spoilt to the controller's order to stop; what is later in the step is the reduction."""
    nans = tuple(f"nan:rank={rank},step={step},at=grad_sync" for rank, step in enumerate(_SPOILT))
    calm, run = directory / "calm", directory / "run"
    journal_of(Job(TOY, TIMES, _STEPS), calm)
    lines = journal_of(Job(TOY, TIMES, _STEPS, injections=nans), run)
    noted = [float(line.body["time"]) for line in lines if line.name == "InjectionNoted"]
    refused = [int(line.body["step"]) for line in lines if line.name == "NumbersBad"]
    parked = [line.time for line in lines if line.name == "Park"]
    assert len(noted) == len(parked) == TIMES, (noted, parked)
    pairs = zip(read_steps(calm), read_steps(run), strict=True)
    return {
        "updates": [float(min(seen for seen in refused if seen >= step) - step) for step in _SPOILT],
        "seconds": [there - began for began, there in zip(noted, parked, strict=True)],
        "changed": [float(sum(not one.same_result(other) for one, other in pairs))],
    }


def wrong_bit(number: int, directory: Path) -> float:
    """How many steps later the peers are found to differ."""
    step = EVERY + number  # at every place of the comparison's turn
    arguments = ("--replicated", "--steps", "200", "--checksum-steps", str(COMPARED_IN))
    flip = f"bitflip:rank={number % _RANKS},step={step},at=between"
    with with_recovery(Job(TOY, _RANKS, arguments, injections=(flip,)), directory) as launched:
        # Nobody can tell which of two peers is right, and there is no checkpoint.
        assert launched.until_end(_TIMEOUT) == 1, launched.output
    lines = read_journal(directory / FILE_NAME)
    return float(min(int(line.body["step"]) for line in lines if line.name == "PeersDiffered") - step)
