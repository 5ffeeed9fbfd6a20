"""Faults that a rank inflicts on itself at a marked moment, because ``--inject`` said so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.runtime.broken_device import break_device
from megatron_flashrecovery.runtime.dialogue import InjectionFired, InjectionOrder
from megatron_flashrecovery.runtime.launch_config import Fault, Injection
from megatron_flashrecovery.runtime.moment import Moment


class Injector:
    """The agent is told first, so that a replacement does not do it again and the journal knows the time of death."""

    def __init__(
        self, orders: Sequence[InjectionOrder], channel: Channel, cut_a_connection: Callable[[], None] = lambda: None
    ) -> None:
        self._orders = list(orders)
        self._channel = channel
        self._cut_a_connection = cut_a_connection

    def pending(self, moment: Moment, step: Step) -> InjectionOrder | None:
        for order in self._orders:
            if (order.at, order.step) == (moment.value, step):
                return order
        return None

    def mark(self, moment: Moment, step: Step) -> None:
        """``step`` is being computed, or for MIRROR and BETWEEN has just been completed."""
        if self._orders and (order := self.pending(moment, step)) is not None:
            self.fire(order)

    def fire(self, order: InjectionOrder) -> None:
        self._orders.remove(order)
        self._channel.send(InjectionFired(order.index, time.time()))
        fault = Fault(order.kind)
        if fault is Fault.NETWORK:
            self._cut_a_connection()
        elif fault is Fault.DEVICE:
            break_device()
        else:
            inflict(fault)


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


def injection_orders(
    injections: Sequence[Injection], rank: Rank, fired: AbstractSet[int]
) -> tuple[InjectionOrder, ...]:
    """Those of this rank that have not fired. Of several for the same moment a worker does only the first: the next one
    is for its replacement."""
    return tuple(
        InjectionOrder(index, injection.fault.value, injection.step, injection.at.value)
        for index, injection in enumerate(injections)
        if injection.rank == rank and index not in fired
    )
