"""Who is slow, by the own time of its peers."""

from random import Random

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.job import JobConfig
from megatron_flashrecovery.core.messages import StepsTimed
from megatron_flashrecovery.core.slowness import WINDOWS, OwnTimes
from tests.core.jobs import A, B, draining_job, lost, play, recovered_job, training_job

NODE = NodeId("n")
RANKS = range(8)
PEERS = {Rank(rank): tuple(Rank(peer) for peer in RANKS if peer % 2 == rank % 2) for rank in RANKS}
"""Two stages of four."""
ALONE = {Rank(rank): (Rank(rank),) for rank in RANKS}


def timed(computed, step, node=NODE, epoch=0):
    return StepsTimed(node, Epoch(epoch), Step(step), {Rank(rank): s for rank, s in computed.items()}, {})


def slow(windows, peers=PEERS, factor=1.5):
    """Who is slow after these windows of all ranks."""
    times = OwnTimes()
    for step, computed in enumerate(windows, start=1):
        times.note(timed(computed, step), peers, factor, float(step))
    return times.slow


def usual(**changed):
    return dict.fromkeys(RANKS, 0.1) | {int(rank[1:]): seconds for rank, seconds in changed.items()}


def test_one_that_computes_longer_than_its_peers_is_slow_after_some_windows_in_a_row():
    assert slow([usual(r3=0.2)] * (WINDOWS - 1)) == {}
    assert slow([usual(r3=0.2)] * WINDOWS) == {
        3: "it computes for 0.2 s in a step, its 3 peers for 0.1 s, up to step 5"
    }


@pytest.mark.parametrize(
    "windows",
    [
        pytest.param([usual()] * 20, id="nobody"),
        pytest.param([usual(r3=0.2)] * 4 + [usual()] + [usual(r3=0.2)] * 4, id="not-in-a-row"),
        pytest.param([usual(r3=0.14)] * 20, id="less-than-the-factor"),
        pytest.param([usual(r1=0.5, r3=0.5, r5=0.5, r7=0.5)] * 20, id="a-whole-stage"),
        pytest.param([{rank: seconds / 100 for rank, seconds in usual(r3=0.3).items()}] * 20, id="milliseconds"),
        pytest.param([usual()] * 5 + [usual(r3=2.0)] + [usual()] * 5, id="one-long-step"),
        pytest.param([dict.fromkeys(RANKS, 2.0)] + [usual()] * 20, id="a-slow-first-step"),
        pytest.param([usual(r1=0.05, r5=0.35, r7=0.2, r3=0.36)] * 20, id="peers-that-differ-anyway"),
    ],
)
def test_nobody_is_blamed_for(windows):
    assert slow(windows) == {}


def test_noise_blames_nobody():
    rng = Random(4)
    windows = [{rank: 0.1 * rng.lognormvariate(0.0, 0.3) for rank in RANKS} for _ in range(2000)]
    assert slow(windows) == {}


def test_in_noise_a_slow_one_is_found():
    rng = Random(4)
    windows = [{rank: 0.1 * rng.uniform(0.9, 1.1) * (2 if rank == 4 else 1) for rank in RANKS} for _ in range(10)]
    assert slow(windows).keys() == {4}


def test_of_two_the_slower_one_is_slow():
    peers = {Rank(0): (Rank(0), Rank(1)), Rank(1): (Rank(0), Rank(1))}
    assert slow([{0: 0.1, 1: 0.3}] * WINDOWS, peers).keys() == {1}


def test_who_is_slow_stays_so_until_it_is_clearly_not():
    slowed = [usual(r3=0.2)] * WINDOWS
    assert slow([*slowed, *[usual(r3=0.13)] * 20]).keys() == {3}, "between the limits"
    assert slow([*slowed, *[usual()] * (WINDOWS - 1)]).keys() == {3}
    assert slow([*slowed, *[usual()] * WINDOWS]) == {}


def test_who_has_no_peers_is_compared_with_its_past():
    before = [usual()] * 10
    assert slow([*before, *[usual(r3=0.2)] * WINDOWS], ALONE) == {
        3: "it computes for 0.2 s in a step, before 0.1 s, up to step 15"
    }
    assert slow([usual(r3=0.2)] * 30, ALONE) == {}, "it always was"


def test_what_makes_all_slower_is_nobodys_fault_also_without_peers():
    doubled = [dict.fromkeys(RANKS, 0.2)] * 20
    assert slow([*[usual()] * 10, *doubled], ALONE) == {}


def test_without_a_factor_nobody_is_slow():
    assert slow([usual(r3=5.0)] * 20, factor=0.0) == {}


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1.0])
def test_a_factor_that_would_blame_everybody_is_refused(factor):
    with pytest.raises(ConfigError, match="--slow-factor"):
        JobConfig(slow_factor=factor)


def test_what_is_told_late_or_twice_changes_nothing():
    times = OwnTimes()
    for _ in range(2 * WINDOWS):
        times.note(timed(usual(r3=0.2), 7), PEERS, 1.5, 0.0)
        times.note(timed(usual(r3=0.2), 6), PEERS, 1.5, 0.0)
    assert times.contrary[Rank(3)] == 1


# --- in the job ------------------------------------------------------------------------------------------------------


def slowed(job, windows=WINDOWS, epoch=0):
    for step in range(1, windows + 1):
        play(job, timed({0: 0.1, 1: 0.1}, step, A, epoch), timed({2: 0.1, 3: 0.4}, step, B, epoch))
    return job


def test_peers_on_different_nodes_are_compared_and_nothing_is_ordered():
    job = training_job()
    assert play(slowed(job), timed({2: 0.1, 3: 0.4}, 9, B)) == []
    assert job.own_times.slow == {3: "it computes for 0.4 s in a step, its peer for 0.1 s, up to step 9"}


def test_every_epoch_begins_without_a_suspicion():
    job = slowed(training_job())
    play(job, lost(A, 0))
    assert job.own_times == OwnTimes()
    slowed(job, epoch=1)
    assert job.own_times == OwnTimes(), "nobody trains"


def test_what_was_measured_in_an_older_epoch_counts_no_more():
    assert slowed(recovered_job(), epoch=0).own_times == OwnTimes()
    assert slowed(recovered_job(), epoch=1).own_times.slow.keys() == {3}


def test_it_is_no_part_of_the_story_of_a_job():
    job = training_job()
    before = list(job.story)
    assert list(slowed(job).story) == before
    assert draining_job(3).story
