"""Rebuilds the controller's state from its journal, and checks that the same orders follow from the same events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_flashrecovery.core.coordinator import handle
from megatron_flashrecovery.core.errors import ImpossibleTransition, RecordDamaged
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, Event
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime.journal import JobStarted, Line, decode_as, decode_message


@dataclass(frozen=True)
class Replay:
    """``difference`` says in words where the replay first went another way; the job is what it was just after that."""

    job: Job
    events: int
    difference: str | None


@dataclass
class _Entry:
    """An event and the commands that were recorded for it."""

    line: Line
    event: Event
    commands: list[Command] = field(default_factory=list)


def replay(lines: Iterable[Line]) -> Replay:
    """Raises ``RecordDamaged`` if the journal does not begin with a start."""
    rest = iter(lines)
    first = next(rest, None)
    if first is None or first.name != JobStarted.__name__:
        raise RecordDamaged("the journal does not begin with the start of a job")
    start = decode_as(JobStarted, first)
    job = Job(start.config, Seats(start.seats))
    entries = list(_entries(rest))
    for number, entry in enumerate(entries, start=1):
        is_last = number == len(entries)
        difference = _apply(job, entry, is_last)
        if difference is not None:
            return Replay(job, number, difference)
    return Replay(job, len(entries), None)


def _apply(job: Job, entry: _Entry, is_last: bool) -> str | None:
    assert entry.line.now is not None, entry.line
    try:
        commands = handle(job, entry.event, entry.line.now)
    except ImpossibleTransition as impossible:
        return f"{entry.event}: {impossible}"
    # A crash may have come between the event and its commands.
    recorded = commands[: len(entry.commands)] if is_last else commands
    if recorded == entry.commands:
        return None
    for at, recorded_command in enumerate(entry.commands):
        if at >= len(commands):
            return f"after {entry.event} the journal has {recorded_command}, the replay has no more orders"
        if commands[at] != recorded_command:
            return f"after {entry.event} the journal has {recorded_command}, the replay {commands[at]}"
    return f"after {entry.event} the replay also orders {commands[len(entry.commands)]}"


def _entries(lines: Iterable[Line]) -> Iterator[_Entry]:
    entry: _Entry | None = None
    for line in lines:
        if line.kind == "event":
            if entry is not None:
                yield entry
            entry = _Entry(line, decode_message(line))  # type: ignore[arg-type]
        elif line.kind == "command":
            if entry is None:
                raise RecordDamaged(f"the journal has a command {line.name} before any event")
            entry.commands.append(decode_message(line))  # type: ignore[arg-type]
    if entry is not None:
        yield entry
