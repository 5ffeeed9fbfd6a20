"""What an agent sees of its trainers, and when it tells."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_flashrecovery.core.ids import Epoch, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import ExecutePlan, Park, RanksHung, Resume, StepsTimed
from megatron_flashrecovery.core.pace import Pace
from megatron_flashrecovery.detect.pulse import Pulse
from megatron_flashrecovery.runtime.dialogue import Raised
from megatron_flashrecovery.runtime.node_messages import LastWords
from megatron_flashrecovery.runtime.watch import Watch, in_words


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    watch = Watch(NodeId("node0"), Pace(), clock)
    yield watch
    watch.keep_only(())


def trainer(watch, clock, rank, steps=4):
    """One that has made some steps, or has just come."""
    worker = SimpleNamespace(id=WorkerId(f"rank{rank}.1"), pid=None)
    page, _stacks = watch.take(worker.id)
    pulse = Pulse(page, clock)
    pulse.beat()
    pulse.begin(Step(0))
    for step in range(steps):
        with pulse.doing("a step", Step(step + 1)):
            clock.now += 0.1
    return (Rank(rank), worker), pulse


def wait(watch, clock, pulses, seconds, seated, kind=RanksHung):
    """Time passes, the session's threads run, and the agent looks."""
    told = []
    for _ in range(int(seconds / 0.5)):
        clock.now += 0.5
        for pulse in pulses:
            pulse.beat()
        told += [event for event in watch.look(Epoch(0), seated) if isinstance(event, kind)]
    return told


def test_one_that_computes_for_ever_is_told_once_and_again_when_it_goes_on(watch, clock):
    seat, pulse = trainer(watch, clock, 0)
    with pulse.doing("a step", Step(5)):
        slow, event = wait(watch, clock, [pulse], 8.0, [seat])
        assert (slow.hung, slow.slow) == ({}, (0,))
        assert event.hung.keys() == {0}
        assert (event.step, event.waiting) == (5, {})
    (event,) = wait(watch, clock, [pulse], 2.0, [seat])
    assert not event.hung


def test_one_that_is_stopped_right_behind_a_recovery_is_told_as_soon_as_any_other(watch, clock, stopped_process):
    seat, pulse = trainer(watch, clock, 0, steps=1)
    with pulse.doing("a step", Step(5)):
        assert not wait(watch, clock, [], 6.0, [seat])
        seat[1].pid = stopped_process
        (event,) = wait(watch, clock, [], 1.0, [seat])
    assert event.silent == (0,)
    assert "it is stopped" in event.hung[Rank(0)]


@pytest.fixture
def stopped_process():
    process = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
    os.waitpid(process.pid, os.WUNTRACED)
    yield process.pid
    process.kill()
    process.wait()


PARK = Park(Epoch(1), OrderNumber(1), ())
EXECUTE = ExecutePlan(NodeId("node0"), Epoch(1), OrderNumber(2), Step(4), False, ())
RESUME = Resume(Epoch(1), OrderNumber(3), Step(4))


def test_of_those_that_are_to_stop_it_is_told_who_is_busy_and_who_runs_no_more(watch, clock):
    (seat, pulse), (other, waiting), (third, stopped) = (trainer(watch, clock, rank) for rank in range(3))
    for each in (pulse, waiting, stopped):
        each.doing("a step", Step(5)).__enter__()
    watch.heed(PARK)
    waiting.enter("", "the order how to go on")
    told = wait(watch, clock, [pulse, waiting], 12.0, [seat, other, third])
    assert [(event.busy, event.silent) for event in told[:2]] == [((0, 2), ()), ((), (2,))]
    assert told[1].hung.keys() == {0, 2}, "both are at their limits"
    assert not any(event.waiting or event.slow for event in told)


def test_nobody_is_looked_at_while_a_plan_is_executed(watch, clock):
    seat, pulse = trainer(watch, clock, 0)
    watch.heed(PARK)
    watch.heed(EXECUTE)
    with pulse.doing("a step", Step(5)):
        assert wait(watch, clock, [pulse], 60.0, [seat]) == []
        watch.heed(RESUME)
        assert not any(event.hung for event in wait(watch, clock, [pulse], 4.0, [seat]))
        assert wait(watch, clock, [pulse], 4.0, [seat])[-1].hung


def test_an_agent_that_was_asleep_has_seen_nobody_hang(watch, clock):
    seat, pulse = trainer(watch, clock, 0)
    watch.look(Epoch(0), [seat])
    with pulse.doing("a step", Step(5)):
        clock.now += 100.0
        assert watch.look(Epoch(0), [seat]) == []
        assert wait(watch, clock, [pulse], 8.0, [seat])[-1].hung


def test_whoever_could_make_nothing_of_it_hears_it_again(watch, clock):
    seat, pulse = trainer(watch, clock, 0)
    with pulse.doing("a step", Step(5)):
        told = [event for event in wait(watch, clock, [pulse], 30.0, [seat]) if event.hung]
    assert len(told) == 3


def test_the_own_time_of_steps_is_told_once_they_have_been_made(watch, clock):
    seat, pulse = trainer(watch, clock, 0)
    watch.look(Epoch(0), [seat])
    for step in range(4):
        with pulse.doing("a step", Step(5 + step)):
            clock.now += 0.2
            pulse.enter("dp[0,1]#0", "allreduce")
            clock.now += 0.1
            pulse.leave()
    (event,) = wait(watch, clock, [pulse], 0.5, [seat], StepsTimed)
    assert event == StepsTimed(NodeId("node0"), Epoch(0), Step(8), {0: pytest.approx(0.2)}, {0: pytest.approx(0.1)})


def test_the_last_words_of_a_dead_one_are_told_once(watch, clock):
    (rank, worker), pulse = trainer(watch, clock, 3)
    watch.note_raised(worker.id, Raised("ValueError at train.py:3 in step", "Traceback ..."))
    pulse.enter("tp[2,3]#0", "broadcast")
    words = watch.last_words(rank, worker.id)
    assert (words.step, words.where, words.raised) == (4, "broadcast of tp[2,3]#0", "ValueError at train.py:3 in step")
    assert watch.last_words(rank, worker.id) == LastWords(rank, worker.id)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (LastWords(Rank(1), WorkerId("w"), Step(7), "a step"), " at step 7"),
        (LastWords(Rank(1), WorkerId("w"), Step(7), "a step", "barrier of g"), " at step 7, in barrier of g"),
        (LastWords(Rank(1), WorkerId("w"), Step(7), "save_checkpoint"), " at step 7 in save_checkpoint"),
        (LastWords(Rank(1), WorkerId("w")), ""),
    ],
)
def test_what_it_did_last_in_half_a_sentence(words, said):
    assert in_words(words) == said


def test_nothing_is_kept_of_those_that_are_gone(watch, clock):
    trainer(watch, clock, 0)
    watch.keep_only(())
    assert watch.last_words(Rank(0), WorkerId("rank0.1")) == LastWords(Rank(0), WorkerId("rank0.1"))
