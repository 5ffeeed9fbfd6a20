import pytest

from megatron_flashrecovery.core.liveness import next_check, overdue


@pytest.mark.parametrize(
    ("last_seen", "late"),
    [
        pytest.param({}, set(), id="nobody-is-watched"),
        pytest.param({"a": 9.5}, set(), id="just-heard"),
        pytest.param({"a": 8.0}, {"a"}, id="at-the-deadline"),
        pytest.param({"a": 1.0, "b": 9.0}, {"a"}, id="one-of-two"),
        pytest.param({"a": 11.0}, set(), id="from-the-future"),
    ],
)
def test_whoever_is_silent_for_the_timeout_is_overdue(last_seen, late):
    assert overdue(last_seen, now=10.0, timeout=2.0) == late


def test_the_next_check_is_when_the_longest_silent_becomes_overdue():
    assert next_check({"a": 3.0, "b": 1.0}, timeout=2.0) == 3.0
    assert next_check({}, timeout=2.0) is None
