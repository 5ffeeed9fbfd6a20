"""Faults that a rank inflicts on itself at a marked moment, because it was told to."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.detect.out_of_memory import headroom, why_no_limit
from megatron_flashrecovery.runtime.broken_device import break_device
from megatron_flashrecovery.runtime.dialogue import InjectionFired, InjectionOrder
from megatron_flashrecovery.runtime.injection import OF_TENSORS, Fault, is_always, option
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.runtime.tensor_faults import damage

_CHUNK_NBYTES = 16 << 20


class Injector:
    """The agent is told first, so that a replacement does not do it again and the journal knows the time of death; and
    before it by ``note_fired`` whoever replaces it on another node. ``add`` is any thread's."""

    def __init__(
        self,
        orders: Sequence[InjectionOrder],
        channel: Channel,
        cut_a_connection: Callable[[], None] = lambda: None,
        note_fired: Callable[[InjectionOrder], None] = lambda _: None,
    ) -> None:
        self._orders = list(orders)
        self._channel = channel
        self._cut_a_connection = cut_a_connection
        self._note_fired = note_fired
        self._slowness: Slowness | None = None

    def add(self, order: InjectionOrder) -> None:
        self._orders.append(order)

    def pending(self, moment: Moment, step: Step) -> InjectionOrder | None:
        """Mirrors are another thread's: an order without a moment is none of theirs."""
        for order in self._orders.copy():
            is_now = order.at == moment.value if order.at is not None else moment is not Moment.MIRROR
            if is_now and order.step in (None, step):
                return order
        return None

    def mark(self, moment: Moment, step: Step, tensor: torch.Tensor | None = None) -> None:
        """``step`` is being computed, or for MIRROR and BETWEEN has just been completed. ``tensor`` is what it computes
        with at this moment, for faults that are done to one."""
        if self._slowness is not None:
            self._slowness.linger(moment, step)
        if self._orders and (order := self.pending(moment, step)) is not None:
            if Fault(order.kind) in OF_TENSORS and tensor is None:
                return
            self.fire(order, step, tensor)

    def fire(self, order: InjectionOrder, step: Step, tensor: torch.Tensor | None = None) -> None:
        if not is_always(order.options):
            self._orders.remove(order)
        self._announce(order)
        match fault := Fault(order.kind):
            case Fault.SLOW:
                self._slowness = Slowness.of(order, step)
            case Fault.NETWORK:
                self._cut_a_connection()
            case Fault.DEVICE:
                break_device()
            case _ if tensor is not None and fault in OF_TENSORS:
                damage(fault, tensor)
            case _:
                inflict(order, lambda: self._announce(order))

    def _announce(self, order: InjectionOrder) -> None:
        self._note_fired(order)
        self._channel.send(InjectionFired(order.index, time.time()))


class Slowness:
    """Of the main thread, until ``last`` is completed. What it waits for others takes as long as before."""

    def __init__(self, factor: float, seconds: float, last: Step) -> None:
        self._factor = factor
        self._seconds = seconds
        self._last = last
        self._computed = time.thread_time()

    @classmethod
    def of(cls, order: InjectionOrder, step: Step) -> Slowness:
        factor, seconds, steps = (option(Fault.SLOW, order.options, name) for name in ("factor", "seconds", "steps"))
        return cls(float(factor), float(seconds), Step(step + int(steps) - 1))

    def linger(self, moment: Moment, step: Step) -> None:
        """By the processor time since the last moment; on a GPU only ``seconds`` makes a difference."""
        computed, self._computed = time.thread_time() - self._computed, time.thread_time()
        if step <= self._last:
            time.sleep(computed * (self._factor - 1) + (self._seconds if moment is Moment.FORWARD else 0.0))


class InjectedError(RuntimeError):
    """Of a script that was told to have a bug."""


def inflict(order: InjectionOrder, announce: Callable[[], None]) -> None:
    """On this process, by the thread that calls; ``announce`` again right before what takes a while to come."""
    match fault := Fault(order.kind):
        case Fault.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.SIGNAL:
            os.kill(os.getpid(), signal.Signals[order.options["signal"]])
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
            _raise(option(fault, order.options, "how"))
        case Fault.EXIT:
            sys.exit(1)
        case Fault.OOM:
            _take_all_memory(announce)
        case Fault.HANG_COLLECTIVE:
            dist.barrier()
        case Fault.AGENT | Fault.DROP_HEARTBEATS | Fault.SLOW:
            pass  # the agent has heard of it; who is slow goes on
        case Fault.NAN | Fault.SPIKE | Fault.BITFLIP:
            raise AssertionError(f"{fault} is done to a tensor")


def _raise(how: str) -> None:
    match how:
        case "async":
            thread, error = threading.main_thread().ident, ctypes.py_object(InjectedError)
            raising = ctypes.pythonapi.PyThreadState_SetAsyncExc
            other = threading.Thread(target=lambda: raising(ctypes.c_ulong(thread or 0), error))
            other.start()
            other.join()
        case "signal":
            signal.signal(signal.SIGUSR1, _raise_in_handler)
            os.kill(os.getpid(), signal.SIGUSR1)
        case _:
            raise InjectedError("an exception that --inject asked for")


def _raise_in_handler(_number: int, _frame: FrameType | None) -> None:
    raise InjectedError("an exception in a signal handler that --inject asked for")


def _take_all_memory(announce: Callable[[], None]) -> None:
    """Until the limit of the control group is reached; nobody else in it is chosen."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    taken = []
    while (why := why_no_limit()) is None:
        if headroom() < 2 * _CHUNK_NBYTES:
            announce()
        taken.append(bytearray(_CHUNK_NBYTES))  # zeroed, and so really taken
    print(f"flashrecovery: the fault oom is given up: {why}", file=sys.stderr, flush=True)
