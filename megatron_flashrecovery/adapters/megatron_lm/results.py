"""What Megatron-LM's ``train_step`` returns, as a step's record that can be mirrored, and back.

Upstream's tuple begins with the losses by name (on the last pipeline stage), and whether the update was skipped; the
gradient norm is its sixth entry in every supported version.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.state.pieces import Value

_LOSSES, _SKIPPED, _NORM = 0, 1, 5


def to_record(result: tuple[Any, ...], reports: bool) -> StepRecord:
    losses, norm = result[_LOSSES], _number(result[_NORM])
    loss = next((_number(value) for value in losses.values()), None) if reports else None
    kept: dict[str, Value] = {name: _kept(value) for name, value in losses.items()}
    details: dict[str, Value] = {"losses": kept, "rest": list(map(_kept, result[1:]))}
    return StepRecord(loss, norm, bool(result[_SKIPPED]), details)


def from_record(record: StepRecord) -> tuple[Any, ...]:
    details = record.details
    assert isinstance(details, dict), record
    losses, rest = details["losses"], details["rest"]
    assert isinstance(losses, dict)
    assert isinstance(rest, list)
    return ({name: _on_device(value) for name, value in losses.items()}, *map(_on_device, rest))


def _number(value: Any) -> float | None:
    if value is None:
        return None
    return float(value.item() if isinstance(value, torch.Tensor) else value)


def _kept(value: Any) -> Value:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _on_device(value: Any) -> Any:
    """A replacement gets the record from memory of the host."""
    if isinstance(value, torch.Tensor) and torch.cuda.is_available() and not value.is_cuda:
        return value.cuda()
    return value
