"""When a node ends its own workers."""

from types import SimpleNamespace

import pytest

from megatron_flashrecovery.detect.acknowledgements import Delivery
from megatron_flashrecovery.runtime import vigil
from megatron_flashrecovery.runtime.launch_config import LaunchConfig


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def of_node(rank, monkeypatch, last_heard):
    """What is sent is due all the time, and was acknowledged ``last_heard`` seconds ago, or when it was looked at."""
    clock = Clock()

    def silence(_self, now):
        return acknowledgements.judge([Delivery(1, last_heard(now))], now)

    acknowledgements = vigil.Acknowledgements(1)
    monkeypatch.setattr(vigil, "Acknowledgements", lambda port: SimpleNamespace(silence=lambda now: silence(None, now)))
    config = LaunchConfig(script="t.py", nnodes=2, node_rank=rank, master_port=1, token="x")
    return vigil.Vigil(config, clock), clock


def looks(watching, clock, seconds):
    for _ in range(int(seconds / 0.25)):
        clock.now += 0.25
        if (found := watching.look()) is not None:
            return clock.now, found
    return None


def test_a_node_that_nobody_acknowledges_ends_its_workers_at_once_after_two_seconds(monkeypatch):
    watching, clock = of_node(1, monkeypatch, lambda now: now - 100.0)
    when, dismissal = looks(watching, clock, 10.0)
    assert 102.0 <= when <= 102.5
    assert dismissal.at_once
    assert "the controller's machine has acknowledged nothing for 2" in dismissal.failure


@pytest.mark.parametrize(
    ("rank", "last_heard"),
    [pytest.param(1, lambda now: 0.1, id="acknowledged"), pytest.param(0, lambda now: now, id="the-controllers-node")],
)
def test_any_other_node_goes_on(monkeypatch, rank, last_heard):
    assert looks(*of_node(rank, monkeypatch, last_heard), 30.0) is None
