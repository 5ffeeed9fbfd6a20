"""Of what a worker has died: the class of its fault, what it did last, and who ended it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.ids import WorkerId
from megatron_flashrecovery.core.policy import SUSPECTS_A_DEVICE, Fault
from megatron_flashrecovery.detect.out_of_memory import OutOfMemory
from megatron_flashrecovery.runtime.device_watch import DeviceWatch
from megatron_flashrecovery.runtime.node_messages import DeathNoted, LastWords
from megatron_flashrecovery.runtime.watch import Watch, in_words
from megatron_flashrecovery.runtime.workers import Worker, WorkerEnded

_SAID_BY_THE_CAUSE = frozenset({Fault.PROCESS_ENDED, Fault.EXCEPTION, Fault.OUT_OF_MEMORY})
"""All others are named by the word that ``flashrecovery policy`` has for them: an exit code says nothing of them."""


@dataclass(frozen=True)
class Finding:
    """``notes`` are for the record."""

    loss: core.Loss
    notes: tuple[DeathNoted, LastWords]


class Inquest:
    def __init__(self, watch: Watch, out_of_memory: OutOfMemory, devices: DeviceWatch) -> None:
        self._watch = watch
        self._out_of_memory = out_of_memory
        self._devices = devices
        self._fenced: dict[WorkerId, tuple[str, Fault]] = {}
        self._announced: dict[WorkerId, float] = {}

    def note_fenced(self, workers: Iterable[Worker], reason: str, fault: Fault) -> None:
        """They are about to be ended by order."""
        self._fenced.update({worker.id: (reason, fault) for worker in workers})

    def note_announced(self, worker: WorkerId, at: float) -> None:
        """It has said that it is about to do to itself what it was told to; Unix time."""
        self._announced[worker] = at

    def was_fenced(self, worker: WorkerId) -> bool:
        return worker in self._fenced

    def hold(self, end: WorkerEnded) -> Finding:
        """Once for each: what was known of the worker is forgotten with it."""
        worker = end.worker
        assert worker.seat is not None
        rank = worker.seat.rank
        announced = self._announced.pop(worker.id, None)
        death = DeathNoted(rank, worker.pid or 0, time.time(), announced)
        words = self._watch.last_words(rank, worker.id)
        is_fenced = worker.id in self._fenced
        cause, fault = self._fenced.pop(worker.id) if is_fenced else self._cause(end, words)
        if words.fault in SUSPECTS_A_DEVICE:
            fault = words.fault  # whatever it was ended for in the end
        fault = self._devices.fault_of(worker.id, fault)
        if not is_fenced and fault not in _SAID_BY_THE_CAUSE:
            cause = f"{fault.value}: {cause}"
        loss = core.Loss(rank, worker.id, cause, worker.seat.epoch, words.step, words.raised, fault)
        return Finding(loss, (death, words))

    def _cause(self, end: WorkerEnded, words: LastWords) -> tuple[str, Fault]:
        if end.status == signal.SIGKILL and self._out_of_memory.has_struck():
            what = f"{end.cause}, for want of memory" if end.server_ended else "killed by the out-of-memory killer"
            return what + in_words(words), Fault.OUT_OF_MEMORY
        return end.cause + in_words(words), words.fault
