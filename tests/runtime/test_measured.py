"""Measurements as tables of windows."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.messages import StepsTimed
from megatron_flashrecovery.core.slowness import WINDOWS
from megatron_flashrecovery.runtime.dossier import OWN_TIME, read_dossier
from megatron_flashrecovery.runtime.measured import Period, period_of, tables_of
from megatron_flashrecovery.runtime.node_messages import NodeMeasured
from tests.diagnose.recorded import START, Records

HOSTS = ("gpu00", "gpu01")


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path, hosts=2, devices=2)


def tables(records, period):
    dossier = read_dossier(records.directory)
    return {table.label: table for table in tables_of(dossier, dossier.samples, period, HOSTS)}


def told(records, at, seconds):
    records.now = START + at
    records.write("event", StepsTimed(NodeId("node0"), Epoch(0), Step(int(at)), {Rank(0): seconds}, {}))


def test_a_window_has_the_mean_of_what_was_told_in_it(records):
    told(records, 0.4, 1.0)
    told(records, 0.8, 3.0)
    told(records, 1.5, 5.0)
    table = tables(records, Period(START, START + 2))[OWN_TIME]
    assert table.values[:, 0].tolist() == [2.0, 5.0]
    assert np.isnan(table.values[:, 1:]).all()


def test_who_says_nothing_takes_as_long_as_before_but_not_for_ever(records):
    told(records, 0.0, 1.0)
    told(records, 41.0, 2.0)
    values = tables(records, Period(START + 30, START + 190))[OWN_TIME].values[:, 0]
    assert len(values) == 16
    assert values[:2].tolist() == [1.0, 2.0]
    assert values[2:10].tolist() == [2.0] * 8
    assert np.isnan(values[-5:]).all()


def test_counts_are_those_of_the_period_in_one_window_and_silence_is_none(records):
    records.now = START + 100
    records.write("note", NodeMeasured(NodeId("node1"), 50.0, {"nic.eth0.rx_errors": 20}))
    found = tables(records, Period(START + 75, START + 200))["errors of network interfaces"]
    assert found.of_hosts
    assert found.values.tolist() == [[0.0, 10.0]]
    assert "errors of network interfaces" not in tables(records, Period(START + 101, START + 200))


def test_the_period_is_that_of_the_newest_alarm_with_the_windows_that_led_to_it(records):
    records.train(20).train(10, {2: 2.0}).name_slow(2).train(5, {2: 2.0})
    period = period_of(read_dossier(records.directory))
    assert (period.start, period.end) == (START + 30 - WINDOWS, START + 35)


def test_without_an_alarm_it_is_the_last_ten_minutes_or_what_was_asked_for(records):
    dossier = read_dossier(records.train(700).directory)
    assert period_of(dossier) == Period(START + 100, START + 700)
    assert period_of(dossier, last=50.0) == Period(START + 650, START + 700)
