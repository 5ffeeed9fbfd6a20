"""Small operations of a job-sized group, through a binary tree: at most three links a member, however large the job.

If such a group's communicator were rebuilt flat, every recovery would cost O(job). A replaced member only makes its own
links again. Each member adds its own value, then its left subtree's, then its right one's, so the order of summation is
given by the positions in the group alone, and disturbed and undisturbed runs agree bit for bit. It is not gloo's or
NCCL's order: against the plain framework, floating-point sums over more than ``tree_above`` ranks may differ in the
last bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_flashrecovery.comm.operation import Call
from megatron_flashrecovery.comm.tensor_bytes import fill, payload_of
from megatron_flashrecovery.comm.tree_link import Kind
from megatron_flashrecovery.comm.tree_links import TreeLinks, children_of, parent_of

LARGEST_NBYTES = 64 * 1024
"""Per member; larger ones go to a flat communicator, which is built when the first of them comes."""
LARGEST_GATHERED_NBYTES = 16 * 1024 * 1024
"""In all, because everything that is gathered passes through one member."""

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_COMBINE: tuple[tuple[dist.ReduceOp.RedOpType, Combine], ...] = (
    (dist.ReduceOp.SUM, torch.add),
    (dist.ReduceOp.AVG, torch.add),
    (dist.ReduceOp.PRODUCT, torch.mul),
    (dist.ReduceOp.MIN, torch.minimum),
    (dist.ReduceOp.MAX, torch.maximum),
    (dist.ReduceOp.BAND, torch.bitwise_and),
    (dist.ReduceOp.BOR, torch.bitwise_or),
    (dist.ReduceOp.BXOR, torch.bitwise_xor),
)
_REDUCTIONS = frozenset({"allreduce", "allreduce_coalesced", "reduce"})
_GATHERS = frozenset({"allgather", "all_gather_single", "_allgather_base", "gather"})


class Tree:
    """The carrier of a group's small operations, with the face that a communicator shows to works."""

    host_synchronous = True
    closed = False

    def __init__(self, member: int, size: int, timeout: timedelta) -> None:
        self._member = member
        self._size = size
        self._timeout = timeout.total_seconds()
        self._order = preorder(0, size)
        self._number = 0
        self.links = TreeLinks(member, size, self._timeout)

    # --- as a carrier of operations ---

    @property
    def severed(self) -> str | None:
        return self.links.wake.reason

    @property
    def default(self) -> Tree:
        return self

    def transport(self, tensors: Sequence[torch.Tensor]) -> Tree:
        return self

    def mark(self) -> None:
        """Operations are over when they have been issued."""

    def wait(self, work: object, timeout: timedelta | None) -> None:
        """Operations are over when they have been issued."""

    def finish(self, work: object) -> None:
        """Operations are over when they have been issued."""

    def succeeded(self, work: object) -> bool:
        """Those that do not have raised when they were issued."""
        return True

    def settle(self) -> None:
        """Severing is done when ``sever`` returns."""

    def sever(self, reason: str) -> None:
        """From any thread: whoever is inside raises. The links stay."""
        self.links.wake.ring(reason)

    def rearm(self) -> None:
        self.links.wake.clear()

    def relink(self, store: Store, epoch: int) -> None:
        self.links.relink(store, epoch)
        self._number = 0

    def close(self) -> None:
        self.links.close()

    def carries(self, call: Call) -> bool:
        """The same answer on every member: it depends on what all of them pass alike."""
        if call.name == "barrier":
            return not call.asynchronous
        if call.asynchronous or call.name not in _REDUCTIONS | _GATHERS | {"broadcast"}:
            return False
        if call.name in _REDUCTIONS and _combine_of(call) is None:
            return False
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in call.inputs)
        if call.name in _GATHERS and nbytes * self._size > LARGEST_GATHERED_NBYTES:
            return False
        return nbytes <= LARGEST_NBYTES

    def issue(self, calls: Sequence[Call], device: torch.device | None) -> Sequence[None]:
        """Run it to its end: small operations are host-synchronous here."""
        (call,) = calls
        self._number += 1
        deadline = time.monotonic() + self._timeout
        if call.name == "barrier":
            self._down(self._up_bytes(deadline), deadline)
        elif call.name in _REDUCTIONS:
            for tensor in call.outputs:
                self._reduce(call, tensor, deadline)
        elif call.name == "broadcast":
            for tensor in call.outputs:
                fill(tensor, self._broadcast(payload_of(tensor), call.root, deadline))
        else:
            self._gather(call, deadline)
        return ()

    # --- the operations ---

    def _reduce(self, call: Call, tensor: torch.Tensor, deadline: float) -> None:
        combine = _combine_of(call)
        assert combine is not None, "carries was asked first"
        value = tensor.detach().to("cpu", copy=True)
        for child in self.links.children:
            value = combine(value, _tensor(self._receive(child, deadline), value))
        if self.links.parent is not None:
            self._send(self.links.parent, payload_of(value), deadline)
        elif call.reduce_op == dist.ReduceOp.AVG:
            value = torch.div(value, self._size) if value.is_floating_point() else value // self._size
        payload = payload_of(value)
        payload = self._down(payload, deadline) if call.name != "reduce" else self._to(call.root, payload, deadline)
        if call.name != "reduce" or self._member == call.root:
            fill(tensor, payload)

    def _broadcast(self, payload: bytes, root: int, deadline: float) -> bytes:
        """Up from the root of the operation to that of the tree, then down to everybody."""
        way = ancestors(root)
        if self._member in way:
            if self._member != root:
                payload = self._receive(way[way.index(self._member) - 1], deadline)
            if self.links.parent is not None:
                self._send(self.links.parent, payload, deadline)
        return self._down(payload, deadline)

    def _gather(self, call: Call, deadline: float) -> None:
        own = b"".join(payload_of(tensor) for tensor in call.inputs)
        parts = [own, *(self._receive(child, deadline) for child in self.links.children)]
        together = b"".join(parts)
        if self.links.parent is not None:
            self._send(self.links.parent, together, deadline)
        if call.name == "gather":
            together = self._to(call.root, together, deadline)
            if self._member != call.root:
                return
        else:
            together = self._down(together, deadline)
        pieces = {member: together[i * len(own) : (i + 1) * len(own)] for i, member in enumerate(self._order)}
        in_order = [pieces[member] for member in range(self._size)]
        if len(call.outputs) == 1 and self._size > 1:
            fill(call.outputs[0], b"".join(in_order))
        else:
            for tensor, piece in zip(call.outputs, in_order, strict=True):
                fill(tensor, piece)

    def _up_bytes(self, deadline: float) -> bytes:
        for child in self.links.children:
            self._receive(child, deadline)
        if self.links.parent is not None:
            self._send(self.links.parent, b"", deadline)
        return b""

    def _down(self, payload: bytes, deadline: float) -> bytes:
        if self.links.parent is not None:
            payload = self._receive(self.links.parent, deadline)
        for child in self.links.children:
            self._send(child, payload, deadline)
        return payload

    def _to(self, root: int, payload: bytes, deadline: float) -> bytes:
        """From the root of the tree down to the one member that wants it."""
        way = ancestors(root)
        if self._member in way:
            if self.links.parent is not None:
                payload = self._receive(self.links.parent, deadline)
            if self._member != root:
                self._send(way[way.index(self._member) - 1], payload, deadline)
        return payload

    def _send(self, neighbour: int, payload: bytes, deadline: float) -> None:
        self.links[neighbour].send(Kind.DATA, self._number, payload, deadline)

    def _receive(self, neighbour: int, deadline: float) -> bytes:
        return self.links[neighbour].data(self._number, deadline)


def ancestors(member: int) -> list[int]:
    """The member itself first, the root of the tree last."""
    way = [member]
    while way[-1]:
        way.append(parent_of(way[-1]))
    return way


def preorder(member: int, size: int) -> list[int]:
    """The order in which gathered values arrive at the root: each member before its left and its right subtree."""
    order, ahead = [], [member]
    while ahead:
        order.append(ahead.pop())
        ahead += reversed(children_of(order[-1], size))
    return order


def _combine_of(call: Call) -> Combine | None:
    return next((combine for op, combine in _COMBINE if call.reduce_op == op), None)


def _tensor(payload: bytes, like: torch.Tensor) -> torch.Tensor:
    value = torch.empty_like(like)
    fill(value, payload)
    return value
