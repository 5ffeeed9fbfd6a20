"""What is done about numbers that are not finite, and about peers that hold different parameters."""

from dataclasses import replace

import pytest

from megatron_flashrecovery.core.findings import Finding, NumbersBad, NumbersSound, PeersDiffered, first_of
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.messages import (
    CheckpointWritten,
    ClockTicked,
    ExecutePlan,
    Fence,
    NodeJoined,
    Park,
    RestartAll,
    Stop,
)
from megatron_flashrecovery.core.phases import Training
from megatron_flashrecovery.core.policy import Fault, NanChoice
from tests.core.jobs import SEATS, A, B, described, executed, lost, play, ready, report, stood, training_job

STEP = Step(6)


def bad(node=A, ranks=(0, 1), own=(), findings=(), choice=NanChoice.STOP, epoch=0, step=STEP):
    found = {Rank(rank): Finding(number, where, "output") for rank, number, where in findings}
    own = {Rank(rank): "gradient" for rank in own}
    return NumbersBad(node, Epoch(epoch), step, tuple(map(Rank, ranks)), "the norm is nan", own, found, choice)


def everybody(job, now=10.0, **named):
    """All ranks say so; what one of them knows comes with the first."""
    play(job, bad(A, epoch=job.epoch, **named), now=now)
    return play(job, bad(B, (2, 3), epoch=job.epoch, choice=named.get("choice", NanChoice.STOP)), now=now)


def go_back(job, without=None, now=20.0):
    """Everybody parks before the update, executes the plan, and trains again. Returns the plan."""
    epoch, number = job.epoch, job.number
    commands = play(job, ready(A, without, epoch=epoch), now=now) if without is not None else []
    for ranks in SEATS.values():
        reports = [report(rank, step=5) for rank in ranks if rank != without]
        commands = play(job, stood(*reports, epoch=epoch, number=number), now=now)
    play(job, executed(A, 0, 1, epoch=epoch), executed(B, 2, 3, epoch=epoch), now=now)
    assert isinstance(job.phase, Training)
    return [command for command in commands if isinstance(command, ExecutePlan)]


def start_again(job, now=60.0):
    epoch = job.epoch
    play(job, described(A, epoch=epoch), described(B, epoch=epoch), now=now)
    play(job, ready(A, 0, 1, epoch=epoch), ready(B, 2, 3, epoch=epoch), now=now)


def test_the_first_time_everybody_goes_back_and_looks_closely():
    job = training_job()
    (park,) = everybody(job)
    assert park == Park(1, job.number, ())
    assert {(plan.resume_step, plan.examine, plan.skip) for plan in go_back(job)} == {(5, STEP, ())}


def test_what_is_decided_waits_a_moment_for_those_who_know_more():
    job = training_job()
    assert play(job, bad(A), now=10.0) == []
    assert job.next_deadline == 11.0
    assert play(job, ClockTicked(), now=10.9) == []
    assert [type(command) for command in play(job, ClockTicked(), now=11.0)] == [Park]


@pytest.mark.parametrize("repeated", [bad(A), bad(A, own=[1])], ids=["the-same", "with-more"])
def test_told_twice_or_late_it_changes_nothing(repeated):
    job = training_job()
    play(job, repeated, now=10.0)
    everybody(job)
    assert job.numbers.times[STEP] == 1
    assert play(job, repeated) == []
    assert job.epoch == 1


def test_again_on_the_same_data_it_stops_and_says_where_it_began():
    job = training_job()
    everybody(job)
    go_back(job)
    (stop,) = everybody(job, now=30.0, findings=[(1, 7, "layer.3"), (0, 9, "layer.4")])
    assert isinstance(stop, Stop)
    assert "step 6: the norm is nan, again on the same data, first in the output of layer.3 on rank 1" in stop.reason
    assert "--flash-recovery-nan skip" in stop.reason


def test_a_step_that_is_skipped_stays_skipped_whoever_is_lost():
    job = training_job()
    everybody(job, choice=NanChoice.SKIP)
    go_back(job)
    everybody(job, now=30.0, choice=NanChoice.SKIP)
    assert {(plan.examine, plan.skip) for plan in go_back(job, now=31.0)} == {(None, (STEP,))}
    play(job, lost(A, 1, kept=(4, 5), life=2), now=40.0)
    assert {plan.skip for plan in go_back(job, without=1, now=41.0)} == {(STEP,)}


def test_a_step_that_is_skipped_stays_skipped_behind_a_checkpoint():
    job = training_job()
    play(job, CheckpointWritten(Step(3)))
    job.numbers.skipped.update({STEP, Step(2)})
    play(job, PeersDiffered(A, Epoch(0), Step(5), Rank(0), Rank(2), 2, "part 1"), now=10.0)
    assert play(job, ClockTicked(), now=11.0)[-1].skip == (STEP,)


def test_retried_too_often_it_falls_back_once_and_then_stops():
    job = training_job()
    play(job, CheckpointWritten(Step(3)))
    for now in (10.0, 30.0):
        everybody(job, now=now, choice=NanChoice.RETRY)
        go_back(job, now=now + 1)
    (restart,) = everybody(job, now=50.0, choice=NanChoice.RETRY)
    assert isinstance(restart, RestartAll)
    start_again(job)
    (stop,) = everybody(job, now=70.0, choice=NanChoice.RETRY)
    assert isinstance(stop, Stop)


@pytest.mark.parametrize(
    ("own", "suspect"),
    [pytest.param([1], 1, id="one"), pytest.param([0, 1], None, id="it-had-spread"), pytest.param([], None, id="none")],
)
def test_what_does_not_come_again_makes_the_device_suspect_whose_own_numbers_were_bad(own, suspect):
    job = training_job()
    everybody(job, own=own)
    go_back(job)
    play(job, NumbersSound(A, Epoch(1), STEP))
    (ended,) = job.numbers.ended
    assert (ended.suspect, ended.times) == (suspect, 1)
    assert ended.outcome.startswith("did not come again")
    assert dict(job.suspicions) == ({} if suspect is None else {(A, suspect): 1})
    everybody(job, now=40.0)
    assert job.numbers.times[STEP] == 1, "another time is the first time"


@pytest.mark.parametrize("has_room", [pytest.param(True, id="elsewhere"), pytest.param(False, id="nowhere")])
def test_a_device_whose_numbers_are_bad_now_and_then_is_not_used_again(has_room):
    job = training_job()
    if has_room:
        play(job, NodeJoined(NodeId("spare"), 2))
    job.suspect(Rank(1))
    everybody(job, own=[1])
    go_back(job)
    orders = play(job, NumbersSound(A, Epoch(1), STEP))
    assert job.suspicions[A, Rank(1)] == 2
    if not has_room:
        assert orders == [], "the job can go on, and does"
    else:
        first, *others = orders
        assert first == Fence(A, (1,), first.reason, Epoch(2), Fault.BAD_NUMBERS)
        assert any(isinstance(each, Fence) and each.ranks == (0, 1) for each in others)
        assert isinstance(others[1], Park)


def test_a_loss_while_it_is_told_counts_it_and_the_recovery_looks_closely():
    job = training_job()
    play(job, bad(A, own=[0]), now=10.0)
    play(job, lost(A, 1, kept=(4, 5)), now=10.1)
    assert {plan.examine for plan in go_back(job, without=1)} == {STEP}
    (stop,) = everybody(job, now=40.0)
    assert isinstance(stop, Stop)


def test_whoever_has_it_says_what_it_is():
    job = training_job()
    play(job, bad(A), now=10.0)
    own = replace(bad(B, (2, 3), own=[3]), what="the loss is inf")
    play(job, own, now=10.1)
    assert job.timeline.causes[-1].startswith("step 6: the loss is inf, from the gradient of rank 3")


def test_the_smallest_number_is_where_it_began():
    assert first_of({}) is None
    found = {Rank(2): Finding(9, "a", "output"), Rank(1): Finding(4, "b", "output"), Rank(0): Finding(4, "c", "output")}
    assert first_of(found)[0] == 0


def differs(rank, guest, peers):
    return PeersDiffered(A if rank < 2 else B, Epoch(0), Step(64), Rank(rank), Rank(guest), peers, "part 3 of 64")


@pytest.mark.parametrize(
    ("pairs", "peers", "says"),
    [
        pytest.param([(0, 2), (2, 0)], 2, "nobody can tell whose are wrong", id="two"),
        pytest.param([(0, 1), (1, 2)], 3, "those of rank 1 are wrong", id="the-odd-one-of-three"),
        pytest.param([(0, 1)], 3, "nobody can tell whose are wrong", id="only-one-side-was-heard"),
    ],
)
def test_peers_that_differ_end_the_job_without_a_checkpoint_to_go_back_to(pairs, peers, says):
    job = training_job()
    assert play(job, *(differs(rank, guest, peers) for rank, guest in pairs), now=10.0) == []
    (stop,) = play(job, ClockTicked(), now=11.0)
    assert "data-parallel peers hold different parameters in step 64 (part 3 of 64)" in stop.reason
    assert says in stop.reason
    assert "there is no checkpoint to fall back to" in stop.reason


def test_the_node_of_a_device_that_was_wrong_before_is_left_out_for_good():
    """Told as a lost node: a restart of all is told to it, too, and its seats are another one's by then."""
    job = training_job()
    play(job, NodeJoined(NodeId("c"), 4), CheckpointWritten(Step(60)))
    job.suspect(Rank(0))
    play(job, differs(0, 1, 3), differs(2, 0, 3), now=10.0)
    fence, *others = play(job, ClockTicked(), now=11.0)
    assert fence == Fence(A, (0, 1), fence.reason, 1, Fault.NODE_LOST)
    assert [type(other).__name__ for other in others] == ["StartWorkers", "RestartAll"]
