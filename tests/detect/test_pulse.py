"""The page by which an agent sees what a trainer does."""

import os
import signal
import time
from dataclasses import replace

import pytest

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.pace import BETWEEN, OnDevice, Spent
from megatron_flashrecovery.detect.pulse import _SLOTS_AT, Pulse, PulseReader, make_page


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def page(clock):
    descriptor = make_page()
    reader = PulseReader(descriptor)
    yield Pulse(descriptor, clock), reader
    reader.close()


def test_before_anything_was_written_there_is_nothing_to_read(page):
    pulse, reader = page
    assert reader.read() is None
    pulse.begin(Step(0))
    assert reader.read() is None, "the session's thread has not said that it runs"


def test_a_reading_says_what_is_done_since_when_and_how_long_it_took_before(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(3))
    for seconds in (1.0, 4.0, 2.0):
        with pulse.doing("a step", Step(4)):
            clock.now += seconds
    with pulse.doing("a step", Step(7)):
        began = clock.now
        clock.now += 1.0
        found = reader.read()
    assert (found.doing, found.step, found.where) == ("a step", 7, "")
    assert (found.since, found.longest, found.seen) == (began, 4.0, 3)
    assert (reader.read().doing, reader.read().step) == (BETWEEN, 7)


def test_waiting_has_a_duration_of_its_own(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    with pulse.doing("a step", Step(1)):
        clock.now += 1.0
        pulse.enter("dp[0,2]#0", "allreduce")
        clock.now += 9.0
        assert reader.read().where == "allreduce of dp[0,2]#0"
        pulse.leave()
        clock.now += 2.0
        assert (reader.read().where, reader.read().longest) == ("", 1.0)
    with pulse.doing("a step", Step(2)):
        assert reader.read().longest == 2.0
        pulse.enter("", "the others")
        assert (reader.read().where, reader.read().longest) == ("the others", 9.0)


def test_what_a_recovery_takes_is_not_usual(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    with pulse.doing("a step", Step(1)):
        clock.now += 1.0
        pulse.hold()
        pulse.enter("world#0", "barrier")
        clock.now += 50.0
        pulse.leave()
        pulse.release()
        pulse.enter("world#0", "barrier")
        assert reader.read().longest == 0.0


def test_behind_a_recovery_nothing_has_a_usual_duration_yet(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    for step in range(5):
        with pulse.doing("a step", Step(step)):
            clock.now += 1.0
    pulse.hold()
    pulse.release()
    with pulse.doing("a step", Step(6)):
        assert (reader.read().seen, reader.read().longest, reader.read().was_timed) == (0, 1.0, True)


def test_a_loop_that_catches_an_exception_goes_on_between_two_steps(page):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    with pytest.raises(StopIteration), pulse.doing("a step", Step(5)):
        raise StopIteration
    with pulse.doing("evaluate", Step(5)):
        pass
    assert reader.read().doing == BETWEEN


def test_an_exception_leaves_what_was_done_when_it_came(page):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    with pytest.raises(ValueError, match="a bug"), pulse.doing("a step", Step(5)):
        raise ValueError("a bug")
    assert (reader.read().doing, reader.read().step) == ("a step", 5)


def test_names_of_any_length_and_language_fit(page):
    pulse, reader = page
    pulse.beat()
    with pulse.doing("å" * 500, Step(1)):
        pulse.enter("g" * 500, "allreduce")
        assert reader.read().doing.startswith("å" * 40)
        assert reader.read().where.startswith("allreduce of ggg")


def test_the_longest_silence_counts_from_the_first_activity_on(page, clock):
    pulse, reader = page
    pulse.beat()
    clock.now += 30.0  # the start
    pulse.begin(Step(0))
    pulse.beat()
    with pulse.doing("a step", Step(1)):
        pass
    clock.now += 0.4
    pulse.beat()
    assert reader.read().longest_pause == pytest.approx(0.4)


def test_a_page_tells_of_a_process_that_was_killed():
    descriptor = make_page()
    reader = PulseReader(descriptor)
    pid = os.fork()
    if pid == 0:
        pulse = Pulse(descriptor)
        pulse.beat()
        pulse.begin(Step(8))
        pulse.enter("tp[0,1]#0", "broadcast")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    found = reader.read()
    assert (found.step, found.where) == (8, "broadcast of tp[0,1]#0")
    assert found.beat <= time.monotonic()
    reader.close()


def test_only_the_own_time_of_whole_steps_is_summed_up(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    for step in (1, 2):
        with pulse.doing("a step", Step(step)):
            clock.now += 1.0
            pulse.enter("dp[0,2]#0", "allreduce")
            clock.now += 3.0
            pulse.leave()
            with pulse.doing("timers.log", Step(step)):
                clock.now += 50.0
            clock.now += 0.5
        with pulse.doing("evaluate", Step(step)):
            clock.now += 100.0
    with pulse.doing("a step", Step(3)):
        clock.now += 7.0
        pulse.enter("dp[0,2]#0", "allreduce")
        assert reader.read().spent == Spent(2, 3.0, 6.0, Step(2))


def test_a_step_that_a_recovery_disturbed_is_not_timed(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    with pulse.doing("a step", Step(1)):
        clock.now += 9.0
        pulse.hold()
        pulse.release()
        clock.now += 9.0
    with pulse.doing("a step", Step(2)):
        clock.now += 1.0
    assert reader.read().spent == Spent(1, 1.0, 0.0, Step(2))


def test_a_step_that_is_computed_again_is_not_taken_for_the_call_that_was_cut_short_in_it(page):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    with pulse.doing("a step", Step(4)):
        pulse.hold()
        with pytest.raises(KeyboardInterrupt), pulse.doing("timers.log", Step(3)):
            raise KeyboardInterrupt
        assert reader.read().doing == "timers.log", "it may still end the process"
        pulse.release()
        assert (reader.read().doing, reader.read().step) == ("a step", 4)
        with pulse.doing("timers.log", Step(3)):
            pass
        assert reader.read().doing == "a step"


def test_what_its_device_has_not_completed_is_told_with_since_when_it_gets_no_further(page, clock):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(0))
    assert reader.read().device is None
    before = OnDevice("allreduce of dp#0", 3, False, issued=7, completed=6)
    pulse.note_device(before)
    began = clock.now
    clock.now += 4.0
    pulse.note_device(replace(before, issued=9))
    assert reader.read().device == OnDevice("allreduce of dp#0", 3, False, 9, 6, began)
    pulse.note_device(replace(before, is_reached=True))
    assert reader.read().device == OnDevice("allreduce of dp#0", 3, True, 7, 6, clock.now)
    pulse.note_device(None)
    assert reader.read().device is None


def test_who_gets_on_has_not_stood(page, clock):
    pulse, _reader = page
    pulse.begin(Step(0))
    for _ in range(5):
        clock.now += 0.9
        pulse.enter("dp[0,2]#0", "allreduce")
        assert not pulse.has_stood()
    clock.now += 1.1
    assert pulse.has_stood()


def test_a_store_that_was_cut_short_is_not_seen(page):
    """Whoever dies in the middle of it has written a part of the other slot, and not that it is the newest."""
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(8))
    pulse.enter("tp[0,1]#0", "broadcast")
    before = reader.read()
    newest = pulse._head[0]
    slot = _SLOTS_AT[(newest + 1) & 1]
    pulse._memory[slot : slot + 300] = b"\xff" * 300
    assert reader.read() == before


def test_a_slot_that_is_overwritten_while_it_is_read_is_not_believed(page):
    pulse, reader = page
    pulse.beat()
    pulse.begin(Step(8))
    slot = _SLOTS_AT[pulse._head[0] & 1]
    pulse._memory[slot : slot + 8] = b"\xff" * 8
    assert reader.read() is None


def test_what_is_waited_for_only_once_is_not_kept(page):
    pulse, _reader = page
    for step in range(100):
        pulse.enter("", f"the mirror of step {step}")
        pulse.leave()
    assert not pulse._spelled
