"""An iterator over micro batches that can go back to the first batch of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_flashrecovery.core.ids import Step


class ReplayableBatches(Iterator[Any]):
    """Keeps what was drawn for the last steps, and opens the source anew where nothing is kept (on a replacement).

    A batch belongs to the step that was begun last; steps are named by how many were complete before.
    """

    def __init__(self, open_at: Callable[[int], Iterator[Any]]) -> None:
        self._open_at = open_at
        self._source: Iterator[Any] | None = None
        self._kept: dict[Step, list[Any]] = {}
        self._current: list[Any] = []
        self._replayed = 0

    def begin_step(self, step: Step, consumed_samples: int) -> None:
        """The next batch is the first one of ``step``, which lies at ``consumed_samples`` of the data."""
        drawn_for = max(self._kept, default=None)
        continues = drawn_for is not None and step == drawn_for + 1
        if self._source is None or not (step in self._kept or continues):
            self._source = self._open_at(consumed_samples)
            self._kept = {}
        self._current = self._kept.setdefault(step, [])
        self._replayed = 0

    def forget_before(self, step: Step) -> None:
        self._kept = {kept: batches for kept, batches in self._kept.items() if kept >= step}

    def __next__(self) -> Any:
        assert self._source is not None, "no step was begun"
        if self._replayed == len(self._current):
            self._current.append(next(self._source))
        batch = self._current[self._replayed]
        self._replayed += 1
        # A copy: what the step does to its batch must not be seen by the step that is computed from it again.
        return copied(batch)


def copied(batch: Any) -> Any:
    """A deep copy of the tensors in it."""
    match batch:
        case torch.Tensor():
            return batch.clone()
        case dict():
            return {name: copied(value) for name, value in batch.items()}
        case list() | tuple():
            return type(batch)(copied(value) for value in batch)
        case _:
            return batch
