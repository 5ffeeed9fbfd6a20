"""Who has hung, by what it was seen to take before: no limit on a hang is a constant.

A trainer's main thread either computes or waits inside an operation for others. Whoever waits is a victim; whoever
computes for much longer than it ever did in the same activity (a step, an evaluation, a checkpoint), or whose threads
do not run at all, is to blame. With a device of its own the host runs ahead, and all hosts wait for their devices when
one of these hangs; then the oldest operation that the device has not completed counts: a device that has come to it
waits for others, and one that has not is stuck before. What was never seen to end a few times (a first step) has no
limit but ``unknown``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step

NO_STEP = Step(0)
STEP, BETWEEN = "a step", "between two steps"
SAMPLES = 3


@dataclass(frozen=True)
class Pace:
    """``factor`` times the longest stretch of its kind so far, and at least ``least`` seconds, is a hang; ``unknown``
    seconds where fewer than three of a kind were seen. 0 switches the detection of hangs off. Outside of a step a loop
    may do whatever it likes, and on one rank only: there it is ``outside`` at least, and so it is for what comes first
    behind a recovery. No limit but ``factor`` is longer than ``unknown``."""

    unknown: float = 600.0
    factor: float = 4.0
    least: float = 5.0
    outside: float = 60.0

    def __post_init__(self) -> None:
        if self.unknown < 0:
            raise ConfigError(f"--hang-timeout {self.unknown:g}: give seconds, or 0 to look for no hangs")

    def limit(self, reading: Reading, longest: float) -> float:
        if reading.seen < SAMPLES and not reading.was_timed:
            return self.unknown
        is_usual = reading.doing == STEP and reading.seen >= SAMPLES
        return max(min(self.least if is_usual else self.outside, self.unknown), self.factor * longest)

    def limit_of_silence(self, reading: Reading) -> float:
        """Native code may keep the interpreter's lock, most of all in what it does for the first time. A process that
        is stopped does nothing, so it does not matter what it had begun."""
        if reading.is_stopped:
            return max(min(self.least, self.unknown), self.factor * reading.longest_pause)
        return self.limit(reading, reading.longest_pause)


@dataclass(frozen=True)
class OnDevice:
    """The oldest operation that a trainer has issued and its device has not completed, of ``issued`` ones of which
    ``completed`` are complete. ``is_reached``: nothing of its own is under way before it, so the device waits for the
    others, as it has ``since``; else it is at something of its own."""

    operation: str
    number: int
    is_reached: bool
    issued: int
    completed: int
    since: float = 0.0


@dataclass(frozen=True)
class Spent:
    """In how many steps, and how many seconds of them a trainer has computed and has waited for others, since it
    began. Only steps that no recovery disturbed are counted, the last of them ``upto``, and only what is done in them.
    """

    steps: int = 0
    computed: float = 0.0
    waited: float = 0.0
    upto: Step = NO_STEP


@dataclass(frozen=True)
class Reading:
    """What a trainer was last seen to do; times are those of one monotonic clock, in seconds.

    ``doing`` is the activity, empty before the first and behind the last. ``where`` is what the main thread waits in,
    empty while it computes, since ``since``; the ``longest`` stretch like this one in this activity, of which ``seen``
    have ended since the start or the last recovery, took as long; ``was_timed``: enough of them ended before that, too.
    ``beat`` is when the session's own thread last ran, ``longest_pause`` its longest silence. ``device`` is missing
    where the host waits for each operation itself, or everything is complete. ``is_stopped``: the operating system says
    that it lets none of its threads run.
    """

    beat: float
    longest_pause: float
    doing: str
    step: Step
    where: str
    since: float
    longest: float
    seen: int
    was_timed: bool = False
    spent: Spent = Spent()
    device: OnDevice | None = None
    is_stopped: bool = False


@dataclass(frozen=True)
class Verdict:
    """``hung`` with the evidence, ``silent`` of them those none of whose threads runs; ``waiting`` for longer than
    ever, with what for. ``slow`` are on their way to hang: half of their limit is over. ``busy`` are all that compute,
    and neither hang nor wait."""

    hung: Mapping[Rank, str] = field(default_factory=dict)
    waiting: Mapping[Rank, str] = field(default_factory=dict)
    silent: tuple[Rank, ...] = ()
    slow: tuple[Rank, ...] = ()
    busy: tuple[Rank, ...] = ()


def judge(readings: Mapping[Rank, Reading], now: float, pace: Pace, not_before: float) -> Verdict:
    """``not_before`` is from when on anybody could be seen: when training went on, or the watcher itself woke up."""
    hung: dict[Rank, str] = {}
    waiting: dict[Rank, str] = {}
    silent: list[Rank] = []
    slow: list[Rank] = []
    if not pace.unknown:
        return Verdict()
    for rank, reading in readings.items():
        if not reading.doing:
            continue
        silence = now - max(reading.beat, not_before)
        stretch = now - max(reading.since, not_before)
        limit, pause = pace.limit(reading, reading.longest), pace.limit_of_silence(reading)
        before = f"the longest before took {reading.longest:.1f} s" if reading.seen else "it never came here before"
        if silence > pause:
            silent.append(rank)
            stopped = ", it is stopped" if reading.is_stopped else ""
            hung[rank] = (
                f"none of its threads has run for {silence:.1f} s in {reading.doing}{stopped} (limit {pause:.1f} s)"
            )
        elif stretch > limit and (device := reading.device) is not None:
            # The host has run ahead: where it stands says nothing, but its device does not do two things at a time.
            lag = now - max(device.since, not_before)
            if lag > limit and device.is_reached:
                waiting[rank] = f"{device.operation}, for {lag:.1f} s in {reading.doing}, on its device"
            elif lag > limit:
                hung[rank] = (
                    f"its device has not come to {device.operation} for {lag:.1f} s in {reading.doing}: of "
                    f"{device.issued} operations it has completed {device.completed} (limit {limit:.1f} s)"
                )
            elif lag > limit / 2 and not device.is_reached:
                slow.append(rank)
        elif stretch > limit and not reading.where:
            hung[rank] = f"it has computed for {stretch:.1f} s in {reading.doing}, {before} (limit {limit:.1f} s)"
        elif stretch > limit:
            waiting[rank] = f"{reading.where}, for {stretch:.1f} s in {reading.doing}"
        elif silence > pause / 2 or (stretch > limit / 2 and _is_at_its_own(reading)):
            slow.append(rank)
    busy = [rank for rank, reading in readings.items() if reading.doing and _is_at_its_own(reading)]
    return Verdict(hung, waiting, tuple(silent), tuple(slow), tuple(rank for rank in busy if rank not in hung))


def _is_at_its_own(reading: Reading) -> bool:
    """And does not wait for others."""
    return not reading.where if reading.device is None else not reading.device.is_reached
