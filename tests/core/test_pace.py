"""Who has hung, by what was seen before."""

from dataclasses import replace

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.pace import BETWEEN, OnDevice, Pace, Reading, judge

NOW = 1000.0
PACE = Pace(unknown=600.0)


def reading(
    computing: float = 0.0,
    longest: float = 0.5,
    seen: int = 10,
    where: str = "",
    doing: str = "a step",
    silent: float = 0.1,
    was_timed: bool = False,
) -> Reading:
    return Reading(NOW - silent, 0.3, doing, Step(7), where, NOW - computing, longest, seen, was_timed)


def hung(reading: Reading, pace: Pace = PACE, not_before: float = 0.0) -> str:
    return judge({Rank(3): reading}, NOW, pace, not_before).hung.get(Rank(3), "")


def test_who_computes_for_much_longer_than_ever_hangs():
    assert not hung(reading(computing=4.9))
    assert hung(reading(computing=5.1)) == (
        "it has computed for 5.1 s in a step, the longest before took 0.5 s (limit 5.0 s)"
    )


def test_the_limit_grows_with_what_is_usual():
    assert not hung(reading(computing=39.0, longest=10.0))
    assert hung(reading(computing=41.0, longest=10.0))


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_a_first_step_an_evaluation_or_a_checkpoint_has_time(seen):
    assert not hung(reading(computing=599.0, longest=0.1, seen=seen))
    assert hung(reading(computing=601.0, longest=0.1, seen=seen))


@pytest.mark.parametrize("doing", [BETWEEN, "save_checkpoint", "checkpoint_and_decide_exit"])
def test_outside_of_a_step_a_loop_has_more_time_than_in_one(doing):
    assert not hung(reading(computing=59.0, longest=0.1, doing=doing))
    assert hung(reading(computing=61.0, longest=0.1, doing=doing))


def test_the_first_steps_behind_a_recovery_have_more_time_but_not_for_ever():
    assert not hung(reading(computing=59.0, longest=0.1, seen=0, was_timed=True))
    assert hung(reading(computing=61.0, longest=0.1, seen=0, was_timed=True))
    assert not hung(reading(computing=100.0, longest=30.0, seen=0, was_timed=True))


@pytest.mark.parametrize("doing", ["a step", BETWEEN])
def test_a_process_that_is_stopped_has_no_more_time_where_nothing_is_known_yet(doing):
    fresh = reading(silent=6.0, seen=0, doing=doing)
    assert not hung(fresh), "native code that runs for the first time may keep the interpreter's lock"
    assert hung(replace(fresh, is_stopped=True)) == (
        f"none of its threads has run for 6.0 s in {doing}, it is stopped (limit 5.0 s)"
    )
    assert not hung(replace(reading(silent=4.0, seen=0, doing=doing), is_stopped=True))
    often = replace(fresh, is_stopped=True, longest_pause=2.0)
    assert not hung(often), "who was stopped before, and went on, may do so again"


def test_who_comes_near_its_limit_is_slow():
    verdict = judge({Rank(3): reading(computing=3.0), Rank(4): reading(computing=1.0)}, NOW, PACE, 0.0)
    assert verdict.slow == (3,)


def test_who_computes_and_does_not_hang_is_busy():
    readings = {
        Rank(0): reading(computing=40.0, longest=20.0),
        Rank(1): reading(computing=90.0, longest=20.0),
        Rank(2): reading(computing=1.0, where="barrier of world#0"),
        Rank(3): reading(computing=1.0, doing=""),
        Rank(4): reading(computing=1.0, silent=6.0),
        Rank(5): on_device(True, lag=1.0, computing=1.0),
        Rank(6): on_device(False, lag=1.0, computing=1.0, where="barrier of world#0"),
    }
    assert judge(readings, NOW, PACE, 0.0).busy == (0, 6)


def test_who_waits_is_no_suspect_but_is_known_to_wait():
    verdict = judge({Rank(3): reading(computing=7.0, where="barrier of world#0")}, NOW, PACE, 0.0)
    assert not verdict.hung
    assert verdict.waiting == {3: "barrier of world#0, for 7.0 s in a step"}


def on_device(reached: bool, lag: float, **fields) -> Reading:
    behind = OnDevice("allreduce of dp#0", 12, reached, issued=40, completed=37, since=NOW - lag)
    return replace(reading(**fields), device=behind)


@pytest.mark.parametrize("where", ["", "allreduce of world#0"], ids=["in-a-synchronization", "in-an-operation"])
def test_whose_device_has_not_come_to_its_oldest_operation_hangs_wherever_its_host_is(where):
    verdict = judge({Rank(3): on_device(False, lag=6.0, computing=7.0, where=where)}, NOW, PACE, 0.0)
    assert verdict.hung == {
        3: "its device has not come to allreduce of dp#0 for 6.0 s in a step: of 40 operations it has completed 37 "
        "(limit 5.0 s)"
    }
    assert not verdict.waiting


@pytest.mark.parametrize("where", ["", "allreduce of world#0"], ids=["in-a-synchronization", "in-an-operation"])
def test_whose_device_waits_for_others_is_no_suspect_although_its_host_looks_as_if_it_computed(where):
    verdict = judge({Rank(3): on_device(True, lag=6.0, computing=7.0, where=where)}, NOW, PACE, 0.0)
    assert verdict.waiting == {3: "allreduce of dp#0, for 6.0 s in a step, on its device"}
    assert not verdict.hung
    assert not verdict.slow


@pytest.mark.parametrize("reached", [True, False])
def test_a_device_that_gets_on_hangs_no_more_than_its_host_that_waits_for_it(reached):
    verdict = judge({Rank(3): on_device(reached, lag=1.0, computing=60.0)}, NOW, PACE, 0.0)
    assert not verdict.hung
    assert not verdict.waiting


def test_a_host_that_hangs_with_nothing_left_on_its_device_hangs():
    assert hung(reading(computing=6.0))


def test_one_whose_device_hangs_is_told_from_many_that_wait_for_theirs():
    readings = {Rank(rank): on_device(rank != 5, lag=6.0, computing=6.0) for rank in range(8)}
    verdict = judge(readings, NOW, PACE, 0.0)
    assert verdict.hung.keys() == {5}
    assert verdict.waiting.keys() == {0, 1, 2, 3, 4, 6, 7}


def test_while_its_device_waits_nobody_is_on_the_way_to_hang():
    readings = {Rank(1): on_device(True, lag=3.0, computing=3.0), Rank(2): on_device(False, lag=3.0, computing=3.0)}
    assert judge(readings, NOW, PACE, 0.0).slow == (2,)


def test_who_does_not_run_at_all_hangs_wherever_it_is():
    silent = reading(computing=6.0, where="barrier of world#0", silent=6.0)
    assert hung(silent) == "none of its threads has run for 6.0 s in a step (limit 5.0 s)"
    assert judge({Rank(3): silent}, NOW, PACE, 0.0).silent == (3,)


def test_nothing_counts_from_before_the_watcher_woke_up():
    assert not hung(reading(computing=50.0, silent=50.0), not_before=NOW - 1.0)


def test_who_has_not_begun_or_is_done_does_not_hang():
    assert not hung(reading(computing=5000.0, silent=5000.0, doing=""))


def test_nobody_hangs_when_nobody_looks():
    assert not hung(reading(computing=5000.0), Pace(unknown=0.0))


def test_a_short_timeout_is_the_limit_of_everything_quick():
    assert hung(reading(computing=1.1, longest=0.1), Pace(unknown=1.0))
    assert not hung(reading(computing=1.9, longest=0.5), Pace(unknown=1.0))


def test_a_negative_timeout_is_refused():
    with pytest.raises(ConfigError, match="--hang-timeout -1"):
        Pace(unknown=-1.0)
