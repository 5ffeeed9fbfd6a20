"""The losses of mixtures of experts that upstream adds up during forward, until they are logged behind the step.

Upstream: ``megatron/core/transformer/moe/moe_utils.py``, from 0.18 on ``moe_logging.py``. An entry names the groups
that its sum is reduced over, and is made in the first forward pass: a rank without it would not take part there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from megatron_flashrecovery.state.pieces import Value

_MOE = "megatron.core.transformer.moe."


def capture() -> Value:
    """Groups are told by the names that c10d gave them, which are the same in a replacement."""
    entries, _ = _tracker()
    return {name: {key: _told(value) for key, value in _fields(entry).items()} for name, entry in entries.items()}


def restore(captured: Any) -> None:
    entries, made = _tracker()
    entries.clear()
    for name, told in captured.items():
        entries[name] = made({key: _heard(value) for key, value in told.items()})


def _tracker() -> tuple[MutableMapping[str, Any], Callable[[dict[str, Any]], Any]]:
    """The entries, and what makes one of its fields."""
    logging = sys.modules.get(f"{_MOE}moe_logging")
    if logging is not None:
        metrics: MutableMapping[str, Any] = logging.get_moe_metrics_tracker()._metrics
        return metrics, lambda fields: logging.MetricEntry(**fields)
    utils = sys.modules.get(f"{_MOE}moe_utils")
    return ({} if utils is None else utils.get_moe_layer_wise_logging_tracker()), dict


def _fields(entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else vars(entry)


def _told(value: Any) -> Value:
    match value:
        case torch.Tensor():
            return value.clone()
        case dist.ProcessGroup():
            return {"group": str(c10d._world.pg_names[value])}
        case _:
            told: Value = value
            return told


def _heard(value: Any) -> Any:
    match value:
        case torch.Tensor():
            return value.clone()
        case {"group": name}:
            return next(group for group, named in c10d._world.pg_names.items() if str(named) == name)
        case _:
            return value
