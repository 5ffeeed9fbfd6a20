"""The table that is printed is the one that decides."""

import json

import pytest

from megatron_flashrecovery import cli
from megatron_flashrecovery.core.policy import POLICY, Fault


def test_every_rule_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["policy"], {}) == 0
    said = capsys.readouterr().out
    for rule in POLICY:
        assert rule.fault.value in said
        assert rule.when in said or rule.when == "always"
        assert rule.action.value in said


def test_programs_get_every_rule_in_its_order(capsys):
    assert cli.main(["policy", "--json"], {}) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["fault"], row["when"], row["action"]) for row in rows] == [
        (rule.fault.name.lower(), rule.when, rule.action.value) for rule in POLICY
    ]


@pytest.mark.parametrize("name", ["device_memory", "DEVICE-MEMORY", "out of device memory"])
def test_one_fault_is_explained_by_any_of_its_names(name, capsys):
    assert cli.main(["policy", name, "--json"], {}) == 0
    assert {row["fault"] for row in json.loads(capsys.readouterr().out)} == {Fault.DEVICE_MEMORY.name.lower()}


def test_an_unknown_fault_is_refused_with_those_that_there_are(capsys):
    assert cli.main(["policy", "gremlins"], {}) == 2
    said = capsys.readouterr().err
    assert "there is no fault 'gremlins' in the table: it has process ended, exception, " in said
    assert all(fault.value in said for fault in Fault)


@pytest.mark.parametrize(
    ("name", "close"), [("hangs", "hang"), ("bad_nubers", "bad numbers"), ("crow", "hang of many")]
)
def test_a_slip_of_the_pen_is_answered_with_what_was_meant(name, close, capsys):
    assert cli.main(["policy", name], {}) == 2
    assert f"did you mean {close!r}? it has" in capsys.readouterr().err
