import pytest

from megatron_flashrecovery.core.job import JobConfig
from megatron_flashrecovery.core.policy import (
    FRUITLESS,
    LOST_OFTEN,
    MISSED_OFTEN,
    POLICY,
    Action,
    Fault,
    History,
    NanChoice,
    decide,
)


def test_the_words_say_the_numbers_that_decide_the_numbers_that_decide():
    config, history = JobConfig(), History()
    assert (history.max_setbacks, history.max_missed, history.max_fruitless) == (
        config.max_rounds,
        config.max_rounds,
        config.max_fruitless,
    )
    assert f"more than {config.max_rounds} times" in LOST_OFTEN[0]
    assert f"more than {config.max_rounds} deadlines" in MISSED_OFTEN[0]
    assert f"{config.max_fruitless} recoveries in {config.fruitless_window / 60:g} minutes" in FRUITLESS[0]


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_every_fault_has_rules_and_the_last_of_them_always_applies(fault):
    *others, last = [rule for rule in POLICY if rule.fault is fault]
    assert last.when == "always"
    assert all(rule.when != "always" for rule in others)


@pytest.mark.parametrize(
    ("fault", "history", "action"),
    [
        pytest.param(Fault.EXCEPTION, History(), Action.REPLACE_PROCESS, id="an-exception"),
        pytest.param(Fault.EXCEPTION, History(again=True), Action.STOP, id="the-same-exception-again"),
        pytest.param(Fault.PROCESS_ENDED, History(setbacks=4), Action.FALL_BACK, id="lost-too-often"),
        pytest.param(Fault.PROCESS_ENDED, History(fruitless=11), Action.FALL_BACK, id="no-step-for-too-long"),
        pytest.param(Fault.PROCESS_ENDED, History(is_starting=True), Action.START_ANEW, id="before-the-first-step"),
        pytest.param(Fault.EXCEPTION, History(again=True, is_starting=True), Action.STOP, id="again-at-the-start"),
        pytest.param(Fault.DEVICE_ERROR, History(suspicions=1), Action.REPLACE_PROCESS, id="a-device-suspected-once"),
        pytest.param(Fault.DEVICE_ERROR, History(suspicions=2), Action.REPLACE_NODE, id="a-device-suspected-twice"),
        pytest.param(Fault.DEVICE_ERROR, History(suspicions=2, has_room=False), Action.STOP, id="and-no-other-node"),
        pytest.param(Fault.CROWD, History(), Action.NOTE, id="a-crowd"),
        pytest.param(Fault.CROWD, History(lasted=True), Action.FALL_BACK, id="a-crowd-for-ever"),
        pytest.param(Fault.DEADLOCK, History(is_one_operation=True), Action.RETRY, id="a-deadlock"),
        pytest.param(Fault.DEADLOCK, History(again=True), Action.NOTE, id="a-deadlock-again"),
        pytest.param(Fault.DEADLOCK, History(again=True, lasted=True), Action.STOP, id="a-deadlock-that-stays"),
        pytest.param(
            Fault.DEADLOCK,
            History(again=True, lasted=True, is_one_operation=True),
            Action.FALL_BACK,
            id="one-operation-that-does-not-get-on",
        ),
        pytest.param(Fault.DEADLINE, History(), Action.REPLACE_PROCESS, id="a-deadline"),
        pytest.param(Fault.DEADLINE, History(is_executing=True), Action.PLAN_ANEW, id="a-plan-that-is-late"),
        pytest.param(Fault.DEADLINE, History(is_executing=True, missed=4), Action.FALL_BACK, id="too-many-deadlines"),
        pytest.param(Fault.NODE_LOST, History(), Action.REPLACE_NODE, id="a-node"),
        pytest.param(Fault.NODE_LOST, History(has_room=False), Action.STOP, id="a-node-and-no-other"),
        pytest.param(Fault.DEVICE_LOST, History(), Action.REPLACE_NODE, id="a-device-off-the-bus"),
        pytest.param(Fault.COMMUNICATOR_ERROR, History(), Action.RETRY, id="a-connection-reset"),
        pytest.param(Fault.COMMUNICATOR_ERROR, History(again=True), Action.FALL_BACK, id="a-connection-reset-again"),
        pytest.param(Fault.DEVICE_MEMORY, History(again=True), Action.STOP, id="too-little-memory-again"),
        pytest.param(Fault.BAD_NUMBERS, History(), Action.RETRY, id="bad-numbers"),
        pytest.param(Fault.BAD_NUMBERS, History(again=True), Action.STOP, id="bad-numbers-of-the-data"),
        pytest.param(
            Fault.BAD_NUMBERS, History(again=True, nan=NanChoice.SKIP), Action.SKIP, id="bad-numbers-to-be-skipped"
        ),
        pytest.param(
            Fault.BAD_NUMBERS,
            History(again=True, setbacks=4, nan=NanChoice.RETRY),
            Action.FALL_BACK,
            id="bad-numbers-for-ever",
        ),
        pytest.param(
            Fault.BAD_NUMBERS,
            History(again=True, setbacks=5, nan=NanChoice.RETRY, fell_back=True),
            Action.STOP,
            id="bad-numbers-behind-the-checkpoint",
        ),
        pytest.param(Fault.CORRUPTION, History(), Action.FALL_BACK, id="peers-differ"),
        pytest.param(Fault.PROCESS_ENDED, History(is_blamed=True), Action.REPLACE_NODE, id="on-a-node-that-is-blamed"),
        pytest.param(
            Fault.HANG,
            History(is_blamed=True, has_better_room=False),
            Action.REPLACE_PROCESS,
            id="blamed-and-no-other-node",
        ),
        pytest.param(
            Fault.PROCESS_ENDED,
            History(is_blamed=True, is_recovering=True),
            Action.REPLACE_PROCESS,
            id="blamed-in-a-recovery-from-something-else",
        ),
        pytest.param(
            Fault.EXCEPTION, History(is_blamed=True), Action.REPLACE_PROCESS, id="a-bug-on-a-node-that-is-blamed"
        ),
        pytest.param(
            Fault.DEADLINE, History(is_blamed=True, is_executing=True), Action.PLAN_ANEW, id="a-late-plan-blames-nobody"
        ),
        pytest.param(Fault.SLOW, History(is_blamed=True), Action.NOTE, id="a-slow-rank-is-noted"),
    ],
)
def test_the_first_rule_that_applies_counts(fault, history, action):
    assert decide(fault, history).action is action
