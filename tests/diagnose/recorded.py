"""The records of a job on several hosts, as its controller would have written them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.job import JobConfig
from megatron_flashrecovery.core.layout import megatron_layout
from megatron_flashrecovery.core.messages import Loss, SeatsDescribed, StepsTimed, WorkersLost
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.diagnose.communicators import groups_of
from megatron_flashrecovery.runtime.chronicle import SlowNoted
from megatron_flashrecovery.runtime.journal import FILE_NAME, JobStarted, Journal
from megatron_flashrecovery.runtime.node_messages import NodePlaced

START = 1_764_000_000.0


class Records:
    """``switches``: what SLURM says of each host, if anything. A window is a second long."""

    def __init__(
        self, directory: Path, hosts: int, devices: int, tensor: int = 1, switches: Iterable[str] = ()
    ) -> None:
        self.directory = directory
        self.now = START
        self.hosts, self.devices = hosts, devices
        self._step = 0
        self._lives = dict.fromkeys(range(hosts * devices), 1)
        self._rng = np.random.default_rng(3)
        self._journal = Journal(directory / FILE_NAME)
        seats = {self.node(host): self.ranks(host) for host in range(hosts)}
        self._journal.started(JobStarted(JobConfig(), seats), time=self.now, now=0.0)
        layout = megatron_layout(hosts * devices, tensor=tensor)
        groups = groups_of(layout)
        addresses = list(switches)
        for host in range(hosts):
            ranks = self.ranks(host)
            peers = {rank: layout.group_of(rank, "dp") for rank in ranks}
            of_host = {key: members for key, members in groups.items() if members[0] in ranks}
            self.write("event", SeatsDescribed(self.node(host), Epoch(0), False, {}, peers, of_host))
            places = {rank: f"0000:{local + 16:02x}:00" for local, rank in enumerate(ranks)}
            address = (addresses[host], "switch.switch.node") if addresses else ("", "")
            self.write("note", NodePlaced(self.node(host), f"gpu{host:02d}", ranks, places, {}, address))

    @staticmethod
    def node(host: int) -> NodeId:
        return NodeId(f"node{host}")

    def ranks(self, host: int) -> tuple[Rank, ...]:
        return tuple(Rank(host * self.devices + local) for local in range(self.devices))

    def write(self, kind: str, message: object, epoch: int = 0) -> None:
        self._journal.write(kind, message, time=self.now, epoch=Epoch(epoch), now=self.now - START)

    def train(self, windows: int, slower: Mapping[int, float] | None = None) -> Records:
        """``slower``: by how many times these ranks compute longer."""
        for _ in range(windows):
            self.now += 1.0
            self._step += 5
            for host in range(self.hosts):
                own = {
                    rank: 0.1 * float(self._rng.normal(1.0, 0.03)) * (slower or {}).get(rank, 1.0)
                    for rank in self.ranks(host)
                }
                waited = {rank: 0.25 - seconds for rank, seconds in own.items()}
                self.write("event", StepsTimed(self.node(host), Epoch(0), Step(self._step), own, waited))
        return self

    def name_slow(self, *ranks: int) -> Records:
        for rank in ranks:
            self.write("note", SlowNoted(Rank(rank), "it computes for longer"))
        return self

    def lose(self, *ranks: int, fault: Fault = Fault.PROCESS_ENDED) -> Records:
        """One after the other, a minute apart."""
        for rank in ranks:
            self.now += 60.0
            self._lose_at_once([rank], fault)
        return self

    def lose_host(self, host: int) -> Records:
        self.now += 60.0
        self._lose_at_once(self.ranks(host), Fault.PROCESS_ENDED)
        return self

    def _lose_at_once(self, ranks: Iterable[int], fault: Fault) -> None:
        losses = []
        for rank in ranks:
            losses.append(
                Loss(Rank(rank), WorkerId(f"rank{rank}.{self._lives[rank]}"), "killed", Epoch(0), fault=fault)
            )
            self._lives[rank] += 1
        self.write("event", WorkersLost(self.node(losses[0].rank // self.devices), tuple(losses)))
