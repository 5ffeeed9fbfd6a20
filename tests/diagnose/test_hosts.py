"""A topology whose ranks are hosts."""

import numpy as np

from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.hosts import of_hosts
from tests.diagnose.clusters import reach_of, topology_of

HOSTS = of_hosts(topology_of(8, 4), np.arange(32) // 4)


def test_what_is_inside_of_a_host_and_communicators_are_left_out():
    assert {element.kind for element in HOSTS.elements} == {Kind.HOST, Kind.LEAF, Kind.SPINE, Kind.POWER}
    assert HOSTS.world == 8


def test_an_element_reaches_the_hosts_of_its_ranks():
    assert reach_of(HOSTS, Kind.HOST, "n5") == [5]
    assert reach_of(HOSTS, Kind.LEAF, "leaf1") == [4, 5, 6, 7]


def test_a_host_takes_the_place_of_the_device():
    assert [HOSTS.elements[k] for k in HOSTS.device_of] == [Element(Kind.HOST, f"n{host}") for host in range(8)]


def test_wires_are_those_among_what_is_left():
    names = {tuple(sorted(str(HOSTS.elements[end]) for end in edge)) for edge in HOSTS.edges}
    assert ("host n0", "leaf switch leaf0") in names
    assert ("leaf switch leaf0", "spine switch spine0") in names
    assert all("device" not in end for edge in names for end in edge)
