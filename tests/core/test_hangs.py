"""What is done about ranks that hang, and about exceptions that come again."""

from megatron_flashrecovery.core.hangs import describe, few
from megatron_flashrecovery.core.ids import Epoch, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import (
    ClockTicked,
    Fence,
    Loss,
    Park,
    RanksHung,
    RestartAll,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Draining, Training
from megatron_flashrecovery.core.policy import Fault
from tests.core.jobs import GROUPS, A, B, key, play, recovered_job, training_job


def told(node=A, hung=(), waiting=(), epoch=0, step=7, silent=(), slow=(), what="allreduce of world"):
    return RanksHung(
        node,
        Epoch(epoch),
        {Rank(rank): "it sleeps" for rank in hung},
        {Rank(rank): f"{what}, for 9 s in a step" for rank in waiting},
        Step(step),
        silent,
        slow,
    )


def everybody_waits(job, now, what="barrier of dp1"):
    play(job, told(A, waiting=[0, 1]), told(B, waiting=[2, 3], what=what), now=now)


def raised(rank, step=7, worker="1", what="ValueError at train.py:3 in step", epoch=0, fault=Fault.EXCEPTION):
    loss = Loss(
        Rank(rank),
        WorkerId(f"{rank}.{worker}"),
        "exit code 1",
        Epoch(epoch),
        None if step is None else Step(step),
        what,
        fault,
    )
    return WorkersLost(A if rank < 2 else B, (loss,))


def test_one_that_hangs_is_ended_and_replaced_once_it_is_clear_that_it_is_alone():
    job = training_job()
    assert play(job, told(hung=[1]), now=10.0) == []
    assert play(job, ClockTicked(), now=10.9) == []
    fence, park, start = play(job, ClockTicked(), now=11.0)
    assert fence == Fence(A, (1,), "rank 1 hangs: it sleeps", 1, Fault.HANG)
    assert isinstance(park, Park)
    assert start == StartWorkers(A, 1, (1,))


def test_one_that_moves_again_is_left_alone():
    job = training_job()
    play(job, told(hung=[1]), now=10.0)
    play(job, told(), now=10.5)
    assert play(job, ClockTicked(), now=20.0) == []


def test_many_at_the_same_time_are_not_to_blame():
    job = training_job()
    play(job, told(hung=[0, 1]), now=10.0)
    assert few(4) == 1
    assert play(job, ClockTicked(), now=500.0) == []
    assert isinstance(job.phase, Training)


def test_the_last_of_many_that_go_on_are_left_alone():
    job = training_job()
    play(job, told(hung=[0, 1]), now=10.0)
    play(job, ClockTicked(), now=12.0)
    play(job, told(hung=[1]), now=20.0)
    assert play(job, ClockTicked(), now=30.0) == []
    play(job, told(), now=31.0)
    play(job, told(hung=[1]), now=40.0)
    assert isinstance(play(job, ClockTicked(), now=41.0)[0], Fence)


def test_whoever_joins_them_is_waited_for_also_when_others_waited_before():
    job = training_job()
    play(job, told(B, waiting=[2]), now=10.0)
    play(job, told(A, hung=[0]), now=20.0)
    assert play(job, ClockTicked(), now=20.5) == []
    play(job, told(A, hung=[0, 1]), now=20.9)
    assert play(job, ClockTicked(), now=60.0) == []


def test_one_is_not_to_blame_as_long_as_others_come_near_their_limits():
    job = training_job()
    play(job, told(A, hung=[0]), told(B, slow=(2, 3)), now=10.0)
    assert play(job, ClockTicked(), now=20.0) == []
    play(job, told(B), now=21.0)
    assert isinstance(play(job, ClockTicked(), now=22.0)[0], Fence)


def test_those_that_read_for_all_others_are_many_when_they_hang_together():
    job = training_job()
    play(job, told(A, hung=[0, 1]), told(B, waiting=[2, 3]), now=10.0)
    assert play(job, ClockTicked(), now=100.0) == []


def test_one_whose_threads_do_not_run_is_ended_whatever_the_others_do():
    job = training_job()
    play(job, told(A, hung=[0, 1], silent=(1,)), told(B, hung=[2, 3]), now=10.0)
    fence, *_ = play(job, ClockTicked(), now=11.0)
    assert fence == Fence(A, (1,), "rank 1 hangs: it sleeps", 1, Fault.HANG)


def test_many_that_hang_for_ever_end_the_job_or_take_it_back_to_its_checkpoint():
    job = training_job()
    play(job, told(hung=[0, 1]), now=10.0)
    play(job, ClockTicked(), now=11.0)
    (stop,) = play(job, ClockTicked(), now=611.0)
    assert isinstance(stop, Stop)
    assert "2 ranks hang at the same time: rank 0: it sleeps" in stop.reason


def test_as_long_as_many_hang_nothing_is_decided_before_their_time_is_over():
    job = training_job()
    play(job, told(hung=[0, 1]), now=10.0)
    assert job.next_deadline == 11.0
    play(job, ClockTicked(), now=11.0)
    assert job.next_deadline == 611.0


def test_all_that_wait_for_each_other_go_back_once():
    job = training_job()
    play(job, told(A, waiting=[0, 1]), told(B, waiting=[2, 3]), now=10.0)
    (park,) = play(job, ClockTicked(), now=11.0)
    assert park == Park(1, 1, ())
    assert isinstance(job.phase, Draining)


def test_the_second_time_in_the_same_step_it_is_a_bug_of_the_script():
    job = training_job()
    job.deadlocks.add(Step(7))
    everybody_waits(job, now=10.0)
    assert play(job, ClockTicked(), now=11.0) == []
    (stop,) = play(job, ClockTicked(), now=70.0)
    assert isinstance(stop, Stop)
    assert "again after all went back once" in stop.reason


def test_all_that_wait_in_the_same_operation_again_are_not_the_scripts_fault():
    job = training_job()
    job.checkpoint = Step(3)
    job.deadlocks.add(Step(7))
    everybody_waits(job, now=10.0, what="allreduce of world")
    (restart,) = play(job, ClockTicked(), now=70.0)
    assert isinstance(restart, RestartAll)
    assert job.deadlocks == set()


def test_as_long_as_somebody_computes_nobody_waits_in_vain():
    job = training_job()
    play(job, told(A, waiting=[0, 1]), told(B, waiting=[2]), now=10.0)
    assert play(job, ClockTicked(), now=60.0) == []


def test_what_was_seen_in_an_older_epoch_counts_no_more():
    job = recovered_job()
    assert play(job, told(hung=[1], epoch=0), now=10.0) == []
    assert play(job, ClockTicked(), now=20.0) == []


def test_who_waits_is_told_with_who_never_came():
    members = {key(name): tuple(map(Rank, ranks)) for name, ranks in GROUPS.items()}
    waiting = {Rank(0): "allreduce of dp0, for 9 s in a step", Rank(1): "barrier of world, for 9 s in a step"}
    assert describe(waiting, members) == (
        "rank 0 in allreduce of dp0, where rank 2 never came; rank 1 in barrier of world, where rank 0, 2, 3 never came"
    )


def test_the_same_exception_in_the_same_step_of_the_same_rank_ends_the_job():
    job = training_job()
    assert isinstance(play(job, raised(1))[0], Park)
    (stop,) = play(job, raised(1, worker="2", epoch=1))
    assert isinstance(stop, Stop)
    assert stop.reason == (
        "rank 1 raised the same exception in step 7 again after a retry, so it is the script's: "
        "ValueError at train.py:3 in step"
    )


def test_a_device_that_has_too_little_memory_again_ends_the_job_with_the_remedy():
    job = training_job()
    what = "OutOfMemoryError at train.py:3 in step"
    play(job, raised(1, what=what, fault=Fault.DEVICE_MEMORY))
    (stop,) = play(job, raised(1, what=what, fault=Fault.DEVICE_MEMORY, worker="2", epoch=1))
    assert isinstance(stop, Stop)
    assert "raised the same exception in step 7 again after a retry" in stop.reason
    assert "the device has not enough memory, use a smaller micro batch or recompute more" in stop.reason


def test_a_device_that_fails_again_at_the_same_line_is_no_bug_of_the_script():
    job = training_job()
    what = "AcceleratorError at train.py:3 in step"
    play(job, raised(1, what=what, fault=Fault.DEVICE_ERROR))
    again = play(job, raised(1, what=what, fault=Fault.DEVICE_ERROR, worker="2", epoch=1))
    assert "same exception" not in str(again)


def test_another_exception_or_step_or_rank_is_another_story():
    for again in (
        raised(1, step=8, worker="2", epoch=1),
        raised(1, what="KeyError at x.py:1 in f", worker="2", epoch=1),
    ):
        job = training_job()
        play(job, raised(1))
        assert not any(isinstance(command, Stop) for command in play(job, again))


def test_what_happened_long_ago_is_no_first_time():
    job = training_job()
    play(job, raised(1, step=None))
    job.note_resume(Step(5))
    job.note_resume(Step(9))
    assert not job.raised


def test_the_end_of_one_worker_told_twice_is_no_second_exception():
    job = training_job()
    play(job, raised(1))
    assert play(job, raised(1)) == []
