"""The record that a program can replay: one JSON line for each event and command, in the order of their handling.

    {"time": 1764000000.25, "now": 81.5, "epoch": 1, "kind": "event", "name": "WorkersLost", ...the message's fields}

``time`` is Unix time, for people; ``now`` is the clock that the core was given, for the replay. ``kind`` is ``start``
for the first line, ``event``, ``command``, or another word for what else the shell wants to record. A message's own
``time`` or ``epoch`` take the place of the line's. A line is one write, so a crash tears the last line at most, and
reading leaves a torn last line out.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_args

import msgspec

from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank
from megatron_flashrecovery.core.job import Job, JobConfig
from megatron_flashrecovery.core.messages import ClockTicked, Command, Event

FILE_NAME = "journal.jsonl"
_TIME = re.compile(rb'{"time":([^,]*),')
_NAME = re.compile(rb'"name":"([^"]*)"')
_RESERVED = frozenset({"kind", "name", "now"})
_CLASS_NAMED: Mapping[str, type] = {cls.__name__: cls for cls in (*get_args(Event), *get_args(Command))}
T = TypeVar("T")


@dataclass(frozen=True)
class JobStarted:
    """What the controller's state was made of."""

    config: JobConfig
    seats: Mapping[NodeId, tuple[Rank, ...]]


@dataclass(frozen=True)
class Line:
    """One line as it was written; ``body`` are the message's fields as JSON has them."""

    time: float
    epoch: Epoch
    kind: str
    name: str
    now: float | None
    body: Mapping[str, Any]


class Journal:
    """Appends to one file; owned by the controller's thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._encoder = msgspec.json.Encoder()
        self._state: tuple[object, float | None] | None = None

    def started(self, job: JobStarted, *, time: float, now: float) -> None:
        """What a replay begins with: once, before the first event."""
        self.write("start", job, time=time, epoch=Epoch(0), now=now)

    def handled(self, event: Event, commands: Sequence[Command], job: Job, *, time: float, now: float) -> None:
        """An event that has been applied to the job, and what came of it; to be written before the commands are given.

        A tick of the clock that changed nothing leaves no line.
        """
        before, self._state = self._state, (job.phase, job.next_deadline)
        changed = before is not None and (before[0] is not job.phase or before[1] != job.next_deadline)
        if isinstance(event, ClockTicked) and not commands and not changed:
            return
        self.write("event", event, time=time, now=now, epoch=job.epoch)
        for command in commands:
            self.write("command", command, time=time, now=now, epoch=job.epoch)

    def write(self, kind: str, message: object, *, time: float, epoch: Epoch, now: float | None = None) -> None:
        """``message`` is a dataclass of plain values, enums and the like; bytes become base64."""
        body = msgspec.to_builtins(message, str_keys=True, builtin_types=())
        assert isinstance(body, dict), message
        assert not _RESERVED & body.keys(), message
        head = {"time": time, "now": now, "epoch": epoch, "kind": kind, "name": type(message).__name__}
        append_whole(self._fd, self._encoder.encode(head | body) + b"\n")

    def close(self) -> None:
        os.close(self._fd)


def append_whole(fd: int, line: bytes) -> None:
    """All of it or nothing: what a full disk took of it would become one bad line with the next one that fits."""
    written = os.write(fd, line)
    if written < len(line):
        os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_END) - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_journal(
    path: Path, names: Collection[str] | None = None, wants: Callable[[str, float], bool] = lambda name, time: True
) -> Iterator[Line]:
    """Raises ``RecordDamaged`` if any line but the last is not what ``Journal`` writes. With ``names`` only such lines
    are looked at, and of these only those whose name and Unix time are wanted: the rest of a long journal costs no
    decoding, and what is damaged is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise RecordDamaged(f"{path} does not exist: name the --log-dir of a run, or wait until it has begun") from None
    with file:
        yield from _lines(path, file, names, wants)


def _lines(
    path: Path, file: BinaryIO, names: Collection[str] | None, wants: Callable[[str, float], bool]
) -> Iterator[Line]:
    """One at a time: the journal of weeks is larger than memory."""
    for number, text in enumerate(file, start=1):
        if not text.endswith(b"\n"):  # the torn line of a crash
            return
        if names is not None and (found := _NAME.search(text)) is not None:
            name = found[1].decode(errors="replace")
            if name not in names or ((time := _time_of(text)) is not None and not wants(name, time)):
                continue
        try:
            yield _line(msgspec.json.decode(text, type=dict[str, Any]))
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            if names is not None:
                continue
            raise RecordDamaged(f"{path} line {number} is not a line of a journal: {error}") from error


def _time_of(text: bytes) -> float | None:
    """Of the head of a line; None if it is damaged."""
    found = _TIME.match(text)
    try:
        return None if found is None else float(found[1])
    except ValueError:
        return None


def decode_message(line: Line) -> Event | Command:
    """The event or command that the line records."""
    if line.name not in _CLASS_NAMED:
        raise RecordDamaged(f"the journal has a {line.kind} {line.name}, which this version does not know")
    message: Event | Command = decode_as(_CLASS_NAMED[line.name], line)
    return message


def decode_as(cls: type[T], line: Line) -> T:
    """A record of another kind, whose class the caller knows."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    body = {key: value for key, value in line.body.items() if key in known}
    try:
        # JSON has text keys only, and ranks are numbers.
        return msgspec.convert(body, cls, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        raise RecordDamaged(f"the journal's {line.name} at {line.time} is malformed: {error}") from error


def _line(entry: dict[str, Any]) -> Line:
    body = {key: value for key, value in entry.items() if key not in _RESERVED}
    return Line(
        time=float(entry["time"]),
        epoch=Epoch(int(entry["epoch"])),
        kind=entry["kind"],
        name=entry["name"],
        now=entry["now"],
        body=body,
    )
