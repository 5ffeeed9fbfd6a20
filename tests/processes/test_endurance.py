"""One run comes through many losses, and whoever survives them all gains nothing by it."""

from __future__ import annotations

import pytest

from bench.endurance import MOST_RESIDENT, RESOURCES, observe, toy

# In its first recoveries a process fills what it keeps: only of many can be said what it gains with each.
_FILLED = 512 << 10


pytestmark = pytest.mark.slow  # until its time is known on a quiet machine


@pytest.mark.parametrize(
    ("recoveries", "most_resident"),
    [
        pytest.param(10, _FILLED, id="10"),
        pytest.param(50, MOST_RESIDENT, id="50", marks=pytest.mark.slow),
    ],
)
def test_recoveries_leave_no_descriptor_thread_or_memory_behind(recoveries: int, most_resident: int) -> None:
    observed = observe(toy(recoveries))
    assert observed.recoveries == recoveries
    allowed = dict(zip(RESOURCES, (most_resident, 0, 0), strict=True))
    for who in observed.samples:
        for resource, most in allowed.items():
            assert observed.growth(who, resource) <= most, (who, resource, observed.samples[who])
