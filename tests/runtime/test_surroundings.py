"""Where a topology comes from, when there are several ways to have one."""

from __future__ import annotations

import json
import os
import stat

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.runtime.dossier import read_dossier
from megatron_flashrecovery.runtime.surroundings import surroundings_of
from tests.diagnose.recorded import Records

HOSTS = 4
TREE = "SwitchName=l0 Nodes=gpu[00-01]\nSwitchName=l1 Nodes=gpu[02-03]\nSwitchName=s0 Switches=l[0-1]\n"
ALLOCATION = {"SLURM_JOB_ID": "7"}


def dossier(tmp_path, switches=()):
    return read_dossier(Records(tmp_path, HOSTS, 2, switches=switches).directory)


def leaves(found):
    return [element.name for element in found.topology.elements if element.kind is Kind.LEAF]


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """One that answers what it is told to."""

    def answers(text, code=0):
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return answers


def test_ranks_sit_on_the_devices_of_their_hosts_whatever_else_is_known(tmp_path):
    found = surroundings_of(dossier(tmp_path), None, {})
    topology = found.topology
    assert topology.elements[topology.device_of[5]] == Element(Kind.DEVICE, "gpu02/1")
    assert topology.ranks_of(topology.elements.index(Element(Kind.HOST, "gpu02"))).tolist() == [4, 5]
    assert found.source == "nothing is known of switches and power: give --topology"


def test_what_slurm_told_the_nodes_is_in_the_record(tmp_path):
    found = surroundings_of(dossier(tmp_path, [f"s0.l{host // 2}.gpu{host:02d}" for host in range(HOSTS)]), None, {})
    assert leaves(found) == ["l0", "l1"]
    assert "what SLURM told the nodes" in found.source


def test_inside_of_an_allocation_slurm_is_asked(tmp_path, scontrol):
    scontrol(TREE)
    found = surroundings_of(dossier(tmp_path), None, ALLOCATION)
    assert (leaves(found), found.source) == (["l0", "l1"], "switches by `scontrol show topology`")
    assert leaves(surroundings_of(dossier(tmp_path), None, {})) == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param(TREE, 1, id="it-fails"),
        pytest.param("nothing of the kind", 0, id="it-has-no-tree"),
        pytest.param(TREE.replace("gpu", "other"), 0, id="of-another-cluster"),
    ],
)
def test_a_slurm_that_does_not_know_the_hosts_is_no_source(tmp_path, scontrol, text, code):
    scontrol(text, code)
    assert "nothing is known" in surroundings_of(dossier(tmp_path), None, ALLOCATION).source


def test_a_description_comes_before_everything_else(tmp_path, scontrol):
    scontrol(TREE)
    file = tmp_path / "site.json"
    file.write_text(json.dumps({"version": 1, "hosts": [{"names": "gpu[00-02]", "leaf": "west", "power": "pdu1"}]}))
    found = surroundings_of(dossier(tmp_path), file, ALLOCATION)
    assert leaves(found) == ["west"]
    assert found.source == f"topology from {file}, which does not have 1 of the hosts"


def test_it_may_be_what_slurm_reads_itself(tmp_path):
    file = tmp_path / "topology.conf"
    file.write_text(TREE)
    assert leaves(surroundings_of(dossier(tmp_path), file, {})) == ["l0", "l1"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("{", "is no JSON", id="no-json"),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "other1", "leaf": "l0"}]}', "knows none of the hosts", id="hosts"
        ),
    ],
)
def test_a_description_of_something_else_is_refused(tmp_path, content, says):
    file = tmp_path / "site.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        surroundings_of(dossier(tmp_path), file, {})
