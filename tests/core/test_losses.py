import pytest

from megatron_flashrecovery.core.coordinator import Job
from megatron_flashrecovery.core.ids import NodeId, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import (
    CheckpointWritten,
    ClockTicked,
    Fence,
    Loss,
    NodeJoined,
    NodeLost,
    Park,
    PlanExecuted,
    PlanFailed,
    RestartAll,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Draining, Executing, Staffing
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.core.reports import Spot, Standing
from megatron_flashrecovery.core.shares import Source
from tests.core.jobs import (
    CONFIG,
    SEATS,
    A,
    B,
    draining_job,
    executing_job,
    key,
    lost,
    play,
    ready,
    recovered_job,
    report,
    stood,
    training_job,
    used,
)

SPARE = NodeId("spare")


# --- losses during a recovery ----------------------------------------------------------------------------------------


def test_a_loss_while_draining_opens_another_epoch_for_everybody():
    job = draining_job(3)
    play(job, stood(report(0), report(1)))
    assert play(job, lost(B, 2)) == [Park(2, 2, (2, 3)), StartWorkers(B, 2, (2,))]
    assert play(job, stood(report(0), report(1))) == []
    assert play(job, stood(report(0), report(1), epoch=2, number=2)) == []
    assert isinstance(job.phase, Staffing)


def test_a_replacement_that_was_ready_has_to_say_so_again_in_the_new_epoch():
    job = draining_job(3)
    play(job, ready(B, 3, epoch=1), lost(A, 0))
    play(job, stood(report(1), epoch=2, number=2), stood(report(2), epoch=2, number=2), ready(A, 0, epoch=2))
    assert isinstance(job.phase, Draining)
    play(job, ready(B, 3, epoch=2))
    assert isinstance(job.phase, Executing)


def test_a_replacement_killed_while_it_joins_is_replaced_in_a_new_epoch():
    job = draining_job(3)
    assert play(job, lost(B, 3, life=2)) == [Park(2, 2, (3,)), StartWorkers(B, 2, (3,))]


def test_groups_of_an_interrupted_plan_are_rebuilt_again():
    job = draining_job(3)
    play(job, stood(report(0, counts={"tp0": used(3)}), report(1)), stood(report(2)), ready(B, 3, epoch=1))
    assert key("tp0") in job.phase.plan.rebuild
    play(job, lost(B, 2))
    play(job, stood(report(0), report(1), epoch=2, number=job.number))
    play(job, ready(B, 2, 3, epoch=2))
    assert job.phase.plan.rebuild[key("tp0")] == "was being rebuilt in epoch 1"


def test_a_loss_after_resume_is_a_new_recovery():
    job = recovered_job()
    commands = play(job, lost(A, 0))
    assert commands == [Park(2, 4, (0,)), StartWorkers(A, 2, (0,))]
    assert job.lost == {0}


def test_a_rank_that_cannot_execute_is_fenced_and_its_source_is_not_trusted():
    job = executing_job()
    commands = play(job, PlanFailed(B, 1, 3, WorkerId("3.2"), "fingerprint differs"))
    assert commands[0] == Fence(B, (3,), "rank 3 could not execute the plan: fingerprint differs", 2, Fault.PLAN_FAILED)
    assert commands[1:] == [Park(2, 3, (3,)), StartWorkers(B, 2, (3,))]
    vault = WorkersLost(B, (Loss(3, WorkerId("3.2"), "fenced", 1),), {3: (5,)})
    play(job, vault, stood(report(0), report(1), epoch=2, number=3), stood(report(2), epoch=2, number=3))
    plans = play(job, ready(B, 3, epoch=2))
    assert plans[1].shares[1].source is Source.OWN


def test_what_a_fenced_rank_kept_counts_also_if_it_had_taken_its_seat_late():
    """Its worker waited for the end of the one before, and another epoch had begun by then."""
    job = draining_job(3)
    play(job, lost(B, 2))
    play(job, stood(report(0), report(1), epoch=2, number=2), ready(B, 2, 3, epoch=2))
    assert isinstance(job.phase, Executing)
    play(job, PlanFailed(B, 2, 3, WorkerId("3.2"), "fingerprint differs"))
    play(job, WorkersLost(B, (Loss(3, WorkerId("3.2"), "fenced", 2),), {3: (5,)}))
    assert job.vault[3] == (5,)


def test_a_seat_that_is_lost_again_and_again_falls_back():
    job = draining_job(3)
    play(job, CheckpointWritten(4))
    for life in (2, 3):
        commands = play(job, lost(B, 3, life=life))
    assert commands == [
        RestartAll(3, "rank 3 was lost 3 times without progress: rank 3: killed by SIGKILL", from_checkpoint=True)
    ]


@pytest.mark.parametrize(("kept", "is_progress"), [((4, 5), False), ((8, 9), True), ((), False)])
def test_steps_that_were_completed_before_a_loss_are_progress(kept, is_progress):
    job = draining_job(3)
    play(job, CheckpointWritten(4), lost(B, 3, kept=(4, 5), life=2))
    job.setbacks.update({2: 2})
    commands = play(job, lost(B, 2, kept=kept))
    assert isinstance(commands[0], Park if is_progress else RestartAll)


def test_losses_in_one_recovery_tell_of_the_same_step_once():
    job = draining_job(3)
    play(job, CheckpointWritten(4), lost(B, 3, kept=(8, 9), life=2))
    play(job, lost(B, 3, kept=(8, 9), life=3))
    commands = play(job, lost(B, 3, kept=(8, 9), life=4))
    assert isinstance(commands[0], RestartAll)


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_stop_in_time_is_fenced():
    job = draining_job(3)
    play(job, stood(report(0), report(1)))
    assert play(job, ClockTicked(), now=9.9) == []
    commands = play(job, ClockTicked(), now=10.0)
    assert commands == [
        Fence(B, (2,), "rank 2 did not stop in time", 2),
        Park(2, 2, (2, 3)),
        StartWorkers(B, 2, (2,)),
    ]


def test_a_rank_that_cannot_be_freed_in_time_is_fenced():
    job = draining_job(3)
    spot = Spot(key("tp1"), "all_reduce", 4)
    stuck = report(2, standing=Standing.BLOCKED, spot=spot, counts={"tp1": used(4, 3, broken="a member was lost")})
    play(job, stood(report(0), report(1)), stood(stuck))
    assert play(job, ClockTicked(), now=10.0)[0] == Fence(B, (2,), "rank 2 could not be freed in time", 2)


def test_a_replacement_that_does_not_join_in_time_is_replaced():
    job = draining_job(3)
    play(job, stood(report(0), report(1)), stood(report(2)))
    assert play(job, ClockTicked(), now=60.0)[0] == Fence(B, (3,), "rank 3 did not join in time", 2)


def test_an_overdue_execution_parks_everybody_anew_and_fences_nobody():
    job = executing_job()
    play(job, PlanExecuted(A, 1, (0, 1)))
    assert play(job, ClockTicked(), now=31.0) == [Park(2, 3, (3,))]
    assert isinstance(job.phase, Draining)


def test_after_too_many_missed_deadlines_the_job_falls_back():
    job = draining_job(3)
    now = 0.0
    for _ in range(CONFIG.max_rounds + 1):
        play(
            job, stood(report(0), report(1), epoch=job.epoch, number=job.number), ready(B, 3, epoch=job.epoch), now=now
        )
        play(job, stood(report(2), epoch=job.epoch, number=job.number), now=now)
        now = job.next_deadline
        commands = play(job, ClockTicked(), now=now)
    assert commands == [Stop(job.phase.reason)]
    assert "3 deadlines missed in one recovery" in job.phase.reason
    assert "no checkpoint" in job.phase.reason


# --- nothing left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "step", "command"),
    [
        pytest.param(4, 5, RestartAll(2, "no copy of step 5 is left of rank 1, 3", True), id="from-the-checkpoint"),
        pytest.param(
            None,
            5,
            Stop("no copy of step 5 is left of rank 1, 3; there is no checkpoint to fall back to"),
            id="no-checkpoint",
        ),
        pytest.param(None, 0, RestartAll(2, "no copy of step 0 is left of rank 1, 3", False), id="nothing-done-yet"),
    ],
)
def test_a_rank_lost_with_its_host_falls_back(checkpoint, step, command):
    job = training_job()
    if checkpoint is not None:
        play(job, CheckpointWritten(checkpoint))
    play(job, NodeJoined(SPARE, 2), lost(A, 1), lost(B, 3))
    here = {"epoch": 2, "number": 2}
    play(job, stood(report(0, step, own=(step,)), **here), stood(report(2, step, own=(step,)), **here))
    commands = play(job, ready(A, 1, epoch=2), ready(B, 3, epoch=2))
    expected = [command] if isinstance(command, Stop) else [RestartAll(3, command.reason, command.from_checkpoint)]
    assert commands == expected


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_the_seats_of_a_lost_node_move_to_a_spare_one():
    job = training_job()
    play(job, NodeJoined(SPARE, 2))
    commands = play(job, NodeLost(B, "connection closed"))
    assert commands == [Park(1, 1, (2, 3)), StartWorkers(SPARE, 1, (2, 3))]
    assert play(job, lost(B, 2)) == []


def test_a_spare_node_may_come_late():
    job = training_job()
    assert play(job, NodeLost(B, "connection closed")) == [Park(1, 1, (2, 3))]
    assert play(job, NodeJoined(SPARE, 2), now=59.0) == [StartWorkers(SPARE, 1, (2, 3))]
    assert play(job, ClockTicked(), now=60.0)[0].reason == "rank 0, 1 did not stop in time"


def test_without_a_node_for_its_seats_the_job_stops_and_says_which():
    job = training_job()
    play(job, NodeLost(B, "connection closed"), stood(report(0), report(1)))
    (stop,) = play(job, ClockTicked(), now=60.0)
    assert isinstance(stop, Stop)
    assert stop.reason.startswith("no node has room for rank 2, 3: no spare node has come in time, start the job again")


def test_a_node_that_comes_during_a_restart_hears_of_the_restart():
    job = Job.start(CONFIG, SEATS, sharded=True)
    (order,) = play(job, NodeLost(B, "connection closed"))
    assert play(job, NodeJoined(SPARE, 2)) == [StartWorkers(SPARE, 1, (2, 3)), order]


def test_peers_that_disagree_behind_a_plan_are_not_made_equal_by_ending_one_of_them():
    job = executing_job()
    play(job, CheckpointWritten(Step(4)))
    told = PlanFailed(A, job.epoch, Rank(0), WorkerId("0.0"), "PeersDisagree: step 5", Fault.CORRUPTION)
    (order,) = play(job, told)
    assert isinstance(order, RestartAll)
    assert order.from_checkpoint
