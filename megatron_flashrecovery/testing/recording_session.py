"""A session that protects nothing: it records what an adapter calls, and can cut a step short at a moment of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from megatron_flashrecovery.comm.parking import Interrupted
from megatron_flashrecovery.core.findings import Finding
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.framework import Framework, StepRecord
from megatron_flashrecovery.runtime.injection import Fault
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.runtime.tensor_faults import damage

T = TypeVar("T")


class RecordingRefusal:
    """What a step is told, and what is refused: a refused update raises ``Interrupted``, as the session's does."""

    skips_update = False
    examines = False

    def __init__(self) -> None:
        self.refused: list[tuple[str, str, Finding | None]] = []

    def refuse(self, what: str, own: str, finding: Finding | None) -> NoReturn:
        self.refused.append((what, own, finding))
        raise Interrupted(Step(0))


class RecordingSession:
    """``calls`` are the seams in the order in which they were passed."""

    is_joining = False
    must_load = False

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refusal = RecordingRefusal()
        self._damage: Moment | None = None
        self.framework: Framework
        self._interrupt: tuple[str, Callable[[], None]] | None = None

    def interrupt_at(self, call: str, first: Callable[[], None] = lambda: None) -> None:
        """The next time that ``call`` is passed, do ``first`` and raise ``Interrupted``."""
        self._interrupt = (call, first)

    def damage_at(self, moment: Moment | None) -> None:
        """From now on put a value that is no number into what the step computes with at this moment."""
        self._damage = moment

    def install_groups(self) -> None:
        self.calls.append("install_groups")

    def attach(self, framework: Framework, choices: Choices | None = None) -> None:
        self.framework = framework
        self.calls.append("attach")

    def first_step(self, loaded: Step) -> Step:
        return loaded

    def run_step(self, step: Step, call: Callable[[], StepRecord]) -> StepRecord:
        return call()

    def guard(self, name: str, call: Callable[[], T]) -> T:
        self.calls.append(name)
        return call()

    def mark(self, moment: Moment, tensor: torch.Tensor | None = None) -> None:
        if self._damage == moment:
            assert tensor is not None, f"there is nothing to damage at {moment}"
            damage(Fault.NAN, tensor)
        self._pass(moment.value)

    def gate(self, objects: Callable[[], bool]) -> bool:
        self._pass("gate")
        return objects()

    def before_update(self) -> None:
        self._pass("before_update")

    def after_update(self) -> None:
        self._pass("after_update")

    def checkpoint_written(self, step: Step) -> None:
        self.calls.append(f"checkpoint {step}")

    def finish(self, state_sha256: str) -> None:
        self.calls.append("finish")

    def _pass(self, call: str) -> None:
        self.calls.append(call)
        if self._interrupt is not None and self._interrupt[0] == call:
            first, self._interrupt = self._interrupt[1], None
            first()
            raise Interrupted(Step(0))
