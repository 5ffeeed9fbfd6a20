"""A page of memory in which a trainer says what it does; its agent can read it at any time, also after its death.

The agent makes the page and passes its descriptor. The trainer writes with single stores into it, without a system call
and without anybody's help: so the page is true for a trainer that is stopped, that hangs with the interpreter's lock in
its hands, or that was killed in the middle of an operation.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.pace import BETWEEN, SAMPLES, Reading

PAGE_NBYTES = 4096
_BEAT = struct.Struct("<dd")
"""When the session's thread last ran, and its longest silence."""
_STATE = struct.Struct("<QqddQ?96s192sQ")
"""Number, step, since, longest, seen, timed before, activity, operation, number again: a store that was read in the
middle shows."""
_STATE_AT = 64
_LOOKS = 3


def make_page() -> int:
    """The descriptor of an empty page; whoever has it can read and write."""
    page = os.memfd_create("flashrecovery-pulse", os.MFD_CLOEXEC)
    os.ftruncate(page, PAGE_NBYTES)
    return page


class Pulse:
    """The trainer's side. ``beat`` is for the session's thread; everything else is for the threads that train, which
    hold the interpreter's lock while they write. Without a page it only keeps count."""

    def __init__(self, page: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = mmap.mmap(-1, PAGE_NBYTES) if page is None else mmap.mmap(page, PAGE_NBYTES)
        self._clock = clock
        self._number = 0
        self._step = -1
        self._doing = ""
        self._where = b""
        self._since = clock()
        self._longest: dict[tuple[str, bool], float] = {}
        self._ended: dict[str, int] = {}
        self._spelled: dict[tuple[str, str], bytes] = {}
        self._inside: dict[int, bytes] = {}
        self._last_beat = 0.0
        self._longest_pause = 0.0
        self._is_held = False
        self._is_unwound = False
        self._timed: set[str] = set()

    def beat(self) -> None:
        now = self._clock()
        if self._last_beat and self._ended:
            self._longest_pause = max(self._longest_pause, now - self._last_beat)
        self._last_beat = now
        _BEAT.pack_into(self._memory, 0, now, self._longest_pause)

    @contextmanager
    def doing(self, activity: str, step: Step) -> Iterator[None]:
        """Around something that is done again and again, and that has a usual duration."""
        before = BETWEEN if self._is_unwound else self._doing, self._step
        self._is_unwound = False
        self._ended[before[0]] = self._ended.get(before[0], 0) + 1
        self._turn(activity, int(step), self._where)
        try:
            yield
        except BaseException:
            # It ends the process, and the page tells what it was doing; or the loop catches it, and goes on.
            self._is_unwound = True
            raise
        self._ended[activity] = self._ended.get(activity, 0) + 1
        self._turn(*before, self._where)

    def begin(self, step: Step) -> None:
        """Whatever is not an activity of its own is between two steps from here on."""
        self._turn(BETWEEN, int(step), b"")

    def end(self) -> None:
        """From here on nothing takes a usual time."""
        self._turn("", self._step, b"")

    def hold(self) -> None:
        """The job stops and recovers, which has no usual duration."""
        self._is_held = True

    def release(self) -> None:
        """It goes on. What comes first may take longer than usual, for instance where connections are made."""
        self._timed.update(activity for activity, count in self._ended.copy().items() if count >= SAMPLES)
        self._ended.clear()
        self._since = self._clock()  # what the main thread waits in until it hears of this is not usual, either
        self._is_held = False

    def enter(self, group: str, operation: str) -> None:
        """This thread waits for others in an operation from here on; a group of none is something else to wait for."""
        key = (group, operation)
        if (spelled := self._spelled.get(key)) is None:
            text = f"{operation} of {group}" if group else operation
            spelled = self._spelled[key] = text.encode()[:192]
        self._inside[threading.get_ident()] = spelled
        self._turn(self._doing, self._step, spelled)

    def leave(self) -> None:
        self._inside.pop(threading.get_ident(), None)
        self._turn(self._doing, self._step, next(iter(self._inside.copy().values()), b""))

    def _turn(self, doing: str, step: int, where: bytes) -> None:
        now = self._clock()
        kind = (self._doing, bool(self._where))
        stretch = now - self._since
        if not self._is_held and stretch > self._longest.get(kind, 0.0):
            self._longest[kind] = stretch
        self._doing, self._step, self._where, self._since = doing, step, where, now
        self._number += 1
        longest, ended = self._longest.get((doing, bool(where)), 0.0), self._ended.get(doing, 0)
        _STATE.pack_into(
            self._memory,
            _STATE_AT,
            self._number,
            step,
            now,
            longest,
            ended,
            doing in self._timed,
            doing.encode()[:96],
            where,
            self._number,
        )


class PulseReader:
    """The agent's side. Owns the descriptor."""

    def __init__(self, page: int) -> None:
        self._page = page
        self._memory = mmap.mmap(page, PAGE_NBYTES, prot=mmap.PROT_READ)

    def read(self) -> Reading | None:
        """Nothing if nothing was written yet, or if it is being written just now."""
        for _ in range(_LOOKS):
            state = _STATE.unpack_from(self._memory, _STATE_AT)
            number, step, since, longest, seen, was_timed, doing, where, again = state
            if number == again:
                beat, longest_pause = _BEAT.unpack_from(self._memory, 0)
                if not number or not beat:
                    return None
                said = _text(doing), Step(step), _text(where)
                return Reading(beat, longest_pause, *said, since, longest, seen, was_timed)
        return None

    def close(self) -> None:
        self._memory.close()
        os.close(self._page)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
