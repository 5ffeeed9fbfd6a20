"""Where a training loop is in its data: how many steps and samples lie behind it, and the batches of the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    get_micro_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)

from megatron_flashrecovery.adapters.megatron.replay import ReplayableBatches
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.state.pieces import Value


class Position(Protocol):
    """What the framework asks of the loop. Whoever implements it knows how the loop counts."""

    step: Step

    def begin_step(self) -> None:
        """The next batch is the first one of the step behind ``step``."""

    def end_step(self) -> None:
        """That step is complete."""

    def capture(self) -> Value: ...

    def restore(self, captured: Any) -> None: ...

    def forget_before(self, step: Step) -> None:
        """Nobody goes back behind ``step`` any more."""


class SamplePosition:
    """Of a loop in which every step takes the same number of samples, from an iterator that ``open_batches`` opens
    anew at any number of consumed samples."""

    def __init__(self, open_batches: Callable[[int], Iterator[Any]], first_step: Step) -> None:
        self.batches = ReplayableBatches(open_batches)
        self.step = first_step
        self._consumed_samples = first_step * _samples_per_step()

    def begin_step(self) -> None:
        self.batches.begin_step(self.step, self._consumed_samples)

    def end_step(self) -> None:
        self.step = Step(self.step + 1)
        self._consumed_samples += _samples_per_step()

    def capture(self) -> Value:
        return [int(self.step), self._consumed_samples]

    def restore(self, captured: Any) -> None:
        step, self._consumed_samples = captured
        self.step = Step(step)
        update_num_microbatches(self._consumed_samples, consistency_check=False)

    def forget_before(self, step: Step) -> None:
        self.batches.forget_before(step)


def _samples_per_step() -> int:
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    return int(get_num_microbatches() * get_micro_batch_size() * data_parallel_size)
