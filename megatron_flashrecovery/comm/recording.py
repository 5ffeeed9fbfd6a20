"""Records the collectives of one group while a rank starts, and answers them to the rank's replacement."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

import torch

from megatron_flashrecovery.comm.operation import Call
from megatron_flashrecovery.comm.startup_record import LARGEST_ANSWER_NBYTES, Answer, Described, StartupMismatch
from megatron_flashrecovery.comm.tensor_bytes import fill, payload_of
from megatron_flashrecovery.core.ids import GroupKey, Rank

_INTERNAL = ("torch", "megatron_flashrecovery.comm", "contextlib")


class Slot:
    """An operation keeps its place in the order of issue, however late it completes."""

    __slots__ = ("answer", "outputs")

    def __init__(self, answer: Answer, outputs: Sequence[torch.Tensor]) -> None:
        self.answer = answer
        self.outputs: Sequence[torch.Tensor] | None = outputs


class Recorder:
    """One per group, while its rank starts."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []

    def issued(self, call: Call) -> Slot:
        slot = Slot(_ask(call), call.outputs)
        self._slots.append(slot)
        return slot

    def completed(self, slot: Slot, source: int = -1) -> None:
        if slot.outputs is not None:
            slot.answer = _with_payloads(slot.answer, slot.outputs, source)
            slot.outputs = None

    def answers(self) -> tuple[Answer, ...]:
        return tuple(slot.answer for slot in self._slots)


class Replay:
    """Answers in the recorded order; the first call that is not the recorded one ends the replacement."""

    def __init__(self, rank: Rank, key: GroupKey, answers: Sequence[Answer]) -> None:
        self._rank = rank
        self._key = key
        self._answers = answers
        self._next = 0

    def answer(self, call: Call) -> int:
        """Fill the outputs; returns the rank of the sender for a receive from anybody, else -1."""
        here = _ask(call)
        if self._next == len(self._answers):
            raise StartupMismatch(
                f"rank {self._rank}, group {self._key}: replacement issues operation {self._next + 1}, "
                f"{here.describe()}; the record of the start ends after {self._next} operations"
            )
        recorded = self._answers[self._next]
        if recorded.asked() != here.asked():
            raise StartupMismatch(
                f"rank {self._rank}, group {self._key}, operation {self._next + 1}: recorded {recorded.describe()}; "
                f"replacement issues {here.describe()}"
            )
        self._next += 1
        for tensor, payload in zip(call.outputs, recorded.payloads, strict=False):
            if payload is not None:
                fill(tensor, payload)
        return recorded.source


def _ask(call: Call) -> Answer:
    root = call.peer if call.peer >= 0 else call.root
    return Answer(call.name, root, _describe(call.inputs), _describe(call.outputs), (), _call_site())


def _with_payloads(answer: Answer, outputs: Sequence[torch.Tensor], source: int) -> Answer:
    payloads = tuple(
        payload_of(tensor) if tensor.numel() * tensor.element_size() <= LARGEST_ANSWER_NBYTES else None
        for tensor in outputs
    )
    return Answer(answer.operation, answer.root, answer.inputs, answer.outputs, payloads, answer.call_site, source)


def _describe(tensors: Sequence[torch.Tensor]) -> tuple[Described, ...]:
    return tuple((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors)


def _call_site() -> str:
    """The innermost frame that is neither torch's nor ours; without the directory, which differs between nodes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not str(frame.f_globals.get("__name__", "")).startswith(_INTERNAL):
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
