"""When a number is a spike."""

import pytest

from megatron_flashrecovery.core.numbers import SPIKE_NEEDS, SPIKE_WINDOW, is_spike

USUAL = [2.0, 2.1, 1.9, 2.05, 1.95] * 10


@pytest.mark.parametrize(
    ("value", "before", "spikes"),
    [
        pytest.param(2.2, USUAL, False, id="as-usual"),
        pytest.param(30.0, USUAL, True, id="far-above"),
        pytest.param(0.001, USUAL, False, id="far-below"),
        pytest.param(30.0, USUAL[: SPIKE_NEEDS - 1], False, id="too-early-to-say"),
        pytest.param(2.5, [2.0] * 50, False, id="it-hardly-moved-before"),
        pytest.param(30.0, [*[100.0] * 500, *USUAL * 2], True, id="what-is-long-ago-does-not-count"),
        pytest.param(30.0, [*USUAL, float("inf"), float("nan")], True, id="what-is-no-number-does-not-count"),
        pytest.param(float("nan"), USUAL, False, id="no-number-is-no-spike"),
    ],
)
def test_a_spike_is_far_above_what_the_run_has_seen(value, before, spikes):
    assert is_spike(value, before) is spikes


def test_the_window_is_as_long_as_it_says():
    assert is_spike(30.0, [100.0] * 100 + [2.0] * SPIKE_WINDOW)
    assert not is_spike(30.0, [2.0] * SPIKE_WINDOW + [100.0] * SPIKE_WINDOW)
