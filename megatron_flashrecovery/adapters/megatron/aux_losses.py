"""The losses beside the main one that upstream adds up during forward, until they are logged behind the step.

Upstream: of experts in ``megatron/core/transformer/moe/moe_utils.py``, from 0.18 on ``moe_logging.py``; of tokens ahead
in ``megatron/core/transformer/multi_token_prediction.py``; of the indexer of sparse attention, from 0.16 on, in
``megatron/core/transformer/experimental_attention_variant/dsa.py``. All name the groups that their sums are reduced
over, and are made in the first forward pass: a rank without them would not take part there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from megatron_flashrecovery.state.pieces import Value

_MOE = "megatron.core.transformer.moe."
_HELPERS = {
    "tokens": ("megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper"),
    "indexer": ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossLoggingHelper"),
}
"""Module and class: each has one dictionary of sums, and of the groups that they are reduced over."""

NOTHING: Value = {"experts": {}, **{name: {} for name in _HELPERS}}
"""Before the first forward pass."""


def capture() -> Value:
    """Groups are told by the names that c10d gave them, which are the same in a replacement."""
    entries, _ = _tracker()
    return {
        "experts": {name: _all_told(_fields(entry)) for name, entry in entries.items()},
        **{name: _all_told(_tracker_of(name)) for name in _HELPERS},
    }


def restore(captured: Any) -> None:
    entries, made = _tracker()
    entries.clear()
    for name, told in captured["experts"].items():
        entries[name] = made(_all_heard(told))
    for name in _HELPERS:
        sums = _tracker_of(name)
        sums.clear()
        sums.update(_all_heard(captured[name]))


def _tracker() -> tuple[MutableMapping[str, Any], Callable[[dict[str, Any]], Any]]:
    """The entries, and what makes one of its fields."""
    logging = sys.modules.get(f"{_MOE}moe_logging")
    if logging is not None:
        metrics: MutableMapping[str, Any] = logging.get_moe_metrics_tracker()._metrics
        return metrics, lambda fields: logging.MetricEntry(**fields)
    utils = sys.modules.get(f"{_MOE}moe_utils")
    return ({} if utils is None else utils.get_moe_layer_wise_logging_tracker()), dict


def _tracker_of(name: str) -> MutableMapping[str, Any]:
    module, helper = _HELPERS[name]
    loaded = sys.modules.get(module)
    tracker: MutableMapping[str, Any] = {} if loaded is None else getattr(loaded, helper).tracker
    return tracker


def _fields(entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else vars(entry)


def _all_told(fields: Mapping[str, Any]) -> Value:
    return {key: _told(value) for key, value in fields.items()}


def _all_heard(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _heard(value) for key, value in told.items()}


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
