"""A fault that a rank is told to inflict on itself, as it is written: ``kill:rank=5,step=6,at=backward``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.runtime.moment import Moment


class Fault(Enum):
    """What a rank can be told to do to itself, or to its agent."""

    KILL = "kill"
    SIGNAL = "signal"
    STOP = "stop"
    LOOP = "loop"
    GIL = "gil"
    SEGV = "segv"
    ABORT = "abort"
    EXCEPTION = "exception"
    EXIT = "exit"
    OOM = "oom"
    SLOW = "slow"
    HANG_COLLECTIVE = "hang_collective"
    DROP_HEARTBEATS = "drop_heartbeats"
    AGENT = "agent"
    DEVICE = "device"
    NETWORK = "network"
    NAN = "nan"
    SPIKE = "spike"
    BITFLIP = "bitflip"


OF_TENSORS = frozenset({Fault.NAN, Fault.SPIKE, Fault.BITFLIP})
"""What a rank does to a tensor that it computes with, and not to itself."""


@dataclass(frozen=True)
class Option:
    """A key of one kind. ``complaint`` says what is wrong with a value; without a ``default`` it must be given."""

    name: str
    form: str
    complaint: Callable[[str], str | None]
    default: str | None = None


@dataclass(frozen=True)
class Kind:
    """``what`` is for people. ``is_survived``: the process goes on, so its end is another story. ``main_thread_only``:
    not at the moment of mirrors, which is another thread's."""

    what: str
    options: tuple[Option, ...] = ()
    is_survived: bool = False
    main_thread_only: bool = False


def _one_of(*words: str) -> Callable[[str], str | None]:
    return lambda text: None if text in words else f"is none of {' '.join(words)}"


def _a_signal(text: str) -> str | None:
    return None if text in signal.Signals.__members__ else "is no signal: write it like SIGBUS"


_TIMES = "times"


def is_always(options: Mapping[str, str]) -> bool:
    """Whenever the step is computed, also by a replacement."""
    return options.get(_TIMES) == "always"


def _number_from(least: float) -> Callable[[str], str | None]:
    def complaint(text: str) -> str | None:
        try:
            return None if least <= float(text) < 1e9 else f"is not {least:g} or more"
        except ValueError:
            return "is no number"

    return complaint


def _count(text: str) -> str | None:
    return None if text.isdecimal() and int(text) else "is no whole number from 1 on"


_OF_ITS_STEP = Option(_TIMES, "1|always", _one_of("1", "always"), "1")

KINDS: Mapping[Fault, Kind] = {
    Fault.KILL: Kind("ends by SIGKILL"),
    Fault.SIGNAL: Kind("sends itself a signal", (Option("signal", "SIGBUS", _a_signal),)),
    Fault.STOP: Kind("stands still by SIGSTOP"),
    Fault.LOOP: Kind("computes for ever"),
    Fault.GIL: Kind("stands still with the interpreter's lock in its hands"),
    Fault.SEGV: Kind("reads where there is no memory"),
    Fault.ABORT: Kind("aborts"),
    Fault.EXCEPTION: Kind(
        "raises an exception: by itself, from another thread, or in a signal handler",
        (Option("how", "raise|async|signal", _one_of("raise", "async", "signal"), "raise"),),
    ),
    Fault.EXIT: Kind("exits with 1"),
    Fault.OOM: Kind("takes memory until the limit of its control group ends it; refused where there is none"),
    Fault.SLOW: Kind(
        "computes factor times as long, and sleeps so many seconds, in each of some steps",
        (
            Option("factor", "3", _number_from(1.0), "1"),
            Option("seconds", "0.5", _number_from(0.0), "0"),
            Option("steps", "10", _count, "10"),
        ),
        is_survived=True,
        main_thread_only=True,
    ),
    Fault.HANG_COLLECTIVE: Kind("enters a barrier of all ranks that nobody else enters", main_thread_only=True),
    Fault.DROP_HEARTBEATS: Kind(
        "the agent of its node, which is not node 0, sends no heartbeats",
        (Option("seconds", "5", _number_from(0.0), "5"),),
        is_survived=True,
    ),
    Fault.DEVICE: Kind(
        "accesses memory of its device that does not exist, after which the device context is lost",
        main_thread_only=True,
    ),
    Fault.NAN: Kind(
        "has a value of its own, an activation or a gradient, that is no number",
        (_OF_ITS_STEP,),
        is_survived=True,
        main_thread_only=True,
    ),
    Fault.SPIKE: Kind(
        "has values of its own that are far too large", (_OF_ITS_STEP,), is_survived=True, main_thread_only=True
    ),
    Fault.BITFLIP: Kind(
        "flips one bit of an activation, of a gradient, or (at=between) of a parameter, which the distributed optimizer"
        " overwrites in its next gather, mostly before peers compare it",
        (_OF_ITS_STEP,),
        is_survived=True,
        main_thread_only=True,
    ),
    Fault.NETWORK: Kind("shuts one connection to a rank that lives", is_survived=True, main_thread_only=True),
    Fault.AGENT: Kind("the agent of its node is killed, and its workers with it; on node 0 that is the whole job"),
}

# The field's public fault injectors have names of their own; any name of a signal is one, too.
_NAMED: Mapping[str, tuple[Fault, Mapping[str, str]]] = {
    **{fault.value: (fault, {}) for fault in Fault},
    **{name: (Fault.SIGNAL, {"signal": name}) for name in signal.Signals.__members__},
    "SIGKILL": (Fault.KILL, {}),
    "SIGSTOP": (Fault.STOP, {}),
    "LOCK_GIL": (Fault.GIL, {}),
    "SEGFAULT": (Fault.SEGV, {}),
    "OS_ABORT": (Fault.ABORT, {}),
    "WORKLOAD_EXC": (Fault.EXCEPTION, {}),
    "GPU_ERROR": (Fault.DEVICE, {}),
    "ASYNC_EXC": (Fault.EXCEPTION, {"how": "async"}),
    "SIGNAL_EXC": (Fault.EXCEPTION, {"how": "signal"}),
}
_MOST = 1 << 31
_FORM = "kill:rank=5,step=6,at=backward"


@dataclass(frozen=True)
class Injection:
    """Once, while the rank computes the step that will be completed as ``step`` (the next one, if it is ``None``), at
    the first moment if none is named."""

    rank: Rank
    step: Step | None
    at: Moment | None
    fault: Fault = Fault.KILL
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str, is_live: bool = False) -> Injection:
        """Raises ``ConfigError``. Of a run that goes on already (``is_live``), step and moment may be left out."""
        name, _, rest = spec.partition(":")
        if name not in _NAMED:
            raise _wrong(spec, f"unknown fault {name!r}: it is one of {' '.join(fault.value for fault in Fault)}")
        fault, implied = _NAMED[name]
        given = dict(_key_and_value(spec, part) for part in rest.split(","))
        for key in ("rank",) if is_live else ("rank", "step", "at"):
            if key not in given:
                raise _wrong(spec, f"{key} is missing: write it like {_FORM}")
        rank, step, at = given.pop("rank"), given.pop("step", None), given.pop("at", None)
        moment = None if at is None else _moment(spec, at)
        if moment is Moment.MIRROR and KINDS[fault].main_thread_only:
            raise _wrong(spec, f"at=mirror is in the thread that mirrors, which does not {fault.value}: name another")
        return cls(
            rank=Rank(_whole_number(spec, "rank", rank, least=0)),
            step=None if step is None else Step(_whole_number(spec, "step", step, least=1)),
            at=moment,
            fault=fault,
            options=_options(spec, fault, {**implied, **given}),
        )

    def refuse_outside(self, world_size: int, ranks_per_node: int) -> None:
        """Raises ``ConfigError`` if nothing would follow from it in a job of this shape."""
        if self.rank >= world_size:
            raise _wrong(
                str(self),
                f"there is no rank {self.rank} in a job of {world_size}: give a rank from 0 to {world_size - 1}",
            )
        if self.fault is Fault.DROP_HEARTBEATS and self.rank < ranks_per_node:
            raise _wrong(
                str(self),
                "node 0 is one process with the controller, which needs no heartbeats of it, so nothing would follow: "
                + (f"name a rank from {ranks_per_node} on" if world_size > ranks_per_node else "use two nodes"),
            )

    def __str__(self) -> str:
        step = "" if self.step is None else f",step={self.step}"
        at = "" if self.at is None else f",at={self.at.value}"
        options = "".join(f",{key}={value}" for key, value in self.options.items())
        return f"{self.fault.value}:rank={self.rank}{step}{at}{options}"


def help_of_spec() -> str:
    kinds = ", ".join(fault.value for fault in KINDS)
    return f"a fault, as in {_FORM}; kinds: {kinds}; at: {', '.join(moment.value for moment in Moment)}"


def help_of_kinds() -> str:
    """A line for each."""
    lines = []
    for fault, kind in KINDS.items():
        keys = "".join(
            f" {option.name}={option.form}" + ("" if option.default is None else f" ({option.default})")
            for option in kind.options
        )
        lines.append(f"  {fault.value:<16} {kind.what}" + (f";{keys}" if keys else ""))
    return "\n".join(lines)


def _options(spec: str, fault: Fault, given: Mapping[str, str]) -> dict[str, str]:
    """Those that were given and those that are implied, checked; nothing is filled in."""
    known = {option.name: option for option in KINDS[fault].options}
    if unknown := sorted(given.keys() - known):
        has = f"{fault.value} has {' '.join(known)}" if known else f"{fault.value} has none but rank, step and at"
        raise _wrong(spec, f"unknown key {unknown[0]!r}: {has}")
    for option in known.values():
        if option.name not in given:
            if option.default is None:
                raise _wrong(spec, f"{option.name} is missing: give {option.name}={option.form}")
        elif (complaint := option.complaint(given[option.name])) is not None:
            raise _wrong(spec, f"{option.name}={given[option.name]} {complaint}")
    if fault is Fault.SLOW and not given.keys() & {"factor", "seconds"}:
        raise _wrong(spec, "give factor=3 or seconds=0.5")
    return {name: given[name] for name in known if name in given}


def option(fault: Fault, options: Mapping[str, str], name: str) -> str:
    """What was given, or else the default."""
    default = next(each.default for each in KINDS[fault].options if each.name == name)
    value = options.get(name, default)
    assert value is not None
    return value


def _wrong(spec: str, what: str) -> ConfigError:
    return ConfigError(f"--inject {spec}: {what}")


def _key_and_value(spec: str, part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise _wrong(spec, f"{part!r} is not of the form key=value: write it like {_FORM}")
    return key.strip(), value.strip()


def _whole_number(spec: str, key: str, text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) < _MOST:
        raise _wrong(spec, f"{key}={text} is no whole number from {least} on")
    return int(text)


def _moment(spec: str, text: str) -> Moment:
    names = [moment.value for moment in Moment]
    if text not in names:
        raise _wrong(spec, f"there is no moment {text!r}: at is one of {' '.join(names)}")
    return Moment(text)
