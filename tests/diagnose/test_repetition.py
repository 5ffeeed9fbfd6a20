"""Which element was hit more often than chance alone hits one."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.repetition import Throws, find_repeated
from tests.diagnose.clusters import reach_of, topology_of

HOSTS, DEVICES = 16, 8
TOPOLOGY = topology_of(HOSTS, DEVICES)
HOST_OF = np.arange(HOSTS * DEVICES) // DEVICES
QUICK = Throws(permutations=199, seed=1)


def find(*incidents):
    return find_repeated(TOPOLOGY, HOST_OF, incidents, QUICK)


@pytest.mark.parametrize(
    ("incidents", "element"),
    [
        pytest.param([[5], [5], [5]], Element(Kind.DEVICE, "n0/5"), id="one-device-three-times"),
        pytest.param([[8], [10], [11], [14]], Element(Kind.HOST, "n1"), id="four-devices-of-a-host"),
        pytest.param([range(8, 16), range(8, 16), range(8, 16)], Element(Kind.HOST, "n1"), id="a-whole-host"),
        pytest.param([[0], [9], [17], [20], [30], [26], [1]], Element(Kind.LEAF, "leaf0"), id="seven-under-one-leaf"),
        pytest.param([[70], [3], [3], [3], [120], [3]], Element(Kind.DEVICE, "n0/3"), id="among-others"),
    ],
)
def test_what_was_hit_again_and_again_is_blamed(incidents, element):
    found = find(*incidents)
    assert found.undetermined is None
    assert found.suspects[0].element == element
    assert found.suspects[0].p <= QUICK.level


@pytest.mark.parametrize(
    ("incidents", "says"),
    [
        pytest.param([], "no incident", id="none"),
        pytest.param([[5]], "1 incident, at most 1 in one place", id="one"),
        pytest.param([range(8)], "1 incident", id="one-whole-host"),
        pytest.param([[5], [40], [77], [100], [121]], "chance alone", id="five-anywhere"),
    ],
)
def test_what_chance_does_as_well_blames_nobody_and_says_why(incidents, says):
    found = find(*incidents)
    assert found.suspects == ()
    assert says in found.undetermined


def test_two_places_are_both_found():
    found = find([5], [5], [5], [5], *[[rank] for rank in (72, 74, 77, 79, 73)])
    assert [suspect.element.name for suspect in found.suspects] == ["n0/5", "n9"]
    assert found.suspects[1].ranks == (72, 73, 74, 77, 79)


def test_elements_with_the_same_ranks_are_named_as_not_told_apart():
    one_per_host = topology_of(8, 1, tensor=1, pipeline=1)
    found = find_repeated(one_per_host, np.arange(8), [[3]] * 4, QUICK)
    assert found.suspects[0].element == Element(Kind.DEVICE, "n3/0")
    assert "not told from" in found.suspects[0].evidence
    assert "host n3" in found.suspects[0].evidence


def test_incidents_at_random_blame_somebody_as_seldom_as_is_said():
    rng, quick, jobs = Random(7), Throws(permutations=99, level=0.05), 200
    blamed = 0
    for _ in range(jobs):
        incidents = [[rng.randrange(HOSTS * DEVICES)] for _ in range(rng.randrange(2, 12))]
        blamed += bool(find_repeated(TOPOLOGY, HOST_OF, incidents, quick).suspects)
    # 0.05 * 200 = 10, standard deviation 3.1
    assert blamed <= 19


def test_the_same_incidents_give_the_same_diagnosis():
    incidents = [[3], [3], [60], [3]]
    assert find(*incidents) == find(*incidents)


def test_five_losses_under_one_leaf_of_forty_blame_it_and_five_anywhere_nobody():
    topology = topology_of(160, 8)
    hosts = np.arange(1280) // 8
    (suspect,) = find_repeated(topology, hosts, [[96], [105], [113], [117], [126]]).suspects
    assert (suspect.element, suspect.p) == (Element(Kind.LEAF, "leaf3"), 0.001)
    assert set(suspect.ranks) <= set(reach_of(topology, Kind.LEAF, "leaf3"))
    assert find_repeated(topology, hosts, [[96], [305], [513], [917], [1126]]).suspects == ()
