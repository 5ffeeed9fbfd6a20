"""How far this rank is: the completed step, where it stands in the update of the next, and what the last steps left.

Written by the main thread only; the session's thread reads single fields of it for reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.reports import Update
from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.state.pieces import Value

NO_STEP = Step(0)
_RECORD = "flashrecovery/record"
_KEPT = 2


@dataclass
class Progress:
    """``values`` are the small pieces at the boundaries of the last two completed steps, ``records`` what those steps
    reported: a rank that is carried over a step needs the report that it never computed."""

    completed: Step = NO_STEP
    update: Update = Update.BEFORE
    values: dict[Step, Mapping[str, Value]] = field(default_factory=dict)
    records: dict[Step, StepRecord] = field(default_factory=dict)
    skip: tuple[Step, ...] = ()
    """The update of these steps is left out."""
    examine: Step | None = None
    """This step is to be looked at closely."""

    def complete(self, step: Step, record: StepRecord, values: Mapping[str, Value]) -> None:
        self.completed, self.update = step, Update.BEFORE
        self.values[step], self.records[step] = values, record
        for old in [s for s in self.values if s <= step - _KEPT]:
            del self.values[old]
            self.records.pop(old, None)

    def go_to(self, step: Step, record: StepRecord, values: Mapping[str, Value]) -> None:
        """The state is that of ``step`` now; anything newer belongs to a timeline that is over."""
        for newer in [s for s in self.values if s > step]:
            del self.values[newer]
            self.records.pop(newer, None)
        self.complete(step, record, values)


def with_record(values: Mapping[str, Value], record: StepRecord | None) -> dict[str, Value]:
    """The report of a step travels as one of its small pieces."""
    if record is None:
        return dict(values)
    return {**values, _RECORD: [record.loss, record.grad_norm, record.skipped, record.details]}


def split_record(values: Mapping[str, Value]) -> tuple[dict[str, Value], StepRecord | None]:
    """Undo ``with_record``."""
    rest = {name: value for name, value in values.items() if name != _RECORD}
    match values.get(_RECORD):
        case [loss, grad_norm, bool(skipped), details]:
            assert loss is None or isinstance(loss, float)
            assert grad_norm is None or isinstance(grad_norm, float)
            return rest, StepRecord(loss, grad_norm, skipped, details)
        case _:
            return rest, None
