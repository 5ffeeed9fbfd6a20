"""The part of a session that this adapter calls; ``runtime.session.Session`` is the one outside of tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.framework import Framework, StepRecord
from megatron_flashrecovery.runtime.moment import Moment

T = TypeVar("T")


class StepSeams(Protocol):
    """What is called from inside a step."""

    def mark(self, moment: Moment) -> None: ...

    def gate(self) -> None: ...

    def before_update(self) -> None: ...

    def after_update(self) -> None: ...


class SessionSeam(StepSeams, Protocol):
    """What is called from the loop around it."""

    @property
    def is_joining(self) -> bool: ...

    @property
    def must_load(self) -> bool: ...

    def install_groups(self) -> None: ...

    def attach(self, framework: Framework) -> None: ...

    def first_step(self, loaded: Step) -> Step: ...

    def run_step(self, step: Step, call: Callable[[], StepRecord]) -> StepRecord: ...

    def guard(self, name: str, call: Callable[[], T]) -> T: ...

    def checkpoint_written(self, step: Step) -> None: ...

    def finish(self, state_sha256: str) -> None: ...
