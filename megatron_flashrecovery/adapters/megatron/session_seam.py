"""The part of a session that this adapter calls; ``runtime.session.Session`` is the one outside of tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

import torch

from megatron_flashrecovery.core.findings import Finding
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.framework import Framework, StepRecord
from megatron_flashrecovery.runtime.moment import Moment

T = TypeVar("T")


class RefusalSeam(Protocol):
    """For numbers that must not be written."""

    @property
    def skips_update(self) -> bool: ...

    @property
    def examines(self) -> bool: ...

    def refuse(self, what: str, own: str, finding: Finding | None) -> NoReturn: ...


class StepSeams(Protocol):
    """What is called from inside a step."""

    @property
    def refusal(self) -> RefusalSeam: ...

    def mark(self, moment: Moment, tensor: torch.Tensor | None = None) -> None: ...

    def gate(self, objects: Callable[[], bool]) -> bool: ...

    def before_update(self) -> None: ...

    def after_update(self) -> None: ...


class SessionSeam(StepSeams, Protocol):
    """What is called from the loop around it."""

    @property
    def is_joining(self) -> bool: ...

    @property
    def must_load(self) -> bool: ...

    def install_groups(self) -> None: ...

    def attach(self, framework: Framework, choices: Choices | None = None) -> None: ...

    def first_step(self, loaded: Step) -> Step: ...

    def run_step(self, step: Step, call: Callable[[], StepRecord]) -> StepRecord: ...

    def guard(self, name: str, call: Callable[[], T]) -> T: ...

    def checkpoint_written(self, step: Step) -> None: ...

    def finish(self, state_sha256: str) -> None: ...
