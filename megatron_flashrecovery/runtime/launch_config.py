"""What `flashrecovery run` was asked to do: one frozen value, validated when it is built."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.job import JobConfig
from megatron_flashrecovery.core.pace import Pace
from megatron_flashrecovery.runtime.injection import Injection

_LEAST = {"nnodes": 1, "spare_nodes": 0, "nproc_per_node": 1, "max_restarts": 0, "spares_per_node": 0}


@dataclass(frozen=True)
class Deadlines:
    """How long the controller waits, in seconds; whoever is late is fenced and counted as lost.

    ``heartbeat_interval`` and ``heartbeat_timeout`` are between an agent and the controller; a dead worker is noticed
    at once and needs neither. ``drain_timeout``: from the order to park until every survivor has stopped, unless its
    agent sees that it is busy with what may take longer, by the limits that the run has learnt.
    ``join_timeout``: from the start of a replacement until it can join, and from the start of the job until every node
    has come, spare ones included if the job is over by then. ``execute_timeout``: from the
    plan until it is executed. ``hang_timeout``: how long something may take that was never seen to end a few times, a
    first step for instance; everything else has a limit by what it took before. 0: nobody looks for hangs.
    """

    heartbeat_interval: float = 0.4
    heartbeat_timeout: float = 2.0
    drain_timeout: float = 30.0
    join_timeout: float = 300.0
    execute_timeout: float = 60.0
    hang_timeout: float = 600.0

    def __post_init__(self) -> None:
        in_order = ("heartbeat_interval", "heartbeat_timeout", "drain_timeout")
        for name in (*in_order, "join_timeout", "execute_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: give seconds above zero")
        Pace(unknown=self.hang_timeout)
        for shorter, longer in itertools.pairwise(in_order):
            if getattr(self, shorter) >= getattr(self, longer):
                raise ConfigError(
                    f"{_flag(longer)} {getattr(self, longer)} is not longer than {_flag(shorter)} "
                    f"{getattr(self, shorter)}: raise the one or lower the other"
                )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Torchrun's flags by torchrun's names, and what is ours.

    Nodes from ``nnodes`` on, ``spare_nodes`` of them, wait without seats until another one is lost.
    ``master_port`` 0 lets node 0 choose a free one, which only a job of one node can do. ``max_restarts`` bounds how
    often *all* workers are started again; replacing lost ranks is not bounded. ``shutdown_timeout``: how long, in
    seconds, workers have to end by themselves after SIGTERM. ``preload``: workers are forked from a
    process that has done the script's imports. ``hooks`` (``module:function``) are called in each process before the
    script is loaded. ``slow_factor``: whoever computes so many times as long as its peers is said to be slow; 0: nobody
    is. ``diagnosis``: who is to blame is looked for while the job goes on; ``topology`` describes the cluster for that.
    ``allow_injection``: a user may inject faults later on, as ``injections`` imply. ``token`` is empty if the
    launcher is to draw one.
    """

    script: str
    script_args: tuple[str, ...] = ()
    module: bool = False
    nnodes: int = 1
    spare_nodes: int = 0
    nproc_per_node: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    rdzv_id: str = "none"
    max_restarts: int = 3
    spares_per_node: int = 0
    log_dir: Path = Path("flashrecovery-logs")
    injections: tuple[Injection, ...] = ()
    allow_injection: bool = False
    shutdown_timeout: float = 30.0
    preload: bool = True
    hooks: tuple[str, ...] = ()
    deadlines: Deadlines = field(default_factory=Deadlines)
    slow_factor: float = 1.5
    diagnosis: bool = True
    topology: Path | None = None
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: must be at least {least}")
        if self.spare_nodes and self.nnodes == 1:
            raise ConfigError(
                f"--spare-nodes {self.spare_nodes}: give --nnodes 2 or more, too, for node 0 itself cannot be replaced"
            )
        if not 0 <= self.node_rank < self.nnodes + self.spare_nodes:
            spare = f" + --spare-nodes {self.spare_nodes}" if self.spare_nodes else ""
            raise ConfigError(
                f"--node-rank {self.node_rank}: must be from 0 to {self.nnodes + self.spare_nodes - 1}, "
                f"below --nnodes {self.nnodes}{spare}"
            )
        if not 0 <= self.master_port < 65536:
            raise ConfigError(f"--master-port {self.master_port}: give a port from 1 to 65535")
        if self.nnodes > 1 and self.master_port == 0:
            raise ConfigError(f"--master-port is missing: --nnodes {self.nnodes} needs the same free port on each node")
        if self.nnodes > 1 and not self.token:
            raise ConfigError(
                f"FLASHRECOVERY_TOKEN is not set: --nnodes {self.nnodes} needs the same secret on each node, "
                f"for instance from `openssl rand -hex 16`"
            )
        if self.shutdown_timeout < 0:
            raise ConfigError(f"--shutdown-timeout {self.shutdown_timeout}: give seconds, or 0 to end workers at once")
        JobConfig(slow_factor=self.slow_factor)
        if self.topology is not None and not self.topology.is_file():
            raise ConfigError(f"--topology {self.topology} does not exist: see docs/diagnose.md, or leave it out")
        for injection in self.injections:
            injection.refuse_outside(self.world_size, self.nproc_per_node)

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node

    @property
    def node(self) -> NodeId:
        return NodeId(f"node{self.node_rank}")

    @property
    def is_spare(self) -> bool:
        return self.node_rank >= self.nnodes

    def first_seats(self, node_rank: int) -> tuple[Rank, ...]:
        """That a node begins with; a spare one with none."""
        first = node_rank * self.nproc_per_node
        return tuple(Rank(rank) for rank in range(first, min(first + self.nproc_per_node, self.world_size)))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
