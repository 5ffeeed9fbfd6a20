"""Wiring from a file, from SLURM and from names: a cluster, or an error that says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Nic
from megatron_flashrecovery.diagnose.host_names import expand, guess_racks
from megatron_flashrecovery.diagnose.slurm import cluster_of_addresses, parse_topology
from megatron_flashrecovery.diagnose.topology_file import parse_topology_file, write_topology_file

FILE = """{
  "version": 1,
  "hosts": [
    {"names": "n[1-2]", "leaf": "leaf1", "power": ["pdu-a", "pdu-b"], "nics": ["ib0", "ib0", null]},
    {"names": ["n3", "n4"], "nics": [{"name": "ib0", "leaf": "rail0"}, {"name": "ib1", "leaf": "rail1"}]}
  ],
  "switches": {"leaf1": "spine1", "rail[0-1]": ["spine1", "spine2"], "spine[1-2]": "core"}
}"""


def test_a_file_says_what_hosts_hang_on():
    cluster = parse_topology_file(FILE, "topology.json")
    first, last = cluster.hosts[0], cluster.hosts[3]
    assert first == HostWiring("n1", ("leaf1",), ("pdu-a", "pdu-b"), (Nic("ib0"), Nic("ib0"), None))
    assert last == HostWiring("n4", nics=(Nic("ib0", ("rail0",)), Nic("ib1", ("rail1",))))
    assert [host.name for host in cluster.hosts] == ["n1", "n2", "n3", "n4"]
    assert cluster.all_above(("rail1",)) == ("spine1", "spine2", "core")


def test_the_file_in_the_docs_is_one():
    text = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text()
    cluster = parse_topology_file(text.partition("```json")[2].partition("```")[0], "docs")
    assert len(cluster.hosts) == 32
    assert cluster.all_above(("leaf1",)) == ("spine1", "spine2", "core")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param('{"version": 1,\n "hosts": [}', "t.json line 2 column 12 is no JSON", id="not JSON"),
        pytest.param("[]", "t.json: the file: expected `object`, got `array`: see", id="another kind"),
        pytest.param('{"hosts": []}', "object missing required field `version`", id="no version"),
        pytest.param('{"version": 2, "hosts": []}', "version 2 is not known here, write version 1", id="version"),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "a"}, {"names": 5}]}',
            r"hosts\[1\].names: expected `str \| array`, got `int`: see 'topology file'",
            id="a number for a name",
        ),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "a", "leave": "x"}]}',
            r"hosts\[0\]: object contains unknown field `leave`",
            id="a field that is not known",
        ),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "a[1-"}]}', r"hosts\[0\]: host list 'a\[1-': a bracket", id="host list"
        ),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "a"}, {"names": "a"}]}', "host a is described twice", id="twice"
        ),
        pytest.param('{"version": 1, "version": 1, "hosts": []}', "'version' is there twice", id="a key twice"),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "a", "leaf": "l1"}], "switches": {"l2": "s"}}',
            "switches: l2 has nothing below it: name it as the leaf of a host",
            id="a switch over nothing",
        ),
        pytest.param(
            '{"version": 1, "hosts": [{"names": "a", "leaf": "l"}], "switches": {"l": "s", "s": "l"}}',
            "switch l is above itself: take one of its links out",
            id="a circle",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_place_and_remedy(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_topology_file(text, "t.json")


NAME = st.sampled_from([f"{letter}{number}" for letter in "abc" for number in (1, 2, 10)])
NAMES = st.lists(NAME, max_size=2, unique=True).map(tuple)
NICS = st.lists(st.one_of(st.none(), st.builds(Nic, NAME, NAMES)), max_size=3).map(tuple)
HOSTS = st.lists(st.builds(HostWiring, NAME, NAMES, NAMES, NICS), max_size=3, unique_by=lambda host: host.name)


@settings(max_examples=40, deadline=None)
@given(HOSTS)
def test_what_is_written_is_read_again(hosts):
    leaves = Cluster(tuple(hosts)).leaves()
    cluster = Cluster(tuple(hosts), dict.fromkeys(sorted(leaves), ("SPINE", "OTHER")))
    text = write_topology_file(cluster)
    assert parse_topology_file(text, "t.json") == cluster
    assert json.loads(text)["version"] == 1


CONF = """
# our cluster
SwitchName=leaf1 Nodes=n[1-2] LinkSpeed=100
SwitchName=leaf2 Nodes=n[3-4],\\
login
switchname=spine switches=leaf[1-2]
"""
SHOWN = """SwitchName=leaf1 Level=0 LinkSpeed=100 Nodes=n[1-2]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=login,n[3-4]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=login,n[1-4] Switches=leaf[1-2]
"""


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(CONF.replace("\\\nlogin", "login"), id="configuration"),
        pytest.param(CONF.replace("n[3-4],\\\nlogin", "n[3-4],login \\\n LinkSpeed=1"), id="continued"),
        pytest.param(SHOWN, id="shown"),
    ],
)
def test_the_tree_of_slurm_is_read(text):
    cluster = parse_topology(text)
    assert {host.name: host.leaves for host in cluster.hosts} == {
        "n1": ("leaf1",),
        "n2": ("leaf1",),
        "n3": ("leaf2",),
        "n4": ("leaf2",),
        "login": ("leaf2",),
    }
    assert cluster.above == {"leaf1": ("spine",), "leaf2": ("spine",)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            "BlockName=b1 Nodes=n[1-4]", "line 1: no SwitchName, it begins with BlockName=b1: only", id="block"
        ),
        pytest.param("\nSwitchName=s Nodes=n[1-", "topology.conf line 2: host list 'n\\[1-': a bracket", id="list"),
        pytest.param("SwitchName=s Nodes=n1, n2", "'n2' is not of the form key=value", id="a space"),
        pytest.param("SwitchName=s", "switch s has neither Nodes nor Switches", id="alone"),
        pytest.param("SwitchName=s[1-2] Nodes=n1", "has to be one name", id="several"),
        pytest.param("SwitchName=s Nodes=(null) Switches=t", "names no nodes: only the tree plugin", id="no nodes"),
        pytest.param("", "names no nodes", id="empty"),
    ],
)
def test_another_text_of_slurm_is_refused_by_line_and_remedy(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_topology(text)


def test_addresses_of_nodes_make_the_same_tree():
    pattern = "switch.switch.node"
    cluster = cluster_of_addresses(
        {"n1": ("spine[0-1].leaf1.n1", pattern), "n2": ("spine0.leaf2.n2.cluster.local", pattern), "n3": ("n3", "node")}
    )
    assert [(host.name, host.leaves) for host in cluster.hosts] == [("n1", ("leaf1",)), ("n2", ("leaf2",)), ("n3", ())]
    assert cluster.above == {"leaf1": ("spine0", "spine1"), "leaf2": ("spine0",)}


def test_an_address_that_is_not_of_its_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"'s\.n1' of n1 is not of its pattern 'switch\.switch\.node'"):
        cluster_of_addresses({"n1": ("s.n1", "switch.switch.node")})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param("a", ["a"], id="one"),
        pytest.param("a1,b", ["a1", "b"], id="several"),
        pytest.param("n[1-3,07]", ["n1", "n2", "n3", "n07"], id="ranges keep their width"),
        pytest.param("n[08-11]", ["n08", "n09", "n10", "n11"], id="zeros"),
        pytest.param("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"], id="two brackets"),
    ],
)
def test_a_host_list_is_expanded(text, names):
    assert list(expand(text)) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "names nobody", id="empty"),
        pytest.param("n[3-1]", "range 3-1 is empty", id="backwards"),
        pytest.param("n[0-99999999]", "too long", id="a slip"),
        pytest.param("n[a]", "'a' is no number", id="letters"),
        pytest.param("n[]", "'' is no number", id="nothing in brackets"),
        pytest.param("n[1-2", "not closed", id="open"),
        pytest.param("n1]", "do not match", id="closed"),
        pytest.param("n[1-[2]]", "do not match", id="nested"),
        pytest.param("n1 n2", "there is a space", id="space"),
    ],
)
def test_what_is_no_host_list_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        expand(text)


@settings(max_examples=50)
@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 4))
def test_a_range_has_each_number_once(first, length, width):
    names = expand(f"n[{str(first).zfill(width)}-{first + length - 1}]")
    assert [int(name[1:]) for name in names] == list(range(first, first + length))


@pytest.mark.parametrize(
    ("hosts", "racks"),
    [
        pytest.param(expand("r[01-02]n[1-4]"), {"r01?": 4, "r02?": 4}, id="numbered anew in each rack"),
        pytest.param(expand("rack[1-3]-node[01-04].site"), {"rack1?": 4, "rack2?": 4, "rack3?": 4}, id="with a domain"),
        pytest.param(expand("node[1-8]"), {}, id="one number"),
        pytest.param(expand("gpu-a100-[1-8]"), {}, id="one rack is none"),
        pytest.param(("c1-1", "c1-2", "c2-3", "c2-4"), {}, id="numbered throughout"),
        pytest.param(expand("r1n[1-4],login1"), {}, id="several forms"),
        pytest.param(expand("ip-10-0-[1-2]-[1-9]"), {}, id="addresses"),
        pytest.param((), {}, id="nobody"),
    ],
)
def test_racks_are_guessed_only_from_a_regular_pattern(hosts, racks):
    cluster = guess_racks(hosts)
    assert [host.name for host in cluster.hosts] == list(hosts)
    found: dict[str, int] = {}
    for host in cluster.hosts:
        for leaf in host.leaves:
            found[leaf] = found.get(leaf, 0) + 1
    assert found == racks
