import pytest

from megatron_flashrecovery.core.coordinator import Job, JobConfig, handle
from megatron_flashrecovery.core.errors import ConfigError, ImpossibleTransition
from megatron_flashrecovery.core.ids import NodeId, WorkerId
from megatron_flashrecovery.core.messages import (
    BeginTraining,
    ClockTicked,
    Drain,
    ExecutePlan,
    Loss,
    NodeLost,
    Park,
    PlanExecuted,
    PlanFailed,
    RanksFinished,
    Release,
    RestartAll,
    Resume,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Draining, Finished, Halted, Staffing, Starting, Training
from megatron_flashrecovery.core.reports import Spot, Standing
from megatron_flashrecovery.core.shares import Source
from tests.core.jobs import (
    CONFIG,
    SEATS,
    A,
    B,
    described,
    draining_job,
    executed,
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


# --- starting --------------------------------------------------------------------------------------------------------


def test_training_begins_when_all_are_ready_and_described_in_any_order():
    job = Job.start(CONFIG, SEATS, sharded=True)
    play(job, ready(B, 2, 3), described(A), ready(A, 0, 1))
    assert isinstance(job.phase, Starting)
    assert play(job, described(B)) == [BeginTraining(0)]
    assert isinstance(job.phase, Training)
    assert play(job, ready(A, 0)) == []


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
