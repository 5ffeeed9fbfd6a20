"""Operations that fail: explained by a loss, or a fault of their own."""

from megatron_flashrecovery.core.coordinator import Job
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.messages import (
    CheckpointWritten,
    ClockTicked,
    OperationsFailed,
    Park,
    RestartAll,
    Stop,
)
from megatron_flashrecovery.core.phases import Draining, Executing, Starting
from tests.core.jobs import CONFIG, SEATS, A, B, executing_job, lost, play, recovered_job, training_job

RESET = "allreduce of world failed: connection reset"


def failed(*ranks, node=A, epoch=0, step=7):
    return OperationsFailed(node, Epoch(epoch), {Rank(rank): RESET for rank in ranks}, Step(step))


def test_what_no_loss_explains_sends_everybody_back_within_a_second():
    job = training_job()
    assert play(job, failed(0), failed(2, node=B), now=10.0) == []
    assert play(job, ClockTicked(), now=10.3) == []
    assert job.next_deadline < 10.5
    (park,) = play(job, ClockTicked(), now=10.5)
    assert park == Park(1, 1, ())
    assert job.timeline.causes == [
        f"communication failed in step 7, and no rank was lost: rank 0: {RESET}; rank 2: {RESET}"
    ]


def test_people_are_told_the_first_sentence_of_what_a_library_says():
    job, place = training_job(), "[/pytorch/gloo/transport/tcp/pair.cc:553]"
    said = f"allreduce of world failed: {place} Connection closed by peer [127.0.0.1]:5. Check the logs. GLHF!"
    play(job, OperationsFailed(A, Epoch(0), {Rank(0): said}, Step(7)), now=10.0)
    play(job, ClockTicked(), now=10.5)
    (cause,) = job.timeline.causes
    assert cause.endswith("rank 0: allreduce of world failed: Connection closed by peer [127.0.0.1]:5")


def test_a_loss_explains_what_failed_just_before():
    job = training_job()
    play(job, failed(0), now=10.0)
    play(job, lost(B, 3), now=10.1)
    assert play(job, ClockTicked(), now=11.0) == []
    assert job.epoch == 1
    assert job.unexplained == set()


def test_the_failures_that_a_stop_brings_about_are_no_news():
    job = training_job()
    play(job, lost(B, 3), now=10.0)
    play(job, failed(0), failed(0, epoch=1), now=10.1)
    assert play(job, ClockTicked(), now=11.0) == []
    assert isinstance(job.phase, Draining)


def test_again_in_the_same_step_the_newest_checkpoint_is_next():
    for has_checkpoint in (True, False):
        job = recovered_job()
        job.unexplained.add(Step(7))
        if has_checkpoint:
            play(job, CheckpointWritten(Step(4)))
        play(job, failed(0, epoch=1), now=10.0)
        (order,) = play(job, ClockTicked(), now=11.0)
        assert isinstance(order, RestartAll if has_checkpoint else Stop)
        assert "again in the same step, after a retry" in order.reason


def test_a_loss_that_is_told_late_explains_it_after_all():
    job = training_job()
    play(job, failed(0), now=10.0)
    play(job, ClockTicked(), now=11.0)
    assert job.unexplained == {7}
    play(job, lost(B, 3), now=12.0)
    assert job.unexplained == set()


def test_progress_makes_it_another_story():
    job = training_job()
    job.unexplained.add(Step(7))
    job.note_resume(Step(7))
    assert job.unexplained == set()


def test_a_plan_whose_communication_fails_is_made_anew():
    job = executing_job()
    assert isinstance(job.phase, Executing)
    play(job, failed(0, epoch=1), now=2.0)
    (park, *_) = play(job, ClockTicked(), now=2.5)
    assert isinstance(park, Park)
    assert job.rounds == 1


def test_before_the_first_step_everybody_starts_again():
    job = Job.start(CONFIG, SEATS, sharded=True)
    play(job, failed(0), now=2.0)
    (restart,) = play(job, ClockTicked(), now=3.0)
    assert isinstance(restart, RestartAll)
    assert isinstance(job.phase, Starting)
    assert play(job, ClockTicked(), now=4.0) == []
