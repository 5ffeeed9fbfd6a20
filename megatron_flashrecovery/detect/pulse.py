"""A page of memory in which a trainer says what it does; its agent can read it at any time, also after its death.

The agent makes the page and passes its descriptor. The trainer writes with single stores into it, without a system call
and without anybody's help: so the page is true for a trainer that is stopped, that hangs with the interpreter's lock in
its hands, or that was killed in the middle of an operation.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.pace import BETWEEN, SAMPLES, STEP, OnDevice, Reading, Spent

PAGE_NBYTES = 4096
_BEAT = struct.Struct("<dd")
"""When the session's thread last ran, and its longest silence."""
_HEAD_AT = 32
"""The number of the newest store. It is written last, so that a store that was cut short is never looked at."""
_SLOTS_AT = (64, 576)
"""Stores go to these two in turns: by the parity of their number."""
_PLACE = struct.Struct("<Qdd192sQ")
"""Number, since, longest, operation, number again."""
_store_place = _PLACE.pack_into
_ACTIVITY = struct.Struct("<qQ?96sQddq")
"""Step, seen, timed before, activity; steps that were timed, seconds computed and waited in them, the last of them."""
_ACTIVITY_AT = _PLACE.size
_SLOT_NBYTES = _PLACE.size + _ACTIVITY.size
_DEVICE = struct.Struct("<QQQQQ?d192sQ")
"""Number, whether there is anything, number of the operation, issued, completed, reached, since, operation, number
again. The session's thread alone writes it."""
_DEVICE_AT = 1088
_LOOKS = 10
_STOOD = 1.0
_NOTHING = OnDevice("", 0, False, 0, 0)


def make_page() -> int:
    """The descriptor of an empty page; whoever has it can read and write."""
    page = os.memfd_create("flashrecovery-pulse", os.MFD_CLOEXEC)
    os.ftruncate(page, PAGE_NBYTES)
    return page


class _Stretches:
    """The longest so far, and the sum since the activity last began."""

    __slots__ = ("longest", "spent")

    def __init__(self) -> None:
        self.longest = self.spent = 0.0


class _Kind:
    """What is known of an activity: how long it computes and waits, how often it ended, and whether it did so often
    enough before the last recovery."""

    __slots__ = ("computing", "ended", "spelled", "waiting", "was_timed")

    def __init__(self, activity: str) -> None:
        self.spelled = activity.encode()[:96]
        self.computing = _Stretches()
        self.waiting = _Stretches()
        self.ended = 0
        self.was_timed = False


class Pulse:
    """The trainer's side. ``beat`` is for the session's thread; everything else is for the threads that train, which
    hold the interpreter's lock while they write. Without a page it only keeps count.

    Entering and leaving an operation happens thousands of times in a step, so it writes only what it changes."""

    def __init__(self, page: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = mmap.mmap(-1, PAGE_NBYTES) if page is None else mmap.mmap(page, PAGE_NBYTES)
        self._head = memoryview(self._memory)[_HEAD_AT : _HEAD_AT + 8].cast("Q")
        self._clock = clock
        self._number = 0
        self._step = -1
        self._doing = ""
        self._outermost: tuple[str, int] | None = None
        self._kinds: dict[str, _Kind] = {}
        self._kind = self._kind_of("")
        self._stretches = self._kind.computing
        self._where = b""
        self._since = clock()
        self._stale = 0
        """How many of the two slots lack the activity of now."""
        self._spelled: dict[tuple[str, str], bytes] = {}
        self._inside: dict[int, bytes] = {}
        self._last_beat = 0.0
        self._longest_pause = 0.0
        self._is_held = False
        self._is_undisturbed = False
        self._is_unwound = False
        self._has_begun = False
        """Since the start, or the last recovery: until then no silence is a usual one."""
        self._steps = 0
        self._computed = self._waited = 0.0
        self._timed_upto = 0
        self._looks = 0
        self._device: OnDevice | None = None

    def beat(self) -> None:
        now = self._clock()
        if self._last_beat and self._has_begun:
            self._longest_pause = max(self._longest_pause, now - self._last_beat)
        self._last_beat = now
        _BEAT.pack_into(self._memory, 0, now, self._longest_pause)

    def has_stood(self) -> bool:
        """For a second, computing or waiting: only then it matters where its device is."""
        return self._clock() - self._since > _STOOD

    def note_device(self, device: OnDevice | None) -> None:
        """What the device has not completed. For the session's thread, now and then."""
        before, self._device = self._device, None
        if device is not None:
            is_same = before is not None and _stuck_at(device) == _stuck_at(before)
            self._device = replace(device, since=before.since if before is not None and is_same else self._clock())
        elif before is None:
            return
        self._looks += 1
        said = self._device or _NOTHING
        numbers = self._device is not None, said.number, said.issued, said.completed, said.is_reached, said.since
        where = said.operation.encode()[:192]
        _DEVICE.pack_into(self._memory, _DEVICE_AT, self._looks, *numbers, where, self._looks)

    @contextmanager
    def doing(self, activity: str, step: Step) -> Iterator[None]:
        """Around something that is done again and again, and that has a usual duration."""
        before = self._doing, self._step
        if self._is_unwound:
            before = self._outermost or (BETWEEN, self._step)
        is_outermost = self._outermost is None
        if is_outermost:
            self._outermost = activity, int(step)
        self._is_unwound = False
        self._has_begun = True
        self._kind_of(before[0]).ended += 1
        self._turn_to(activity, int(step))
        kind = self._kind
        if is_outermost:
            kind.computing.spent = kind.waiting.spent = 0.0
            self._is_undisturbed = not self._is_held
        try:
            yield
        except BaseException:
            # It ends the process, and the page tells what it was doing; or the loop catches it, and goes on.
            self._is_unwound = True
            if is_outermost:
                self._outermost = None
            raise
        kind.ended += 1
        self._turn(self._where)
        if is_outermost:
            self._outermost = None
            if activity == STEP and self._is_undisturbed:
                self._steps += 1
                self._computed += kind.computing.spent
                self._waited += kind.waiting.spent
                self._timed_upto = int(step)
        # What follows a step is behind that step, not behind the one before the loop.
        self._turn_to(before[0], int(step) if before[0] == BETWEEN else before[1])

    def begin(self, step: Step) -> None:
        """Whatever is not an activity of its own is between two steps from here on."""
        self._where = b""
        self._turn_to(BETWEEN, int(step))

    def end(self) -> None:
        """From here on nothing takes a usual time."""
        self._where = b""
        self._turn_to("", self._step)

    def hold(self) -> None:
        """The job stops and recovers, which has no usual duration."""
        self._is_held, self._is_undisturbed = True, False

    def release(self) -> None:
        """It goes on. What comes first may take longer than usual, for instance where connections are made."""
        for kind in list(self._kinds.values()):
            kind.was_timed = kind.was_timed or kind.ended >= SAMPLES
            kind.ended = 0
        self._has_begun = False
        if self._is_unwound and self._outermost is not None:
            # What was cut short inside of it is not what is done now.
            self._is_unwound = False
            self._turn_to(*self._outermost)
        self._since = self._clock()  # what the main thread waits in until it hears of this is not usual, either
        self._is_held = False
        self._stale = 2

    def enter(self, group: str, operation: str) -> None:
        """This thread waits for others in an operation from here on; a group of none is something else to wait for."""
        if group:
            key = (group, operation)
            spelled = self._spelled.get(key)
            if spelled is None:
                spelled = self._spelled[key] = f"{operation} of {group}".encode()[:192]
        else:
            spelled = operation.encode()[:192]
        self._inside[get_ident()] = spelled
        self._turn(spelled)

    def leave(self) -> None:
        inside = self._inside
        inside.pop(get_ident(), None)
        self._turn(next(iter(inside.copy().values()), b"") if inside else b"")

    def _kind_of(self, activity: str) -> _Kind:
        kind = self._kinds.get(activity)
        if kind is None:
            kind = self._kinds[activity] = _Kind(activity)
        return kind

    def _turn_to(self, doing: str, step: int) -> None:
        self._turn(self._where)
        self._doing, self._step, self._kind = doing, step, self._kind_of(doing)
        self._stale = 2
        self._turn(self._where)

    def _turn(self, where: bytes) -> None:
        now = self._clock()
        kind, ended = self._kind, self._stretches
        stretch = now - self._since
        ended.spent += stretch
        if stretch > ended.longest and not self._is_held:
            ended.longest = stretch
        self._stretches = begun = kind.waiting if where else kind.computing
        self._where = where
        self._since = now
        self._number = number = self._number + 1
        slot = _SLOTS_AT[number & 1]
        if self._stale:
            self._stale -= 1
            self._write_activity(slot + _ACTIVITY_AT, kind)
        _store_place(self._memory, slot, number, now, begun.longest, where, number)
        self._head[0] = number

    def _write_activity(self, at: int, kind: _Kind) -> None:
        totals = self._steps, self._computed, self._waited, self._timed_upto
        _ACTIVITY.pack_into(self._memory, at, self._step, kind.ended, kind.was_timed, kind.spelled, *totals)


class PulseReader:
    """The agent's side. Owns the descriptor."""

    def __init__(self, page: int) -> None:
        self._page = page
        self._memory = mmap.mmap(page, PAGE_NBYTES, prot=mmap.PROT_READ)
        self._head = memoryview(self._memory)[_HEAD_AT : _HEAD_AT + 8].cast("Q")
        self._beat = (0.0, 0.0)

    def read(self) -> Reading | None:
        """Nothing if nothing was written yet, or if it is being written just now."""
        for _ in range(_LOOKS):
            number = self._head[0]
            at = _SLOTS_AT[number & 1]
            slot = self._memory[at : at + _SLOT_NBYTES]
            if self._head[0] != number:
                continue
            first, since, longest, where, again = _PLACE.unpack_from(slot)
            if not first == again == number:
                continue
            beat, longest_pause = _BEAT.unpack_from(self._memory, 0)
            if beat:
                self._beat = beat, longest_pause  # else it is in the middle of being written, perhaps for ever
            if not number or not self._beat[0]:
                return None
            step, seen, was_timed, doing, *spent = _ACTIVITY.unpack_from(slot, _ACTIVITY_AT)
            said = _text(doing), Step(step), _text(where)
            told = Spent(*spent), self._read_device()
            return Reading(self._beat[0], self._beat[1], *said, since, longest, seen, was_timed, *told)
        return None

    def _read_device(self) -> OnDevice | None:
        for _ in range(_LOOKS):
            state = _DEVICE.unpack(self._memory[_DEVICE_AT : _DEVICE_AT + _DEVICE.size])
            first, is_behind, number, issued, completed, is_reached, since, where, again = state
            if first == again:
                return OnDevice(_text(where), number, is_reached, issued, completed, since) if is_behind else None
        return None

    def close(self) -> None:
        self._head.release()
        self._memory.close()
        os.close(self._page)


def _stuck_at(device: OnDevice) -> tuple[str, int, bool, int]:
    return device.operation, device.number, device.is_reached, device.completed


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
