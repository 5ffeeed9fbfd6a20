import pytest

from megatron_flashrecovery.core.coordinator import Job, JobConfig, handle
from megatron_flashrecovery.core.errors import ConfigError, ImpossibleTransition
from megatron_flashrecovery.core.ids import NodeId, WorkerId
from megatron_flashrecovery.core.messages import (
    CheckpointWritten,
    ClockTicked,
    Drain,
    ExecutePlan,
    Fence,
    Loss,
    NodeJoined,
    NodeLost,
    Park,
    PlanExecuted,
    PlanFailed,
    RanksFinished,
    Release,
    RestartAll,
    Resume,
    Source,
    Spot,
    Standing,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Draining, Executing, Finished, Halted, Staffing, Starting, Training
from tests.core.jobs import (
    CONFIG,
    SEATS,
    A,
    B,
    described,
    draining_job,
    key,
    lost,
    play,
    ready,
    report,
    stood,
    training_job,
    used,
)

SPARE = NodeId("spare")


def executed(node, *ranks, epoch=1):
    return PlanExecuted(node, epoch, ranks)


def executing_job():
    """Rank 3 was lost, everybody has stopped, its replacement is ready."""
    job = draining_job(3)
    play(job, stood(report(0), report(1)), stood(report(2)), ready(B, 3, epoch=1), now=1.0)
    assert isinstance(job.phase, Executing)
    return job


def recovered_job():
    job = executing_job()
    play(job, executed(A, 0, 1), executed(B, 2, 3), now=2.0)
    return job


# --- starting --------------------------------------------------------------------------------------------------------


def test_training_begins_when_all_are_ready_and_described_in_any_order():
    job = Job.start(CONFIG, SEATS, sharded=True)
    play(job, ready(B, 2, 3), described(A), ready(A, 0, 1))
    assert isinstance(job.phase, Starting)
    play(job, described(B))
    assert isinstance(job.phase, Training)


def test_a_loss_before_everybody_was_ready_restarts_all():
    job = Job.start(CONFIG, SEATS, sharded=True)
    commands = play(job, described(A), ready(A, 0), lost(B, 3))
    assert commands == [RestartAll(1, "lost before everybody had started: rank 3: killed by SIGKILL", False)]
    play(job, described(A, epoch=1), described(B, epoch=1), ready(A, 0, 1, epoch=1), ready(B, 2, 3, epoch=1))
    assert isinstance(job.phase, Training)


def test_restarts_are_bounded():
    job = Job.start(JobConfig(max_restarts=1), SEATS, sharded=True)
    play(job, lost(B, 3))
    (stop,) = play(job, lost(B, 3, life=2))
    assert isinstance(stop, Stop)
    assert "all workers were restarted 1 times already" in stop.reason


# --- a recovery ------------------------------------------------------------------------------------------------------


def test_a_loss_parks_everybody_and_starts_a_replacement():
    job = training_job()
    assert play(job, lost(B, 3)) == [Park(1, 1, (3,)), StartWorkers(B, 1, (3,))]


def test_the_plan_waits_for_the_last_report_and_the_last_replacement():
    job = draining_job(3)
    assert play(job, stood(report(0), report(1)), ready(B, 3, epoch=1)) == []
    plans = play(job, stood(report(2)))
    assert [type(plan) for plan in plans] == [ExecutePlan, ExecutePlan]
    assert [share.source for share in plans[1].shares] == [Source.LIVE, Source.MIRROR]
    assert plans[0].resume_step == 5


def test_training_resumes_when_the_last_rank_has_executed():
    job = executing_job()
    assert play(job, executed(A, 0, 1), executed(B, 3)) == []
    assert play(job, executed(B, 2)) == [Resume(1, 3, 5)]


def test_the_record_of_a_recovery_says_what_happened():
    (record,) = recovered_job().recoveries
    assert (record.epoch, record.cause, record.lost_ranks) == (1, "rank 3: killed by SIGKILL", (3,))
    assert (record.resume_step, record.kept, record.source_of) == (5, 2, {3: "mirror at rank 1"})
    assert set(record.rebuilt) == {"tp1", "dp1", "world"}
    assert record.seconds == {"park": 1.0, "replace": 1.0, "execute": 1.0, "total": 2.0}


def test_a_drain_round_is_decided_when_all_have_reported_and_again_when_the_concerned_have():
    job = draining_job(3)
    spot = Spot(key("tp0"), "all_reduce", 4)
    blocked = report(0, standing=Standing.BLOCKED, spot=spot, counts={"tp0": used(4, 3)})
    parked = report(1, spot=spot, counts={"tp0": used(3)})
    assert play(job, stood(blocked, parked)) == []
    assert play(job, stood(report(2))) == [Drain(A, 1, 2, advance=(1,))]
    done = report(1, counts={"tp0": used(4)})
    assert play(job, stood(report(0, counts={"tp0": used(4)})), stood(done, number=1)) == []
    assert isinstance(job.phase, Draining)
    play(job, stood(done, number=2))
    assert isinstance(job.phase, Staffing)


def test_operations_that_complete_by_themselves_have_a_grace_period():
    job = draining_job(3)
    spot = Spot(key("tp0"), "all_reduce", 4)
    stuck = [report(rank, standing=Standing.BLOCKED, spot=spot, counts={"tp0": used(4, 3)}) for rank in (0, 1)]
    assert play(job, stood(*stuck), stood(report(2)), now=1.0) == []
    assert play(job, ClockTicked(), now=2.9) == []
    assert job.next_deadline == 3.0
    (order,) = play(job, ClockTicked(), now=3.0)
    assert order.sever == {key("tp0"): "all_reduce of rank 0 did not complete in time"}


def test_all_lost_at_once_go_on_from_their_vaults():
    job = draining_job(0, 1, 2, 3, kept=(4, 5))
    epoch = job.epoch
    plans = play(job, ready(A, 0, 1, epoch=epoch), ready(B, 2, 3, epoch=epoch))
    assert {share.source for plan in plans for share in plan.shares} == {Source.OWN}


# --- what is told twice, late, or too early --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(lost(B, 3), id="loss"),
        pytest.param(ready(B, 3, epoch=1), id="ready"),
        pytest.param(ready(A, 0, 1, epoch=0), id="ready-of-an-older-epoch"),
        pytest.param(stood(report(0)), id="report"),
        pytest.param(stood(report(0), epoch=0, number=0), id="report-of-an-older-epoch"),
        pytest.param(described(A), id="description"),
        pytest.param(PlanExecuted(A, 0, (0,)), id="executed-of-an-older-epoch"),
        pytest.param(PlanFailed(A, 0, 0, WorkerId("0.1"), "late"), id="failure-of-an-older-epoch"),
        pytest.param(RanksFinished(A, 0, (0,)), id="finished-in-an-older-epoch"),
        pytest.param(WorkersLost(A, (Loss(3, WorkerId("3.9"), "moved"),)), id="loss-of-a-seat-that-is-not-there"),
        pytest.param(WorkersLost(B, (Loss(3, WorkerId("3.0"), "fenced", 0),)), id="loss-of-an-older-worker"),
        pytest.param(NodeLost(SPARE, "gone"), id="loss-of-a-node-without-seats"),
        pytest.param(ClockTicked(), id="tick"),
    ],
)
def test_what_is_old_or_repeated_changes_nothing(event):
    job = executing_job()
    phase = job.phase
    assert play(job, event, now=1.0) == []
    assert job.phase is phase
    assert job.epoch == 1


def test_a_repeated_ready_does_not_count_twice():
    job = draining_job(2, 3)
    play(job, ready(B, 2, epoch=1), ready(B, 2, epoch=1), ready(B, 2, epoch=1))
    assert isinstance(job.phase, Draining)
    play(job, stood(report(0), report(1)))
    assert isinstance(job.phase, Staffing)


def test_a_late_resume_cannot_hurt_but_a_repeated_execution_is_ignored():
    job = recovered_job()
    assert play(job, executed(A, 0, 1)) == []
    assert isinstance(job.phase, Training)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        pytest.param(ready(A, 0, epoch=7), "epoch 7 has not begun", id="from-the-future"),
        pytest.param(stood(report(0), number=99), "order 99 was never given", id="order-never-given"),
        pytest.param(executed(A, 0), "no plan of this epoch was given", id="executed-without-a-plan"),
        pytest.param(RanksFinished(A, 1, (0,)), "nobody was told to train", id="finished-while-draining"),
        pytest.param(ready(A, 0, epoch=1), "rank 0 is no replacement", id="survivor-says-ready"),
    ],
)
def test_what_cannot_have_happened_raises_with_the_whole_story(event, why):
    job = draining_job(3)
    with pytest.raises(ImpossibleTransition, match=why) as caught:
        play(job, event)
    assert "killed by SIGKILL" in str(caught.value)


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
    assert commands[0] == Fence(B, (3,), "rank 3 could not execute the plan: fingerprint differs", 2)
    assert commands[1:] == [Park(2, 3, (3,)), StartWorkers(B, 2, (3,))]
    vault = WorkersLost(B, (Loss(3, WorkerId("3.2"), "fenced", 1),), {3: (5,)})
    play(job, vault, stood(report(0), report(1), epoch=2, number=3), stood(report(2), epoch=2, number=3))
    plans = play(job, ready(B, 3, epoch=2))
    assert plans[1].shares[1].source is Source.OWN


def test_a_seat_that_is_lost_again_and_again_falls_back():
    job = draining_job(3)
    play(job, CheckpointWritten(4))
    for life in (2, 3):
        commands = play(job, lost(B, 3, life=life))
    assert commands == [
        RestartAll(3, "rank 3 was lost 3 times without progress: rank 3: killed by SIGKILL", from_checkpoint=True)
    ]


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
    play(job, executed(A, 0, 1))
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
    assert play(job, ClockTicked(), now=60.0) == [Stop("no node has room for rank 2, 3")]


def test_a_node_that_comes_during_a_restart_hears_of_the_restart():
    job = Job.start(CONFIG, SEATS, sharded=True)
    (order,) = play(job, NodeLost(B, "connection closed"))
    assert play(job, NodeJoined(SPARE, 2)) == [StartWorkers(SPARE, 1, (2, 3)), order]


# --- the end ---------------------------------------------------------------------------------------------------------


def test_everybody_is_released_when_the_last_has_finished():
    job = training_job()
    assert play(job, RanksFinished(A, 0, (0, 1)), RanksFinished(B, 0, (3,))) == []
    assert play(job, RanksFinished(B, 0, (2,))) == [Release(0, 1)]
    assert isinstance(job.phase, Finished)
    assert play(job, lost(A, 0)) == []


def test_a_rank_lost_at_the_end_is_recovered_and_all_finish_again():
    job = training_job()
    play(job, RanksFinished(A, 0, (0, 1)), lost(B, 3))
    assert isinstance(job.phase, Draining)
    play(job, stood(report(0), report(1)), stood(report(2)), ready(B, 3, epoch=1))
    play(job, executed(A, 0, 1), executed(B, 2, 3), RanksFinished(B, 1, (2, 3)))
    assert isinstance(job.phase, Training)
    assert play(job, RanksFinished(A, 1, (0, 1))) == [Release(1, 4)]


def test_a_halted_job_does_nothing_more():
    job = draining_job(1, 3)
    job.phase = Halted("enough")
    assert handle(job, lost(A, 0), 1.0) == []


@pytest.mark.parametrize(
    "wrong",
    [{"drain_grace": 0.0}, {"drain_grace": 99.0}, {"join_timeout": 0.0}, {"max_rounds": 0}, {"max_restarts": -1}],
)
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError):
        JobConfig(**wrong)
