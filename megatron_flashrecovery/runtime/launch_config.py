"""What `flashrecovery run` was asked to do: one frozen value, validated when it is built."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.pace import Pace
from megatron_flashrecovery.runtime.moment import Moment


class Fault(Enum):
    """What a rank can be told to do to itself."""

    KILL = "kill"
    STOP = "stop"
    """Stand still by SIGSTOP."""
    LOOP = "loop"
    """Compute for ever."""
    GIL = "gil"
    """The same, with the interpreter's lock in its hands."""
    SEGV = "segv"
    ABORT = "abort"
    EXCEPTION = "exception"
    EXIT = "exit"
    NAN = "nan"
    """A value of its own, an activation or a gradient, that is no number."""
    SPIKE = "spike"
    """Values of its own that are far too large."""
    BITFLIP = "bitflip"
    """One bit of a parameter."""


OF_TENSORS = frozenset({Fault.NAN, Fault.SPIKE, Fault.BITFLIP})
"""What a rank does to a tensor that it computes with, and not to itself."""
# The field's public fault injectors have names of their own.
_FAULT_NAMED: Mapping[str, Fault] = {
    **{fault.value: fault for fault in Fault},
    "SIGKILL": Fault.KILL,
    "SIGSTOP": Fault.STOP,
    "LOCK_GIL": Fault.GIL,
    "SEGFAULT": Fault.SEGV,
    "OS_ABORT": Fault.ABORT,
    "WORKLOAD_EXC": Fault.EXCEPTION,
}
_SPEC_FORM = "kill:rank=5,step=6,at=backward"


@dataclass(frozen=True)
class Injection:
    """A fault that one rank inflicts on itself while it computes the step that will be completed as ``step``: once, or
    ``always``, whenever that step is computed and whoever sits on the rank."""

    rank: Rank
    step: Step
    at: Moment
    fault: Fault = Fault.KILL
    always: bool = False

    @classmethod
    def parse(cls, spec: str) -> Injection:
        name, _, rest = spec.partition(":")
        if name not in _FAULT_NAMED:
            raise ConfigError(f"--inject {spec}: unknown fault {name!r}: write it like {_SPEC_FORM}")
        fields = dict(_key_and_value(spec, part) for part in rest.split(","))
        for key in ("rank", "step", "at"):
            if key not in fields:
                raise ConfigError(f"--inject {spec}: {key} is missing: write it like {_SPEC_FORM}")
        if unknown := sorted(fields.keys() - {"rank", "step", "at", "times"}):
            raise ConfigError(f"--inject {spec}: unknown key {unknown[0]!r}: write it like {_SPEC_FORM}")
        if _FAULT_NAMED[name] in OF_TENSORS and fields["at"] == Moment.MIRROR.value:
            raise ConfigError(
                f"--inject {spec}: at {fields['at']} a rank computes with no tensor: choose another moment"
            )
        return cls(
            rank=Rank(_whole_number(spec, "rank", fields["rank"], least=0)),
            step=Step(_whole_number(spec, "step", fields["step"], least=1)),
            at=_moment(spec, fields["at"]),
            fault=_FAULT_NAMED[name],
            always=_is_always(spec, fields.get("times", "1")),
        )

    def __str__(self) -> str:
        times = ",times=always" if self.always else ""
        return f"{self.fault.value}:rank={self.rank},step={self.step},at={self.at.value}{times}"


@dataclass(frozen=True)
class Deadlines:
    """How long the controller waits, in seconds; whoever is late is fenced and counted as lost.

    ``heartbeat_interval`` and ``heartbeat_timeout`` are between an agent and the controller; a dead worker is noticed
    at once and needs neither. ``drain_timeout``: from the order to park until every survivor has stopped.
    ``join_timeout``: from the start of a worker until it stands before its first step. ``execute_timeout``: from the
    plan until it is executed. ``hang_timeout``: how long something may take that was never seen to end a few times, a
    first step for instance; everything else has a limit by what it took before. 0: nobody looks for hangs.
    """

    heartbeat_interval: float = 0.5
    heartbeat_timeout: float = 3.0
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

    ``master_port`` 0 lets node 0 choose a free one, which only a job of one node can do. ``max_restarts`` bounds how
    often *all* workers are started again; replacing lost ranks is not bounded. ``shutdown_timeout``: how long, in
    seconds, workers have to end by themselves after SIGTERM. ``preload``: workers are forked from a
    process that has done the script's imports. ``hooks`` (``module:function``) are called in each process before the
    script is loaded. ``token`` is empty if the launcher is to draw one.
    """

    script: str
    script_args: tuple[str, ...] = ()
    module: bool = False
    nnodes: int = 1
    nproc_per_node: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    rdzv_id: str = "none"
    max_restarts: int = 3
    spares_per_node: int = 0
    log_dir: Path = Path("flashrecovery-logs")
    injections: tuple[Injection, ...] = ()
    shutdown_timeout: float = 30.0
    preload: bool = True
    hooks: tuple[str, ...] = ()
    deadlines: Deadlines = field(default_factory=Deadlines)
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, least in (("nnodes", 1), ("nproc_per_node", 1), ("max_restarts", 0), ("spares_per_node", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: must be at least {least}")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"--node-rank {self.node_rank}: must be below --nnodes {self.nnodes}, and not negative")
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
        for injection in self.injections:
            if injection.rank >= self.world_size:
                raise ConfigError(
                    f"--inject {injection}: there is no rank {injection.rank} in a job of {self.world_size}: "
                    f"give a rank from 0 to {self.world_size - 1}"
                )

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node


def _key_and_value(spec: str, part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise ConfigError(f"--inject {spec}: {part!r} is not of the form key=value: write it like {_SPEC_FORM}")
    return key.strip(), value.strip()


def _whole_number(spec: str, key: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--inject {spec}: {key}={text} is no whole number from {least} on")
    return int(text)


def _moment(spec: str, text: str) -> Moment:
    names = [moment.value for moment in Moment]
    if text not in names:
        raise ConfigError(f"--inject {spec}: there is no moment {text!r}: at is one of {' '.join(names)}")
    return Moment(text)


def _is_always(spec: str, text: str) -> bool:
    if text not in ("1", "always"):
        raise ConfigError(f"--inject {spec}: times={text} is neither 1 nor always")
    return text == "always"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
