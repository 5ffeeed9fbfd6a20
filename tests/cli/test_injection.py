"""Faults as they are written: the kinds, their keys, and what is wrong with the others."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime import injections
from megatron_flashrecovery.runtime.injection import KINDS, Fault, Injection, help_of_kinds, help_of_spec, option
from megatron_flashrecovery.runtime.injections import Injections
from megatron_flashrecovery.runtime.moment import Moment

WHEN = "rank=1,step=6,at=forward"


@pytest.mark.parametrize(
    ("spec", "fault", "options"),
    [
        pytest.param(f"signal:{WHEN},signal=SIGBUS", Fault.SIGNAL, {"signal": "SIGBUS"}, id="signal"),
        pytest.param(f"SIGFPE:{WHEN}", Fault.SIGNAL, {"signal": "SIGFPE"}, id="any-signal-by-its-name"),
        pytest.param(f"SIGKILL:{WHEN}", Fault.KILL, {}, id="theirs-sigkill"),
        pytest.param(f"SIGSTOP:{WHEN}", Fault.STOP, {}, id="theirs-sigstop"),
        pytest.param(f"SIGINT:{WHEN}", Fault.SIGNAL, {"signal": "SIGINT"}, id="theirs-sigint"),
        pytest.param(f"SIGTERM:{WHEN}", Fault.SIGNAL, {"signal": "SIGTERM"}, id="theirs-sigterm"),
        pytest.param(f"SEGFAULT:{WHEN}", Fault.SEGV, {}, id="theirs-segfault"),
        pytest.param(f"LOCK_GIL:{WHEN}", Fault.GIL, {}, id="theirs-lock-gil"),
        pytest.param(f"OS_ABORT:{WHEN}", Fault.ABORT, {}, id="theirs-os-abort"),
        pytest.param(f"WORKLOAD_EXC:{WHEN}", Fault.EXCEPTION, {}, id="theirs-workload-exc"),
        pytest.param(f"ASYNC_EXC:{WHEN}", Fault.EXCEPTION, {"how": "async"}, id="theirs-async-exc"),
        pytest.param(f"SIGNAL_EXC:{WHEN}", Fault.EXCEPTION, {"how": "signal"}, id="theirs-signal-exc"),
        pytest.param(f"slow:{WHEN},factor=3,steps=20", Fault.SLOW, {"factor": "3", "steps": "20"}, id="slow"),
    ],
)
def test_names_and_keys_are_read(spec, fault, options):
    found = Injection.parse(spec)
    assert (found.fault, dict(found.options)) == (fault, options)
    assert Injection.parse(str(found)) == found


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        pytest.param(f"signal:{WHEN}", "signal is missing: give signal=SIGBUS", id="no-signal"),
        pytest.param(f"signal:{WHEN},signal=BUS", "signal=BUS is no signal: write it like SIGBUS", id="no-such-signal"),
        pytest.param(f"kill:{WHEN},signal=SIGBUS", "'signal': kill has none but rank, step and at", id="not-its-key"),
        pytest.param(f"slow:{WHEN},speed=3", "'speed': slow has factor seconds steps", id="no-such-key"),
        pytest.param(f"slow:{WHEN}", "give factor=3 or seconds=0.5", id="slow-by-nothing"),
        pytest.param(f"slow:{WHEN},factor=0.5", "factor=0.5 is not 1 or more", id="faster"),
        pytest.param(f"slow:{WHEN},seconds=long", "seconds=long is no number", id="no-number"),
        pytest.param(f"slow:{WHEN},seconds=nan", "seconds=nan is not 0 or more", id="nan"),
        pytest.param(f"slow:{WHEN},seconds=1,steps=0", "steps=0 is no whole number", id="no-steps"),
        pytest.param(f"exception:{WHEN},how=loud", "how=loud is none of raise async signal", id="how"),
        pytest.param("hang_collective:rank=1,step=6,at=mirror", "at=mirror is in the thread that mirrors", id="mirror"),
    ],
)
def test_what_is_wrong_with_a_key_is_said(spec, says):
    with pytest.raises(ConfigError, match="--inject") as raised:
        Injection.parse(spec)
    assert says in str(raised.value)


def test_step_and_moment_may_be_left_out_of_a_run_that_goes_on():
    assert Injection.parse("kill:rank=3", is_live=True) == Injection(3, None, None)
    assert str(Injection.parse("kill:rank=3", is_live=True)) == "kill:rank=3"
    with pytest.raises(ConfigError, match="rank is missing"):
        Injection.parse("kill:step=6", is_live=True)


def test_help_names_every_kind_key_and_moment():
    assert KINDS.keys() == set(Fault)
    for fault, kind in KINDS.items():
        assert fault.value in help_of_spec()
        for each in (fault.value, kind.what, *(key.name for key in kind.options)):
            assert each in help_of_kinds()
    assert all(moment.value in help_of_spec() for moment in Moment)


def test_defaults_are_what_the_table_says():
    assert option(Fault.SLOW, {}, "steps") == "10"
    assert option(Fault.SLOW, {"steps": "3"}, "steps") == "3"


def test_one_that_has_fired_is_not_told_to_the_replacement():
    asked = Injections([Injection.parse(f"kill:{WHEN}"), Injection.parse("stop:rank=9,step=1,at=forward")], [0, 1])
    (order,) = asked.orders(1)
    asked.note_fired(injections.InjectionFired(order.index, 0.0))
    assert asked.orders(1) == ()
    assert asked.never_happened() == [], "rank 9 is of another node"


def test_one_that_never_happened_is_told_with_the_reason():
    asked = Injections([Injection.parse("kill:rank=0,step=99,at=forward")], [0])
    (never,) = asked.never_happened()
    assert "step=99,at=forward never happened: the script never asked for recovery" in never
    asked.note_under_recovery(0)
    assert asked.never_happened() == ["kill:rank=0,step=99,at=forward never happened: the job did not come there"]


def test_a_spare_node_says_of_those_only_that_it_was_asked_for_itself_that_they_never_happened():
    asked = Injections([Injection.parse("kill:rank=2,step=99,at=forward")], [])
    assert [order.index for order in asked.orders(2)] == [0]
    asked.accept("kill:rank=2,step=98")
    (never,) = asked.never_happened()
    assert never.startswith("kill:rank=2,step=98 never happened")


def test_memory_is_not_taken_where_no_limit_stops_it(monkeypatch):
    monkeypatch.setattr(injections, "why_no_limit", lambda: "there is no memory limit: set one")
    said = Injections([], [0]).accept("oom:rank=0")
    assert said == "--inject oom:rank=0: there is no memory limit: set one"
