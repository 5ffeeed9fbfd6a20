"""Measurements of a site, from a file."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.telemetry import Metric
from megatron_flashrecovery.runtime.dossier import read_dossier
from megatron_flashrecovery.runtime.telemetry_file import read_telemetry
from tests.diagnose.recorded import Records


@pytest.fixture
def dossier(tmp_path):
    return read_dossier(Records(tmp_path, hosts=2, devices=2).directory)


def read(tmp_path, dossier, text, name="site.jsonl"):
    (tmp_path / name).write_text(text)
    return read_telemetry(tmp_path / name, dossier)


def test_json_lines_and_csv_say_the_same(tmp_path, dossier):
    lines = (
        '{"time": 20, "metric": "port errors", "like": "errors", "host": "gpu01.site.org", "value": 3, "seconds": 60}\n'
        '\n{"time": 10, "metric": "compute", "rank": 3, "value": 0.5}\n'
    )
    table = (
        "time,metric,like,rank,host,value,seconds\n20,port errors,errors,,gpu01.site.org,3,60\n10,compute,,3,,0.5,\n"
    )
    found = read(tmp_path, dossier, lines)
    assert found == read(tmp_path, dossier, table, "site.csv")
    assert [(each.time, each.label, each.metric) for each in found] == [
        (10, "compute", Metric.COMPUTE),
        (20, "port errors", Metric.ERRORS),
    ]
    assert (found[0].values, found[1].host, found[1].value, found[1].seconds) == ({3: 0.5}, "gpu01", 3, 60)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param("nonsense", "line 1 is no JSON", id="no-json"),
        pytest.param("[1]", "line 1 is no JSON object", id="no-object"),
        pytest.param('{"time": 1, "metric": "compute", "rank": 0}', "line 1: value is missing", id="no-value"),
        pytest.param('{"time": 1, "metric": "compute", "value": 1}', "give rank or host, one of them", id="nobody"),
        pytest.param('{"time": 1, "metric": "heat", "rank": 0, "value": 1}', "say what it is like, one of", id="kind"),
        pytest.param('{"time": 1, "metric": "compute", "rank": 9, "value": 1}', "no rank 9 in a job of 4", id="rank"),
        pytest.param('{"time": 1, "metric": "compute", "host": "x", "value": 1}', "sits on host x", id="host"),
        pytest.param('{"time": 1, "metric": "compute", "rank": 0, "value": -1}', "never negative", id="negative"),
        pytest.param('{"time": 1, "metric": "compute", "rank": 0, "value": "hot"}', "give a number", id="no-number"),
        pytest.param('{"time": 1, "metric": "errors", "rank": 0, "value": 1}', "seconds is missing", id="a-count"),
        pytest.param(
            '{"time": 1, "metric": "errors", "rank": 0, "value": 1, "seconds": 0}',
            "how long it was counted",
            id="no-time",
        ),
        pytest.param('{"time": 1, "metric": "compute", "rnak": 0, "value": 1}', "no field rnak", id="field"),
        pytest.param("", "has no measurement", id="empty"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(tmp_path, dossier, line, says):
    with pytest.raises(ConfigError, match="--telemetry") as raised:
        read(tmp_path, dossier, line)
    assert says in str(raised.value)
