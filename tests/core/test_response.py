"""What is done about faults of ranks: the table is asked, and the gravest of what it says happens."""

import pytest

from megatron_flashrecovery.core.coordinator import Job
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import (
    Blamed,
    CheckpointWritten,
    Diagnosed,
    Fence,
    Loss,
    NodeJoined,
    NodeLost,
    Park,
    RestartAll,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Executing
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.reports import Update
from megatron_flashrecovery.core.response import Mishap, respond
from megatron_flashrecovery.core.shares import Source
from tests.core.jobs import (
    CONFIG,
    SEATS,
    A,
    B,
    executed,
    executing_job,
    lost,
    play,
    ready,
    recovered_job,
    report,
    stood,
    training_job,
)

SPARE = NodeId("spare")


def fell(rank, fault, life=1, epoch=0, kept=(), step=None):
    loss = Loss(Rank(rank), WorkerId(f"{rank}.{life}"), "it broke", Epoch(epoch), step, fault=fault)
    return WorkersLost(A if rank < 2 else B, (loss,), {Rank(rank): tuple(map(Step, kept))})


def recover(job, rank, life=2):
    """Everybody stops, rank is replaced, the plan is executed and the job goes on from step 5."""
    here = {"epoch": job.epoch, "number": job.number}
    for each in range(4):
        if each != rank:
            play(job, stood(report(each), **here))
    play(job, ready(A if rank < 2 else B, rank, epoch=job.epoch))
    assert isinstance(job.phase, Executing)
    plan = job.phase.plan
    play(job, executed(A, 0, 1, epoch=job.epoch), executed(B, 2, 3, epoch=job.epoch))
    return plan


# --- devices ---------------------------------------------------------------------------------------------------------


def test_a_device_that_failed_twice_ends_a_job_without_another_node_and_says_which_to_leave_out():
    job = training_job()
    assert isinstance(play(job, fell(3, Fault.DEVICE_ERROR))[0], Park)
    recover(job, 3)
    (stop,) = play(job, fell(3, Fault.DEVICE_ERROR, life=2, epoch=1))
    assert stop == Stop(
        "rank 3: it broke; the device of rank 3 on b was suspected 2 times, and no other node has room: "
        "start the job again without b"
    )


def test_a_node_whose_device_failed_twice_is_left_out_if_another_one_has_room():
    job = training_job()
    play(job, NodeJoined(SPARE, 2), fell(3, Fault.DEVICE_ERROR))
    recover(job, 3)
    fence, park, start = play(job, fell(3, Fault.DEVICE_ERROR, life=2, epoch=1))
    assert fence == Fence(B, (2, 3), "b is left out: rank 3: it broke", 2, Fault.NODE_LOST)
    assert (park.lost, start) == ((2, 3), StartWorkers(SPARE, 2, (2, 3)))


def test_suspicions_are_of_the_device_and_do_not_move_with_the_seat():
    job = training_job()
    play(job, NodeJoined(SPARE, 2))
    job.suspect(Rank(3))
    play(job, fell(3, Fault.DEVICE_ERROR))
    assert job.seats.node_of[Rank(3)] == SPARE
    assert job.history(0.0, Rank(3)).suspicions == 0


def test_a_spare_without_enough_room_is_none():
    job = training_job()
    play(job, NodeJoined(SPARE, 1))
    job.suspect(Rank(3))
    assert isinstance(play(job, fell(3, Fault.DEVICE_ERROR))[0], Stop)


def test_a_device_that_is_suspected_before_all_have_started_is_left_out_of_the_next_start():
    job = Job.start(CONFIG, SEATS, sharded=True)
    play(job, NodeJoined(SPARE, 2))
    job.suspect(Rank(3))
    fence, start, restart = play(job, fell(3, Fault.DEVICE_ERROR))
    assert isinstance(fence, Fence)
    assert (start, isinstance(restart, RestartAll)) == (StartWorkers(SPARE, 1, (2, 3)), True)


# --- nodes that a diagnosis blames ------------------------------------------------------------------------------------


def blame(*nodes):
    return Diagnosed("rank 3 is slow", (Blamed("host b", 0.002, "its ranks are slow", nodes),), "")


def test_a_node_that_is_blamed_is_left_out_when_it_loses_a_rank_and_another_has_room():
    job = training_job()
    assert play(job, NodeJoined(SPARE, 2), blame(B)) == []
    fence, park, start = play(job, lost(B, 3))
    assert fence == Fence(B, (2, 3), "b is left out: rank 3: killed by SIGKILL", 1, Fault.NODE_LOST)
    assert (park.lost, start) == ((2, 3), StartWorkers(SPARE, 1, (2, 3)))


def test_without_another_node_a_blamed_one_goes_on():
    job = training_job()
    play(job, blame(B))
    park, start = play(job, lost(B, 3))
    assert isinstance(park, Park)
    assert start == StartWorkers(B, 1, (3,))


def test_a_blamed_node_is_no_room_for_others_and_gets_seats_only_if_no_other_is_left():
    job = training_job()
    good = NodeId("zz")
    play(job, NodeJoined(SPARE, 2), blame(SPARE, B))
    assert not job.history(0.0, Rank(3)).has_better_room
    play(job, NodeJoined(good, 2))
    *_, start = play(job, lost(B, 3))
    assert start == StartWorkers(good, 1, (2, 3))
    job = training_job()
    play(job, NodeJoined(SPARE, 2), blame(SPARE))
    assert play(job, NodeLost(B, "gone"))[-1] == StartWorkers(SPARE, 1, (2, 3))


def test_no_job_ends_because_a_diagnosis_blames_the_only_node_with_room():
    job = training_job()
    play(job, NodeJoined(SPARE, 2), blame(SPARE))
    job.suspect(Rank(3))
    *_, start = play(job, fell(3, Fault.DEVICE_ERROR))
    assert start == StartWorkers(SPARE, 1, (2, 3))


def test_of_blamed_nodes_one_is_left_out_at_a_time():
    job = training_job()
    play(job, NodeJoined(SPARE, 2), blame(A, B))
    mishaps = {Rank(rank): Mishap(Fault.HANG, "it hangs") for rank in (0, 3)}
    orders = respond(job, mishaps, "both hang", 1.0, fenced=(Rank(0), Rank(3)))
    started = [order for order in orders if isinstance(order, StartWorkers)]
    assert started == [StartWorkers(B, 1, (3,)), StartWorkers(SPARE, 1, (0, 1))]


def test_in_a_recovery_a_blamed_node_keeps_its_seats_for_it_may_have_the_only_copies():
    job = training_job()
    play(job, NodeJoined(SPARE, 2), blame(B), lost(A, 0))
    assert StartWorkers(B, 2, (3,)) in play(job, lost(B, 3))


def test_a_later_diagnosis_that_finds_nobody_acquits_nobody():
    job = training_job()
    later = Diagnosed("3 incidents so far", (), "nothing stands out")
    play(job, blame(B), later)
    assert job.blamed == {B: "host b, its ranks are slow"}
    assert job.diagnosis == later


# --- copies that may be wrong ----------------------------------------------------------------------------------------


def test_what_a_poisoned_rank_kept_of_its_own_is_no_source():
    job = training_job()
    play(job, fell(3, Fault.DEVICE_POISONED, kept=(4, 5)))
    play(job, stood(report(0), report(1, guests=(4,)), epoch=1), stood(report(2), epoch=1))
    play(job, ready(B, 3, epoch=1))
    assert job.phase.plan.resume_step == 4, "its host has only the step before"
    assert job.phase.plan.origin_of[Rank(3)].source is Source.MIRROR


@pytest.mark.parametrize(
    ("has_executed", "kept", "sources"),
    [
        pytest.param(
            True, (5,), {1: "own snapshot", 3: "own snapshot"}, id="new-copies-of-its-own-and-old-ones-of-others"
        ),
        pytest.param(True, (), "no copy of step 5 is left of rank 1", id="old-ones-of-others-only"),
        pytest.param(False, (5,), "no copy of step 5 is left of rank 3", id="old-ones-of-its-own"),
    ],
)
def test_a_replacement_of_a_poisoned_rank_vouches_only_for_what_was_brought_anew(has_executed, kept, sources):
    """Rank 1 is its guest and its host, and is lost now; the replacement of rank 3 finds both in its memory."""
    job = executing_job()
    job.poisoned.add(Rank(3))
    play(job, CheckpointWritten(Step(1)), *([executed(B, 3)] if has_executed else []), lost(A, 1, kept=kept))
    here = {"epoch": 2, "number": job.number}
    half_written = report(3, update=Update.WRITING, own=(5,), guests=(5,))
    play(job, stood(report(0), **here), stood(report(2), half_written, **here))
    commands = play(job, ready(A, 1, epoch=2))
    if isinstance(job.phase, Executing):
        assert {rank: str(origin) for rank, origin in job.phase.plan.origin_of.items()} == sources
    else:
        assert commands[0].reason == sources


def test_a_poisoning_told_late_again_says_nothing_of_the_replacement():
    job = training_job()
    poisoned = fell(3, Fault.DEVICE_POISONED)
    play(job, poisoned)
    recover(job, 3)
    play(job, poisoned)
    assert not job.poisoned


# --- recoveries without progress -------------------------------------------------------------------------------------


def fruitless_job(times, every=10.0):
    """Each time another seat is lost, and no step is completed in between."""
    job, now = training_job(), 0.0
    play(job, CheckpointWritten(Step(4)))
    job.last_resume = Step(5)
    lives = dict.fromkeys(range(4), 1)
    for number in range(times):
        rank = number % 4
        job.setbacks.clear()
        commands = play(job, lost(A if rank < 2 else B, rank, life=lives[rank]), now=now)
        lives[rank] += 1
        if not isinstance(commands[0], Park):
            return commands
        recover(job, rank)
        now += every
    return commands


def test_too_many_recoveries_without_a_step_go_back_to_the_checkpoint():
    (restart,) = fruitless_job(CONFIG.max_fruitless + 1)
    assert restart.from_checkpoint
    assert restart.reason == (
        "11 recoveries in 30 minutes without a completed step, the last: rank 2: killed by SIGKILL"
    )


@pytest.mark.parametrize(("times", "every"), [(CONFIG.max_fruitless, 10.0), (CONFIG.max_fruitless + 5, 200.0)])
def test_fewer_or_slower_ones_do_not(times, every):
    assert isinstance(fruitless_job(times, every)[0], Park)


def test_a_completed_step_forgets_them():
    job = recovered_job()
    assert len(job.begun) == 0, "the first resume is progress"
    play(job, lost(A, 0))
    assert len(job.begun) == 1
    job.note_kept([Step(9)])
    assert len(job.begun) == 0


def test_the_gravest_of_several_happens():
    job = training_job()
    job.has_happened_before(Loss(Rank(0), WorkerId("0.0"), "", None, Step(7), "Oops at a.py:1 in f", Fault.EXCEPTION))
    losses = (
        Loss(Rank(0), WorkerId("0.1"), "exit code 1", Epoch(0), Step(7), "Oops at a.py:1 in f", Fault.EXCEPTION),
        Loss(Rank(1), WorkerId("1.1"), "killed by SIGKILL", Epoch(0)),
    )
    (stop,) = play(job, WorkersLost(A, losses))
    assert stop.reason.startswith("rank 0 raised the same exception in step 7 again")
