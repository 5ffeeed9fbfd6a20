"""An operation of a process group as the handle sees it: what it reads and writes, with whom, and what a retry does.

Every name of the installed ``dist.ProcessGroup`` is classified in ``KIND_OF``; a test fails when torch brings a
name that is not, so that no operation can pass the handle uncounted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

SMALL_NBYTES = 256
"""Reductions up to this size are host-synchronous and told to peers: norms, overflow flags, loss sums, token counts."""


class Kind(Enum):
    """How the handle treats a name of ``dist.ProcessGroup``."""

    COLLECTIVE = "collective"
    POINT_TO_POINT = "point_to_point"
    COALESCING = "coalescing"
    QUERY = "query"
    """Answered by the communicator as it is now."""
    OWN = "own"
    """The handle's own, the same for every communicator that it will ever have."""
    REFUSED = "refused"
    """Would tie other groups to a communicator that may be replaced."""


class Call:
    """One call of one operation. Not frozen: it is built for every call, and a frozen one costs 2 us more."""

    __slots__ = ("args", "inputs", "kwargs", "name", "outputs", "peer", "root", "signature", "small")

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.inputs: Sequence[torch.Tensor] = ()
        self.outputs: Sequence[torch.Tensor] = ()
        self.root = -1
        self.peer = -1
        self.signature: tuple[Any, ...] = (name,)
        self.small = False

    @property
    def asynchronous(self) -> bool:
        return bool(getattr(self._options, "asyncOp", False))

    @property
    def reduce_op(self) -> object:
        found = getattr(self._options, "reduceOp", None)
        return found if found is not None else self.kwargs.get("op", dist.ReduceOp.SUM)

    @property
    def _options(self) -> object:
        return self.kwargs.get("opts", self.args[-1] if self.args else None)

    @property
    def sends(self) -> bool:
        return self.name == "send"

    def issue(self, group: dist.ProcessGroup) -> dist.Work | None:
        work: dist.Work | None = getattr(group, self.name)(*self.args, **self.kwargs)
        return work

    def why_not_again(self) -> str | None:
        """Why a failed attempt may have spoilt the inputs, or ``None`` if the call can simply be issued again."""
        if self.name in _REDUCES_IN_PLACE:
            return "it reduces in place, and no copy is kept of inputs this large"
        if self.name in _READS_WHOLE_INPUT and _overlap(self.inputs, self.outputs):
            return "its output overlaps its input"
        return None


Reader: TypeAlias = Callable[[Call], None]


def read_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Look into the arguments of ``ProcessGroup.<name>``, in any of its overloads."""
    call = Call(name, args, kwargs)
    _READER_OF[name](call)
    return call


def _overlap(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage().data_ptr() for tensor in some if tensor.numel()}
    return any(tensor.untyped_storage().data_ptr() in storages for tensor in others if tensor.numel())


def _argument(call: Call, index: int, *names: str) -> object:
    if index < len(call.args):
        return call.args[index]
    return next((call.kwargs[name] for name in names if name in call.kwargs), None)


def _flat(value: object) -> list[torch.Tensor]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [value]
    assert isinstance(value, Sequence), f"no tensor and no list of them: {type(value)}"
    if len(value) == 1 and isinstance(value[0], torch.Tensor):
        return list(value)
    return [tensor for item in value for tensor in ([item] if isinstance(item, torch.Tensor) else item)]


def _root(call: Call, index: int) -> int:
    """Options carry ``rootRank``; the convenience overloads carry the root as an integer."""
    value = _argument(call, index, "opts", "root")
    return value if isinstance(value, int) else int(getattr(value, "rootRank", 0))


def _rank(call: Call, name: str) -> int:
    rank = _argument(call, 1, name)
    assert isinstance(rank, int), f"{call.name} without {name}"
    return rank


def _sign(call: Call, tensors: Sequence[torch.Tensor], sized: bool) -> None:
    # Sizes only where every member must pass the same; numel, not shape, because [4] and [2, 2] do match.
    if len(tensors) == 1:
        tensor = tensors[0]
        call.signature = (call.name, call.root, tensor.dtype, tensor.numel() if sized else -1)
    else:
        call.signature = (call.name, call.root, *((t.dtype, t.numel() if sized else -1) for t in tensors))


def _nbytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reduce_in_place(call: Call) -> None:
    tensors = _flat(_argument(call, 0, "tensors", "tensor"))
    if call.name == "reduce":
        call.root = _root(call, 1)
    call.inputs = call.outputs = tensors
    call.small = _nbytes(tensors) <= SMALL_NBYTES
    _sign(call, tensors, sized=True)


def _broadcast(call: Call) -> None:
    call.root = _root(call, 1)
    call.inputs = call.outputs = _flat(_argument(call, 0, "tensors", "tensor"))
    _sign(call, call.outputs, sized=True)


def _out_in(sized: bool, small: bool = False) -> Reader:
    def read(call: Call) -> None:
        call.outputs = _flat(
            _argument(call, 0, "output", "outputs", "outputTensor", "output_tensors", "output_tensor", "output_lists")
        )
        call.inputs = _flat(
            _argument(call, 1, "input", "inputs", "inputTensor", "input_tensors", "input_tensor", "input_list")
        )
        call.small = small and _nbytes(call.inputs) <= SMALL_NBYTES
        _sign(call, call.inputs[:1] if not sized else call.inputs, sized)

    return read


def _rooted(sample: str) -> Reader:
    def read(call: Call) -> None:
        call.root = _root(call, 2)
        call.outputs = _flat(_argument(call, 0, "output_tensors", "output_tensor"))
        call.inputs = _flat(_argument(call, 1, "input_tensors", "input_tensor"))
        _sign(call, (call.inputs if sample == "inputs" else call.outputs)[:1], sized=False)

    return read


def _send(call: Call) -> None:
    call.inputs = _flat(call.args[0])
    call.peer = _rank(call, "dstRank")


def _receive(call: Call) -> None:
    call.outputs = _flat(call.args[0])
    call.peer = _rank(call, "srcRank")


def _receive_any(call: Call) -> None:
    call.outputs = _flat(call.args[0])


def _nothing(call: Call) -> None:
    pass


_READER_OF: dict[str, Reader] = {
    "allreduce": _reduce_in_place,
    "allreduce_coalesced": _reduce_in_place,
    "reduce": _reduce_in_place,
    "broadcast": _broadcast,
    "allgather": _out_in(sized=False),
    "allgather_coalesced": _out_in(sized=False),
    "all_gather_single": _out_in(sized=True),
    "_allgather_base": _out_in(sized=True),
    "all_gather_single_coalesced": _out_in(sized=True),
    "allgather_into_tensor_coalesced": _out_in(sized=True),
    "gather": _rooted("inputs"),
    "scatter": _rooted("outputs"),
    "reduce_scatter": _out_in(sized=False, small=True),
    "reduce_scatter_single": _out_in(sized=True, small=True),
    "_reduce_scatter_base": _out_in(sized=True, small=True),
    "reduce_scatter_single_coalesced": _out_in(sized=True, small=True),
    "reduce_scatter_tensor_coalesced": _out_in(sized=True, small=True),
    "all_to_all_single": _out_in(sized=False),
    "alltoall_base": _out_in(sized=False),
    "alltoall": _out_in(sized=False),
    "barrier": _nothing,
    "monitored_barrier": _nothing,
    "send": _send,
    "recv": _receive,
    "recv_anysource": _receive_any,
}

_REDUCES_IN_PLACE = frozenset({"allreduce", "allreduce_coalesced", "reduce"})
_READS_WHOLE_INPUT = frozenset(
    name for name in _READER_OF if name.startswith(("reduce_scatter", "_reduce_scatter", "all_to_all", "alltoall"))
) | {"scatter"}

POINT_TO_POINT = frozenset({"send", "recv", "recv_anysource"})
COLLECTIVES = frozenset(_READER_OF) - POINT_TO_POINT
COALESCING = frozenset({"_start_coalescing", "_end_coalescing"})
QUERIES = frozenset(
    {
        "_backend_id",
        "_get_backend",
        "_has_hooks",
        "_wait_for_pending_works",
        "_get_sequence_number_for_group",
        "_set_sequence_number_for_group",
        "_enable_collectives_timing",
        "_register_on_completion_hook",
        "set_timeout",
        "get_group_store",
    }
)
OWN = frozenset(
    {
        "BackendType",
        *("CUSTOM", "GLOO", "MPI", "NCCL", "UCC", "UNDEFINED", "XCCL"),
        "_device_types",
        "_get_backend_name",
        "_id",
        "_pybind11_conduit_v1_",
        "_register_backend",
        "_set_default_backend",
        "_set_group_desc",
        "_set_group_name",
        "abort",
        "bound_device_id",
        "boxed",
        "group_desc",
        "group_name",
        "name",
        "rank",
        "shutdown",
        "size",
        "unbox",
        "use_pg_for_symm_mem_rendezvous",
    }
)
REFUSED = frozenset({"split_group", "merge_remote_group"})

KIND_OF: dict[str, Kind] = {
    name: kind
    for kind, names in (
        (Kind.COLLECTIVE, COLLECTIVES),
        (Kind.POINT_TO_POINT, POINT_TO_POINT),
        (Kind.COALESCING, COALESCING),
        (Kind.QUERY, QUERIES),
        (Kind.OWN, OWN),
        (Kind.REFUSED, REFUSED),
    )
    for name in names
}


def unclassified(process_group: type) -> list[str]:
    """Names of this torch's ``ProcessGroup`` that nobody has decided about yet."""
    return sorted(name for name in dir(process_group) if not name.startswith("__") and name not in KIND_OF)
