"""What an agent makes of what is said of devices and links: whoever computes on a device that has failed is ended, and
lost; where ranks are, and what counters say, is told for the record.

Nothing here waits: the kernel's log is read as far as it is written, and NVML is asked by a process of its own.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from megatron_flashrecovery.core.counting import Counting
from megatron_flashrecovery.core.devices import Incidents, device_of, place_on_bus, xid_in
from megatron_flashrecovery.core.ids import NodeId, Rank, WorkerId
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.counters import NetworkCounters
from megatron_flashrecovery.detect.device_probe import DeviceProbe
from megatron_flashrecovery.detect.kernel_log import KernelLog
from megatron_flashrecovery.runtime.farewell import Sender
from megatron_flashrecovery.runtime.node_messages import DeviceNoted, NodeMeasured, NodePlaced
from megatron_flashrecovery.runtime.workers import Worker, WorkerEnded

_EVERY = 0.1
_SWITCHES = "SLURM_TOPOLOGY_ADDR"
_REAPED_WITHIN = 0.4
"""Seconds: a process whose device is gone may hang in the driver for minutes, killed as it is."""


class DeviceWatch:
    """``ranks`` are those of this node at the time, in order."""

    def __init__(
        self,
        node: NodeId,
        ranks: Iterable[Rank],
        control: Sender,
        log: KernelLog | None = None,
        probe: DeviceProbe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self.ranks = tuple(ranks)
        self._control = control
        self._log = log or KernelLog()
        self._probe = probe or DeviceProbe()
        self._clock = clock
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._said: dict[Rank, str] = {}
        self._incidents = Incidents()
        self._fault_of: dict[WorkerId, Fault] = {}
        self._doomed: dict[WorkerId, tuple[Worker, float]] = {}
        self._next_look = clock()
        self._network = NetworkCounters()
        self._counting = Counting()
        self._placed: NodePlaced | None = None
        self._switches = os.environ.get(_SWITCHES, ""), os.environ.get(f"{_SWITCHES}_PATTERN", "")

    def note_device(self, rank: Rank, device: str) -> None:
        """A worker has said on which it computes, by place or UUID; on none, if it is empty."""
        self._said[rank] = device

    def look(self, seated: Sequence[Worker], ended: Sequence[Worker]) -> list[tuple[Worker, str]]:
        """Who is to be ended, and for what. Those that have just ended by themselves, perhaps of what the log has by
        now, are among them."""
        now = self._clock()
        if now < self._next_look and not ended:
            return []
        self._next_look = now + _EVERY
        troubles = [trouble for line in self._log.lines() if (trouble := xid_in(line)) is not None]
        found: list[tuple[Worker, str]] = []
        for trouble in (*troubles, *self._probe.look()):
            if self._incidents.is_news(trouble, now):
                ranks = self._ranks_on(trouble.device)
                self._control.send(DeviceNoted.of(self._node, trouble, ranks))
                if trouble.fault is not None:
                    on_it = [worker for worker in (*seated, *ended) if worker.rank in ranks]
                    self._fault_of.update({worker.id: trouble.fault for worker in on_it})
                    self._doomed.update({worker.id: (worker, now + _REAPED_WITHIN) for worker in on_it})
                    found += [(worker, trouble.evidence) for worker in on_it]
        self._tell_where_ranks_are()
        self._tell_what_has_grown(now)
        return found

    def _tell_where_ranks_are(self) -> None:
        if not self.ranks or not self._said.keys() >= set(self.ranks):
            return
        places = {rank: self._device_of(local, rank) for local, rank in enumerate(self.ranks)}
        devices = {rank: place for rank, place in places.items() if place is not None}
        uuids = {place: uuid for uuid, place in self._probe.devices.items() if place in devices.values()}
        placed = NodePlaced(self._node, platform.node(), self.ranks, devices, uuids, self._switches)
        if placed != self._placed:
            self._placed = placed
            self._control.send(placed)

    def _tell_what_has_grown(self, now: float) -> None:
        if not self._counting.is_due(now):
            return
        growth = self._counting.look(self._network.read() | self._probe.counters, now)
        if growth is not None:
            self._control.send(NodeMeasured(self._node, growth.seconds, growth.grown))

    def fault_of(self, worker: WorkerId, otherwise: Fault) -> Fault:
        """Of one that has ended."""
        self._doomed.pop(worker, None)
        return self._fault_of.pop(worker, otherwise)

    def stuck(self) -> list[WorkerEnded]:
        """Those that were ended for their device and have not ended: as good as gone, for the driver holds them."""
        now = self._clock()
        return [WorkerEnded(worker, signal.SIGKILL) for worker, due in self._doomed.values() if now >= due]

    def forget_all_but(self, workers: Collection[WorkerId]) -> None:
        self._fault_of = {worker: fault for worker, fault in self._fault_of.items() if worker in workers}
        self._doomed = {worker: doomed for worker, doomed in self._doomed.items() if worker in workers}

    def close(self) -> None:
        self._log.close()
        self._probe.close()
        self._network.close()

    def _ranks_on(self, device: str) -> tuple[Rank, ...]:
        return tuple(rank for local, rank in enumerate(self.ranks) if self._device_of(local, rank) == device)

    def _device_of(self, local: int, rank: Rank) -> str | None:
        said = self._said.get(rank)
        if said == "":
            return None
        if said is not None and ":" in said:
            return place_on_bus(said)
        return device_of(local, self._visible if said is None else said, self._probe.devices)
