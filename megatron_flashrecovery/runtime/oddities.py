"""What is odd about the numbers of steps that are complete: spikes, and steps that come out differently when they are
computed again. It is noted, and nothing else: a run may be like that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.numbers import SPIKE_WINDOW, is_spike
from megatron_flashrecovery.runtime.dialogue import StepDone


@dataclass(frozen=True)
class SpikeNoted:
    """``measure`` (loss, or gradient norm) is far above that of the steps before."""

    step: Step
    measure: str
    value: float


@dataclass(frozen=True)
class StepDiffered:
    """A step was computed again and its loss or norm is not the same to the bit: something computes wrongly, or is not
    deterministic. ``rank`` is who reports for all; ``replaced``: another process than the one that did before."""

    step: Step
    rank: Rank
    replaced: bool
    difference: str


class Spikes:
    """Remembers the last steps of a run, each once."""

    def __init__(self) -> None:
        self._newest = Step(0)
        self._before: dict[str, deque[float]] = {
            measure: deque(maxlen=SPIKE_WINDOW) for measure in ("loss", "gradient norm")
        }

    def of(self, done: StepDone) -> Iterator[SpikeNoted]:
        if done.step <= self._newest:
            return
        self._newest = done.step
        for measure, value in (("loss", done.loss), ("gradient norm", done.grad_norm)):
            if value is None:
                continue
            if is_spike(value, list(self._before[measure])):
                yield SpikeNoted(done.step, measure, value)
            self._before[measure].append(value)
