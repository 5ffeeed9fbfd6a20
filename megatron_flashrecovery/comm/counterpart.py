"""The counterpart of an operation that a peer has issued: the same operation, on tensors that nobody reads.

A *trace* is what a ledger keeps of an operation, cheap and without its tensors; a *form* is a trace as bytes, for a
report. Collectives have one if their signature says everything that members must pass alike; what it does not say
(layouts that differ between members, several tensors at once) has no counterpart, and its group is severed instead.
Neither has what a rank may act on outside its memory: who leaves a barrier believes that the others have done something
(written their part of a checkpoint), and bytes are somebody's objects.

Tensors are zeros: sums keep what the others gave, and sizes, indices and flags that come of them are in range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
    ReduceOptions,
    ReduceScatterOptions,
)

from megatron_flashrecovery.comm.operation import Call, read_call
from megatron_flashrecovery.core.reports import Match

Trace: TypeAlias = tuple[str, int, torch.dtype, int, str, int, bool]
"""Name, root, dtype, elements of its one input (or of what is received), kind of device, tag, asynchronous."""

_IN_PLACE = frozenset({"allreduce", "reduce", "broadcast"})
_GATHERS = frozenset({"_allgather_base", "all_gather_single"})
_OPTIONS_OF: Mapping[str, Callable[[], Any]] = {
    "allreduce": AllreduceOptions,
    "reduce": ReduceOptions,
    "broadcast": BroadcastOptions,
    "_allgather_base": AllgatherOptions,
    "all_gather_single": AllgatherOptions,
    "_reduce_scatter_base": ReduceScatterOptions,
    "reduce_scatter_single": ReduceScatterOptions,
}


def trace_of(call: Call) -> Trace | None:
    name = call.name
    if name == "send" or name == "recv":
        tensors, tag = call.inputs or call.outputs, call.args[2] if len(call.args) > 2 else call.kwargs.get("tag", 0)
    elif name in _OPTIONS_OF:
        tensors, tag = call.inputs, 0
    else:
        return None
    if len(tensors) != 1 or tensors[0].dtype is torch.uint8:
        return None
    tensor = tensors[0]
    return (name, call.root, tensor.dtype, tensor.numel(), tensor.device.type, tag, call.asynchronous)


def form_of(trace: Trace | None) -> bytes:
    """Empty if there is no counterpart."""
    if trace is None:
        return b""
    name, root, dtype, numel, device, tag, asynchronous = trace
    return msgspec.msgpack.encode((name, root, str(dtype).removeprefix("torch."), numel, device, tag, asynchronous))


def counterpart(match: Match, size: int, peer: int, device: torch.device | None) -> Call:
    """What a member of a group of ``size`` issues; ``peer`` is the other's rank in the group. ``device`` is the one
    that this member has of the kind that the peer's tensors are on, if they are not on the host."""
    form = msgspec.msgpack.decode(match.form, type=tuple[str, int, str, int, str, int, bool])
    name, root, dtype, numel, kind, tag, asynchronous = form
    if match.peer is not None:
        tensor = _zeros(numel, dtype, kind, device)
        return read_call("send" if match.is_send else "recv", ([tensor], peer, tag), {})
    options = _OPTIONS_OF[name]()
    options.asyncOp = asynchronous
    tensor = _zeros(numel, dtype, kind, device)
    if name in _IN_PLACE:
        if name != "allreduce":
            options.rootRank = root
        return read_call(name, ([tensor], options), {})
    outputs = numel * size if name in _GATHERS else numel // size
    return read_call(name, (_zeros(outputs, dtype, kind, device), tensor, options), {})


def device_of(matches: Sequence[Match]) -> str:
    """The kind of device that these matches of one batch are on."""
    return str(msgspec.msgpack.decode(matches[0].form)[4])


def _zeros(numel: int, dtype: str, kind: str, device: torch.device | None) -> torch.Tensor:
    place = device if device is not None and device.type == kind else torch.device(kind)
    return torch.zeros(numel, dtype=getattr(torch, dtype), device=place)
