"""When the growth of a node's counters is worth telling, and that nothing is lost in between."""

import pytest

from megatron_flashrecovery.core.counting import EVERY, SELDOM, Counting


def told(*windows, every=EVERY):
    """(when, growth) of each telling; each window says by how much each counter has grown in it."""
    counting, counters, now, found = (
        Counting(),
        {"tcp.sent": 0, "tcp.retransmitted": 0, "nic.eth0.rx_errors": 0},
        0.0,
        [],
    )
    assert counting.look(counters, now) is None
    for window in windows:
        now += every
        counters = {name: value + window.get(name, 0) for name, value in counters.items()}
        if (growth := counting.look(counters, now)) is not None:
            found.append((now, growth.seconds, growth.grown))
    return found


TRAFFIC = {"tcp.sent": 1000}
LOSSY = {"tcp.sent": 1000, "tcp.retransmitted": 10}


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        pytest.param([{}] * 100, [], id="nothing-grows"),
        pytest.param([TRAFFIC] * 100, [], id="traffic-alone"),
        pytest.param([{}, {"nic.eth0.rx_errors": 3}], [(20.0, 20.0, {"nic.eth0.rx_errors": 3})], id="an-error"),
        pytest.param([LOSSY, LOSSY, LOSSY], [(10.0, 10.0, LOSSY)], id="the-same-rate-is-told-once"),
        pytest.param(
            [LOSSY, LOSSY, {"tcp.sent": 1000, "tcp.retransmitted": 90}],
            [(10.0, 10.0, LOSSY), (30.0, 20.0, {"tcp.sent": 2000, "tcp.retransmitted": 100})],
            id="a-higher-rate",
        ),
        pytest.param([LOSSY, TRAFFIC], [(10.0, 10.0, LOSSY), (20.0, 10.0, TRAFFIC)], id="that-it-has-ended"),
    ],
)
def test_what_is_news(windows, expected):
    assert told(*windows) == expected


def test_what_goes_on_as_it_did_is_told_seldom_and_no_growth_is_lost():
    tellings = told(*[LOSSY] * 200)
    assert [when for when, _, _ in tellings] == [EVERY, EVERY + SELDOM, EVERY + 2 * SELDOM, EVERY + 3 * SELDOM]
    for _, seconds, grown in tellings:
        assert grown["tcp.retransmitted"] == seconds / EVERY * 10


def test_a_counter_that_begins_anew_or_comes_late_has_not_grown():
    counting = Counting()
    counting.look({"a": 100}, 0.0)
    assert counting.look({"a": 3, "b": 50}, 10.0) is None
    assert counting.look({"a": 5, "b": 51}, 20.0).grown == {"a": 2, "b": 1}


def test_it_is_looked_at_every_ten_seconds():
    counting = Counting()
    assert counting.is_due(0.0)
    counting.look({}, 0.0)
    assert not counting.is_due(EVERY - 0.1)
    assert counting.is_due(EVERY)
