"""Faults that a rank inflicts on itself at a marked moment, because ``--inject`` said so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.runtime.dialogue import InjectionFired, InjectionOrder
from megatron_flashrecovery.runtime.launch_config import OF_TENSORS, Fault, Injection
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.runtime.tensor_faults import damage


class Injector:
    """The agent is told first, so that a replacement does not do it again and the journal knows the time of death."""

    def __init__(self, orders: Sequence[InjectionOrder], channel: Channel) -> None:
        self._orders = list(orders)
        self._channel = channel

    def pending(self, moment: Moment, step: Step) -> InjectionOrder | None:
        for order in self._orders:
            if (order.at, order.step) == (moment.value, step):
                return order
        return None

    def mark(self, moment: Moment, step: Step, tensor: torch.Tensor | None = None) -> None:
        """``step`` is being computed, or for MIRROR and BETWEEN has just been completed. ``tensor`` is what it computes
        with at this moment, for faults that are done to one."""
        if self._orders and (order := self.pending(moment, step)) is not None:
            if Fault(order.kind) in OF_TENSORS and tensor is None:
                return
            self.fire(order, tensor)

    def fire(self, order: InjectionOrder, tensor: torch.Tensor | None = None) -> None:
        if not order.always:
            self._orders.remove(order)
        self._channel.send(InjectionFired(order.index, time.time()))
        if tensor is not None and Fault(order.kind) in OF_TENSORS:
            damage(Fault(order.kind), tensor)
        else:
            inflict(Fault(order.kind))


class InjectedError(RuntimeError):
    """Of a script that was told to have a bug."""


def inflict(fault: Fault) -> None:
    """On this process, by the thread that calls."""
    match fault:
        case Fault.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Fault.LOOP:
            while True:
                pass
        case Fault.GIL:
            while True:  # a signal, such as the one that asks for stacks, ends the sleep
                ctypes.PyDLL(None).sleep(3600)
        case Fault.SEGV:
            ctypes.string_at(0)
        case Fault.ABORT:
            os.abort()
        case Fault.EXCEPTION:
            raise InjectedError("an exception that --inject asked for")
        case Fault.EXIT:
            sys.exit(1)
        case Fault.NAN | Fault.SPIKE | Fault.BITFLIP:
            raise AssertionError(f"{fault} is done to a tensor")


def injection_orders(
    injections: Sequence[Injection], rank: Rank, fired: AbstractSet[int]
) -> tuple[InjectionOrder, ...]:
    """Those of this rank that have not fired. Of several for the same moment a worker does only the first: the next one
    is for its replacement."""
    return tuple(
        InjectionOrder(index, injection.fault.value, injection.step, injection.at.value, injection.always)
        for index, injection in enumerate(injections)
        if injection.rank == rank and (injection.always or index not in fired)
    )
