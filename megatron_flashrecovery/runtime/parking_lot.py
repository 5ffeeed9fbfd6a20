"""Where the threads of a trainer stop when the job stops, and how each of them is let go again.

Orders arrive on the session's own thread; the main thread (or an autograd thread that it drives) stands here until one
of them says how its stop ends. While nothing is wrong, an operation pays for one read of a flag.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from megatron_flashrecovery.comm.parking import Answer, Interrupted, Proceed, Verdict
from megatron_flashrecovery.core.errors import FlashRecoveryError
from megatron_flashrecovery.core.ids import GroupKey, Rank, Step
from megatron_flashrecovery.core.messages import ExecutePlan
from megatron_flashrecovery.core.reports import Match, Spot, Standing, Told
from megatron_flashrecovery.detect.exceptions import leaves_device_unusable
from megatron_flashrecovery.detect.pulse import Pulse

_PROCEED = Proceed()
_NOTICE = 10.0


class AnswerMismatch(FlashRecoveryError):
    """A told result is for another operation than the one that waits for it: the two ranks did different things."""


class NoRecovery(FlashRecoveryError):
    """Something failed, and nobody ordered a recovery within the deadline."""


@dataclass(frozen=True)
class Stand:
    """Where a thread has stopped."""

    standing: Standing
    spot: Spot | None


class ParkingLot:
    """Implements ``comm.parking.Parking`` for one rank.

    ``on_stand`` is called without the lock held, on the thread that has just stopped or started to stand elsewhere; it
    reports to the agent. ``on_match`` issues counterparts of what others are in, on the thread that stands, and returns
    when they are over. ``pulse`` is told what a thread waits for, ``on_failure`` what fails before the order to stop.
    """

    def __init__(
        self,
        order_timeout: float,
        on_stand: Callable[[], None],
        on_match: Callable[[Sequence[Match]], None],
        pulse: Pulse | None = None,
        on_failure: Callable[[Spot, Exception], None] = lambda _spot, _error: None,
    ) -> None:
        self._pulse = pulse or Pulse(None)
        self._on_failure = on_failure
        self._order_timeout = order_timeout
        self._on_stand = on_stand
        self._on_match = on_match
        self._changed = threading.Condition()
        self._stopping = False
        self._executing = False
        self._begun = False
        self._released = False
        self._go = False
        self._matches: tuple[Match, ...] = ()
        self._answers: deque[Told] = deque()
        self._answering = False
        self._plan: ExecutePlan | None = None
        self._stand: Stand | None = None
        self._here: Stand | None = None
        """Where a thread stands also while the order to go is on its way to it."""
        self._stopped_since = 0.0
        self._told: list[Told] = []
        self._telling: Step | None = None
        self._foretold: deque[tuple[GroupKey, str, bytes]] = deque()

    # --- the session's thread -----------------------------------------------------------------------------------------

    @property
    def stand(self) -> Stand | None:
        return self._stand

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def executing(self) -> bool:
        """A plan is being carried out: operations go ahead, although the job is stopped."""
        return self._executing

    @property
    def stopped_since(self) -> float:
        return self._stopped_since

    def stop(self) -> None:
        """From now on every thread stands before its next operation. A plan that was not begun is void, and so is an
        order that has not woken its thread yet: it stands where it stood."""
        with self._changed:
            self._pulse.hold()
            self._stopping, self._executing = True, False
            self._stopped_since = time.monotonic()
            self._go, self._answering, self._plan, self._matches = False, False, None, ()
            self._answers.clear()
            self._stand = self._here
            self._changed.notify_all()

    def let_go(self) -> None:
        """Such an order has come. Where it stands is over with the order, not only once that is carried out, or its
        thread has woken up: it must not be told as the answer to it."""
        with self._changed:
            self._stand = None

    def get_out_of_the_way(self, advance: bool, answer: Sequence[Told] | None, matches: tuple[Match, ...] = ()) -> None:
        """Let go of who stands here: for one operation, to finish the update with these results, or only until these
        counterparts are over."""
        with self._changed:
            self._stopped_since = time.monotonic()
            if answer is not None:
                self._answers.extend(answer)
                self._answering = True
            if advance or answer is not None:
                self._go, self._stand = True, None
            if matches:
                self._matches, self._stand = matches, None
            self._changed.notify_all()

    def execute(self, plan: ExecutePlan) -> None:
        with self._changed:
            self._plan = plan
            self._changed.notify_all()

    def begin(self) -> None:
        with self._changed:
            self._begun = True
            self._changed.notify_all()

    def resume(self) -> None:
        with self._changed:
            self._pulse.release()
            self._stopping = self._executing = False
            self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def notify(self) -> None:
        """Something that a waiting thread looks at has changed (a mirror was acknowledged)."""
        with self._changed:
            self._changed.notify_all()

    @property
    def told(self) -> tuple[Told, ...]:
        """Results of small reductions since the gate before last."""
        return tuple(self._told)

    # --- the main thread ----------------------------------------------------------------------------------------------

    @property
    def answering(self) -> bool:
        """This rank finishes its update while the job is stopped, with results that others have."""
        return self._answering

    def foretell(self, group: GroupKey, operation: str, results: Sequence[bytes]) -> None:
        """Until the step is over: the next operations of that name on that group have these results."""
        self._foretold = deque((group, operation, result) for result in results)

    def before(self, spot: Spot) -> Verdict:
        if self._foretold and (spot.group, spot.operation) == self._foretold[0][:2]:
            return Answer([self._foretold.popleft()[2]])
        if not self._stopping or self._executing:
            return _PROCEED
        answer = self._next_answer(spot)
        return self._stay(Stand(Standing.PARKED, spot)) if answer is None else answer

    def failed(self, spot: Spot, error: Exception) -> Verdict:
        if not self._stopping or self._executing:
            self._on_failure(spot, error)
        self._pulse.enter("", "the order to stop")
        with self._changed:
            ordered = self._changed.wait_for(lambda: self._stopping and not self._executing, self._order_timeout)
        self._pulse.leave()
        if not ordered:
            raise error
        answer = self._next_answer(spot)
        return self._stay(Stand(Standing.CAUGHT, spot)) if answer is None else answer

    def completed(self, spot: Spot, results: Sequence[bytes] | None) -> None:
        if self._telling is not None and results is not None:
            self._told.append(Told(spot.operation, msgspec.msgpack.encode(list(results)), self._telling))

    def begin_telling(self, step: Step) -> None:
        """This rank is at the gate of the update to ``step``."""
        self._told = [told for told in self._told if told.step == step - 1]
        self._telling = step

    def end_telling(self) -> None:
        """That step is over, or given up."""
        self._telling = None
        self._foretold.clear()

    def blocked_by(self, rank: Rank) -> None:
        """The agent of that rank's node sees its death first."""

    def check(self) -> None:
        """A place between operations: stand here if the job stops. Raises ``Interrupted``."""
        if self._stopping and not self._executing:
            self._stay(Stand(Standing.PARKED, None))

    @contextmanager
    def discarding(self, is_before_update: Callable[[], bool]) -> Iterator[None]:
        """Around a call of the framework that is repeated if the job stops. From then on its operations may end with
        void contents, on which it may choke: then it stands here, as it would before its next operation. What it did
        is discarded anyway, and what is wrong without void contents too will be wrong again."""
        try:
            yield
        except FlashRecoveryError:
            raise
        except Exception as error:
            is_ours = self._stopping and not self._executing and is_before_update()
            if not is_ours or leaves_device_unusable(error):
                raise
            print(f"flashrecovery: given up while the job stops: {type(error).__name__}: {error}", flush=True)
            self.check()

    def wait_until(self, claim: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Wait for ``claim`` at a place between operations. Raises ``Interrupted`` if the job stops meanwhile, and
        ``NoRecovery`` after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._pulse.enter("", what)
        try:
            self._wait_until(claim, what, timeout, deadline)
        finally:
            self._pulse.leave()

    def _wait_until(self, claim: Callable[[], bool], what: str, timeout: float | None, deadline: float | None) -> None:
        while True:
            with self._changed:
                notice = time.monotonic() + _NOTICE
                while not claim() and not (self._stopping and not self._executing):
                    self._changed.wait(0.5)
                    now = time.monotonic()
                    if deadline is not None and now > deadline:
                        raise NoRecovery(f"waited {timeout} s for {what}")
                    if now > notice:
                        notice = now + _NOTICE
                        print(f"flashrecovery: still waiting for {what}", flush=True)
                if claim() and not (self._stopping and not self._executing):
                    return
            self.check()
            self._pulse.enter("", what)

    def wait_until_begun(self) -> None:
        """As long as it takes: the one who is late may be ended, but not those who wait for it."""
        self.wait_until(lambda: self._begun, "the other ranks to come to their first step")

    def wait_for_plan(self) -> None:
        """For a replacement: until there is the plan that it joins by, or another loss has overtaken it already."""
        with self._changed:
            self._changed.wait_for(lambda: self._plan is not None or self._stopping)

    def take_plan(self) -> ExecutePlan:
        """The plan that ``Interrupted`` unwound for; from now on operations go ahead, for they carry it out. If another
        loss has overtaken it since, the one that follows."""
        while True:
            with self._changed:
                if self._plan is not None:
                    plan, self._plan = self._plan, None
                    self._executing = self._stopping = True
                    return plan
            try:
                self._stay(Stand(Standing.PARKED, None))
            except Interrupted:
                continue

    def stops_within(self, seconds: float) -> bool:
        """Whether another loss overtakes the plan that is being executed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping and not self._executing, seconds)

    def wait_until_over(self) -> None:
        """After the plan is executed: until everybody has. Raises ``Interrupted`` if another loss comes first."""
        self.wait_until(lambda: not self._executing, "the other ranks to execute the plan")

    def wait_until_released(self) -> None:
        self.wait_until(lambda: self._released, "the other ranks to finish")

    # --- both ---------------------------------------------------------------------------------------------------------

    def _next_answer(self, spot: Spot) -> Verdict | None:
        with self._changed:
            if not self._answers:
                return None
            told = self._answers.popleft()
        if told.operation != spot.operation:
            raise AnswerMismatch(f"{spot.operation} on {spot.group} was told the result of {told.operation}")
        self._told.append(told)
        return Answer(msgspec.msgpack.decode(told.payload, type=list[bytes]))

    def _stay(self, stand: Stand) -> Verdict:
        self._pulse.enter("", "the order how to go on")
        try:
            return self._stay_until_told(stand)
        finally:
            self._pulse.leave()

    def _stay_until_told(self, stand: Stand) -> Verdict:
        while True:
            with self._changed:
                self._stand = self._here = stand
            self._on_stand()
            with self._changed:
                self._changed.wait_for(lambda: self._go or self._plan is not None or self._matches)
                self._stand = self._here = None
                if self._plan is not None:
                    raise Interrupted(self._plan.resume_step)
                matches, self._matches = self._matches, ()
                if not matches:
                    self._go = False
                    answer = None if stand.spot is None else self._next_answer(stand.spot)
                    return _PROCEED if answer is None else answer
            self._on_match(matches)
