"""Every element reaches the ranks that depend on it, and is next to what it is wired to."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.layout import megatron_layout
from megatron_flashrecovery.diagnose.assembly import assemble
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Nic, Place, Placement
from megatron_flashrecovery.diagnose.communicators import communicators_of, groups_of, spelled, stages_of
from megatron_flashrecovery.diagnose.elements import Element, Kind
from tests.diagnose.clusters import reach_of, topology_of


@pytest.mark.parametrize(
    ("kind", "name", "ranks"),
    [
        pytest.param(Kind.DEVICE, "n1/3", [11], id="device"),
        pytest.param(Kind.NIC, "n1/mlx5_1", [10, 11], id="two devices share a NIC"),
        pytest.param(Kind.HOST, "n1", list(range(8, 16)), id="host"),
        pytest.param(Kind.LEAF, "leaf1", list(range(32, 64)), id="leaf"),
        pytest.param(Kind.SPINE, "spine1", list(range(64, 128)), id="spine"),
        pytest.param(Kind.POWER, "pdu1", [*range(8, 16), *range(72, 80)], id="power domains cross switches"),
        pytest.param(Kind.TENSOR, "4-7", [4, 5, 6, 7], id="tensor"),
        pytest.param(Kind.PIPELINE, "1-97/32", [1, 33, 65, 97], id="pipeline"),
        pytest.param(Kind.DATA, "0-28/4", [0, 4, 8, 12, 16, 20, 24, 28], id="data"),
    ],
)
def test_an_element_reaches_the_ranks_that_depend_on_it(kind, name, ranks):
    assert reach_of(topology_of(), kind, name) == ranks


def neighbours(topology, element):
    pairs = [(topology.elements[a], topology.elements[b]) for a, b in topology.edges]
    return {a for a, b in pairs if b == element} | {b for a, b in pairs if a == element}


def test_what_is_wired_together_is_next_to_each_other():
    topology = topology_of()
    host, nic = Element(Kind.HOST, "n5"), Element(Kind.NIC, "n5/mlx5_0")
    leaf, spine = Element(Kind.LEAF, "leaf1"), Element(Kind.SPINE, "spine0")
    assert neighbours(topology, Element(Kind.DEVICE, "n5/1")) == {host, nic}
    assert neighbours(topology, nic) == {Element(Kind.DEVICE, "n5/0"), Element(Kind.DEVICE, "n5/1"), host, leaf}
    assert {leaf, Element(Kind.POWER, "pdu5")} & neighbours(topology, host) == {Element(Kind.POWER, "pdu5")}
    assert spine in neighbours(topology, leaf)
    assert neighbours(topology, spine) == {leaf, Element(Kind.LEAF, "leaf0")}


def test_a_rank_names_its_device_and_minus_one_where_none_is_known():
    topology = assemble(Cluster(), Placement((Place("a", 1), Place("a", -1))))
    assert topology.elements == (Element(Kind.DEVICE, "a/1"), Element(Kind.HOST, "a"))
    assert topology.device_of.tolist() == [0, -1]


def test_a_rail_has_the_switch_of_its_port_and_not_that_of_its_host():
    rails = (Nic("ib0", ("rail0",)), Nic("ib1", ("rail1",)), None)
    cluster = Cluster((HostWiring("a", ("top",), nics=rails), HostWiring("b", ("top",), nics=rails)))
    topology = assemble(cluster, Placement.regular(["a", "b"], 3))
    assert reach_of(topology, Kind.LEAF, "rail0") == [0, 3]
    assert reach_of(topology, Kind.LEAF, "top") == [2, 5]


def test_a_host_is_found_by_the_name_before_its_first_dot():
    topology = assemble(Cluster((HostWiring("a", ("leaf",)),)), Placement.regular(["a.cluster.local"], 1))
    assert reach_of(topology, Kind.LEAF, "leaf") == [0]


def test_a_host_that_nobody_described_hangs_on_nothing():
    topology = assemble(Cluster((HostWiring("a", ("leaf",)),)), Placement.regular(["a", "b"], 1))
    assert neighbours(topology, Element(Kind.HOST, "b")) == {Element(Kind.DEVICE, "b/0")}


def test_switches_above_switches_are_spines_however_high():
    cluster = Cluster((HostWiring("a", ("l",)),), {"l": ("s", "t"), "s": ("core",), "t": ("core",)})
    topology = assemble(cluster, Placement.regular(["a"], 1))
    spines = {element.name for element in topology.elements if element.kind is Kind.SPINE}
    assert spines == {"s", "t", "core"}
    assert len(topology.edges) == len({tuple(edge) for edge in topology.edges.tolist()}) == 6


@pytest.mark.parametrize(
    ("build", "words"),
    [
        pytest.param(lambda: Cluster((HostWiring("a"), HostWiring("a"))), "host a is described twice", id="twice"),
        pytest.param(lambda: Cluster((), {"s": ("t",), "t": ("s",)}), "is above itself", id="circle"),
        pytest.param(
            lambda: assemble(Cluster(), Placement.regular(["a"], 1), communicators_of({"group[0,1]#0": (0, 1)})),
            "holds rank 1, but only 1 ranks have a place: give the host of every rank",
            id="no-place",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


def test_groups_of_the_same_ranks_are_one_communicator_of_the_kind_that_says_most():
    keys = ("MODEL_PARALLEL_GROUP", "TENSOR_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_GLOO")
    found = communicators_of(
        {f"{key}[0,1]#0": (0, 1) for key in keys} | {"EMBEDDING_GROUP[3,0]#0": (3, 0), "x[1]": (1,)}
    )
    assert [(each.kind, each.name, each.ranks) for each in found] == [
        (Kind.TENSOR, "0,1", (0, 1)),
        (Kind.GROUP, "EMBEDDING_GROUP 0,3", (0, 3)),
    ]


def test_names_of_communicators_of_a_layout_are_unique():
    topology = topology_of()
    assert len(set(topology.elements)) == len(topology.elements)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        pytest.param([4, 5], "4,5", id="a pair"),
        pytest.param([0, 1, 2], "0-2", id="in a row"),
        pytest.param([1, 9, 17], "1-17/8", id="every eighth"),
        pytest.param([1, 2, 4], "1,2,4", id="irregular"),
        pytest.param([0, 1, 2, 3, 4, 5, 6, 7, 9], "0,1,2 and 6 more, 65000ad7", id="many irregular"),
    ],
)
def test_ranks_are_spelled_short(ranks, text):
    assert spelled(ranks) == text


def test_a_rank_is_of_the_stage_of_its_place_in_the_pipeline():
    layout = megatron_layout(8, tensor=2, pipeline=2)
    assert stages_of(8, groups_of(layout)) == (0, 0, 0, 0, 1, 1, 1, 1)
    assert stages_of(2, {}) == (0, 0)
