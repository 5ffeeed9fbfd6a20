"""A signal that ends the launcher of a node is passed on to its workers, which have some time to end by themselves."""

from __future__ import annotations

import signal
import sys
import time
from typing import Protocol

from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.runtime.departures import Departures
from megatron_flashrecovery.runtime.node_messages import Dismiss, SignalPassedOn
from megatron_flashrecovery.runtime.workers import Workers

_CONTROLLERS = NodeId("node0")
"""Others may still write a checkpoint: without the controller they could not."""


class Sender(Protocol):
    def send(self, message: object) -> None: ...


class Farewell:
    """``patience``: seconds."""

    def __init__(
        self, node: NodeId, patience: float, workers: Workers, control: Sender, departures: Departures
    ) -> None:
        self._node = node
        self._patience = patience
        self._workers = workers
        self._control = control
        self._departures = departures
        self._end_by: float | None = None

    def pass_on(self, number: signal.Signals, others_come: bool = False) -> Dismiss | None:
        """To the workers alone: what they have started is theirs to end. Returns what to end the job with, if there are
        none yet. ``others_come``: some start as soon as their predecessors have ended, and are told then."""
        self._departures.passed_on = number
        seated = list(self._workers.seated())
        has_seats = bool(self._departures.ranks)
        if not has_seats and self._node != _CONTROLLERS:
            return Dismiss(f"told to end by {number.name}, and no worker sits here", 1, at_once=True)
        if has_seats and not seated and not others_come:
            return Dismiss(f"told to end by {number.name} before any worker had started", 1)
        for _rank, worker in seated:
            self._workers.tell(worker, number)
        self._control.send(SignalPassedOn(self._node, number.name, len(seated)))
        self._end_by = time.monotonic() + self._patience
        said = f"passed on to {len(seated)} workers, which have {self._patience:g} s to end by themselves"
        print(f"flashrecovery: {number.name}: {said}; a second signal ends them at once", file=sys.stderr, flush=True)
        return None

    def out_of_patience(self) -> Dismiss | None:
        """What to end the job with, if some worker has taken too long."""
        if self._end_by is None or time.monotonic() < self._end_by:
            return None
        assert self._departures.passed_on is not None
        late = ", ".join(map(str, self._departures.still_here()[:8])) or "of another node"
        told = f"{self._patience:g} s after {self._departures.passed_on.name}"
        return Dismiss(f"rank {late} had not ended {told}", 1)
