"""The part of a session that a loop needs which nobody has written for recovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch

from megatron_flashrecovery.adapters.megatron.session_seam import StepSeams
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.framework import Framework, StepRecord

T = TypeVar("T")


class LoopSession(StepSeams, Protocol):
    @property
    def is_joining(self) -> bool: ...

    @property
    def must_load(self) -> bool: ...

    @property
    def has_entered(self) -> bool: ...

    @property
    def is_inside(self) -> bool: ...

    def attach(self, framework: Framework, choices: Choices | None = None) -> None: ...

    def first_step(self, loaded: Step) -> Step: ...

    def run_step(self, step: Step, call: Callable[[], StepRecord]) -> StepRecord: ...

    def guard(self, name: str, call: Callable[[], T], again: Callable[[], T] | None = None) -> T: ...

    def unrecorded(self) -> AbstractContextManager[None]: ...

    def foretell(
        self, group: torch.distributed.ProcessGroup, operation: str, results: Sequence[torch.Tensor]
    ) -> None: ...

    @property
    def last_resume(self) -> Step | None: ...

    @property
    def reported(self) -> Mapping[str, Step]: ...

    def note_reported(self, name: str, step: Step) -> None: ...

    def checkpoint_written(self, step: Step) -> None: ...

    def finish(self, state_sha256: str) -> None: ...
