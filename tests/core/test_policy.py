import pytest

from megatron_flashrecovery.core.policy import POLICY, Action, Fault, History, NanChoice, decide


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
        pytest.param(Fault.DEVICE_ERROR, History(suspicions=2), Action.REPLACE_NODE, id="a-device-suspected-twice"),
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
    ],
)
def test_the_first_rule_that_applies_counts(fault, history, action):
    assert decide(fault, history).action is action
