"""Who does not stop: who is busy, who is overdue, and who never will."""

from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.messages import ClockTicked, Fence, Park, RanksHung
from megatron_flashrecovery.core.phases import Draining, Staffing
from megatron_flashrecovery.core.policy import Fault
from tests.core.jobs import A, B, draining_job, play, ready, report, stood


def seen(node=A, busy=(), silent=(), hung=(), epoch=1):
    evidence = {Rank(rank): "none of its threads has run" for rank in (*silent, *hung)}
    return RanksHung(node, Epoch(epoch), evidence, {}, Step(5), silent=tuple(silent), busy=tuple(busy))


def stopping_job():
    """Rank 3 was lost; rank 0 does not stop. It has ten seconds."""
    job = draining_job(3)
    play(job, stood(report(1)), stood(report(2)), ready(B, 3, epoch=1), now=1.0)
    assert isinstance(job.phase, Draining)
    return job


def test_who_is_busy_is_waited_for_until_it_stops():
    job = stopping_job()
    play(job, seen(busy=[0]), now=2.0)
    for now in range(3, 100):
        assert play(job, ClockTicked(), now=float(now)) == []
    play(job, stood(report(0)), now=100.0)
    assert not isinstance(job.phase, Draining | Staffing)


def test_who_is_busy_no_longer_is_overdue_at_once_if_its_time_is_over():
    job = stopping_job()
    play(job, seen(busy=[0]), now=2.0)
    assert play(job, ClockTicked(), now=50.0) == []
    play(job, seen(hung=[0]), now=50.5)
    fence, *_ = play(job, ClockTicked(), now=51.0)
    assert fence == Fence(A, (0,), "rank 0 did not stop in time", 2)


def test_who_computes_for_too_long_still_has_the_time_to_stop():
    job = stopping_job()
    play(job, seen(hung=[0]), now=2.0)
    assert play(job, ClockTicked(), now=9.9) == []
    assert isinstance(play(job, ClockTicked(), now=10.0)[0], Fence)


def test_of_whom_nothing_is_seen_is_overdue_as_soon_as_its_time_is_over():
    job = stopping_job()
    play(job, seen(busy=[1]), now=2.0)
    assert isinstance(play(job, ClockTicked(), now=10.0)[0], Fence)


def test_who_has_stopped_for_good_is_not_waited_for():
    job = stopping_job()
    play(job, seen(silent=[0]), now=2.0)
    assert play(job, ClockTicked(), now=2.9) == []
    fence, park, *_ = play(job, ClockTicked(), now=3.0)
    assert fence == Fence(A, (0,), "rank 0 hangs: none of its threads has run", 2, Fault.HANG)
    assert isinstance(park, Park)
    assert job.rounds == 0, "it is a loss, not a missed deadline"


def test_many_that_stand_still_at_the_same_time_have_all_their_time():
    job = draining_job(3)
    play(job, seen(silent=[0, 1]), now=2.0)
    assert play(job, ClockTicked(), now=9.0) == []
    fence, *_ = play(job, ClockTicked(), now=10.0)
    assert fence.ranks == (0, 1)


def test_who_has_stopped_before_it_stood_still_is_left_alone():
    job = stopping_job()
    play(job, seen(silent=[1]), now=2.0)
    assert play(job, ClockTicked(), now=9.0) == []


def test_a_node_says_nothing_of_the_seats_of_others():
    job = stopping_job()
    play(job, seen(node=B, busy=[0], silent=[0]), now=2.0)
    assert play(job, ClockTicked(), now=9.0) == []
    fence, *_ = play(job, ClockTicked(), now=10.0)
    assert fence.reason == "rank 0 did not stop in time"


def test_what_was_seen_in_an_older_epoch_counts_no_more():
    job = stopping_job()
    play(job, seen(busy=[0], epoch=0), seen(silent=[0], epoch=0), now=2.0)
    assert isinstance(play(job, ClockTicked(), now=10.0)[0], Fence)
    assert job.phase.watched == {}
