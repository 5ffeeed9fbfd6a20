"""A diagnosis names the element that is to blame, with evidence, or says why it does not."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashrecovery.core.layout import megatron_layout
from megatron_flashrecovery.diagnose.assembly import assemble
from megatron_flashrecovery.diagnose.attribution import attribute
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Nic, Placement
from megatron_flashrecovery.diagnose.communicators import communicators_of, groups_of
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.localization import localize
from megatron_flashrecovery.diagnose.scores import Scores
from megatron_flashrecovery.diagnose.standardization import standardize
from megatron_flashrecovery.diagnose.telemetry import Metric, Telemetry
from megatron_flashrecovery.diagnose.trial import Trial
from tests.diagnose.clusters import reach_of, topology_of

TOPOLOGY = topology_of()
HOST, LEAF, DEVICE, NIC = Kind.HOST, Kind.LEAF, Kind.DEVICE, Kind.NIC


def scores_with(*faults, topology=TOPOLOGY, seed=2, sd=1.0):
    values = sd * np.random.default_rng(seed).normal(size=(4, topology.world))
    for kind, name, shift in faults:
        values[:, reach_of(topology, kind, name)] += shift
    return Scores(values, np.zeros(topology.world, dtype=np.int64))


def named(suspects):
    return [str(each.element) for each in suspects]


def test_a_fault_is_blamed_with_its_evidence():
    found = localize(TOPOLOGY, scores_with((HOST, "n5", 3)))
    assert found.undetermined is None
    assert found.method == "scan"
    first = found.suspects[0]
    assert named(found.suspects)[0] == "host n5"
    assert first.p <= 0.001
    assert first.ranks == tuple(range(40, 48))
    assert first.evidence == "8 of 8 ranks of host n5 are unusual (mean score 5.7), and 4 of 120 others are unusual"
    assert [named(fault) for fault in found.faults] == [["host n5"]]


def test_nobody_is_blamed_for_noise_but_the_most_conspicuous_are_listed():
    found = localize(TOPOLOGY, scores_with())
    assert found.faults == ()
    assert found.undetermined is not None
    assert found.undetermined.startswith("nothing stands out: most conspicuous is device n5/5, and a healthy job has")
    assert 1 < len(found.suspects) <= 5
    assert min(each.p for each in found.suspects) > 0.05


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([(HOST, "n5", 3), (HOST, "n9", 3)], id="two hosts"),
        pytest.param([(HOST, "n4", 4), (HOST, "n5", 4)], id="two hosts at one switch"),
        pytest.param([(LEAF, "leaf2", 3), (DEVICE, "n1/6", 6)], id="a switch and a device"),
        pytest.param([(DEVICE, "n1/6", 6), (DEVICE, "n12/2", 6)], id="two devices"),
        pytest.param([(HOST, "n5", 3), (Kind.PIPELINE, "9-105/32", 4)], id="a host and a pipeline across it"),
    ],
)
def test_two_faults_at_once_are_found(faults):
    found = localize(TOPOLOGY, scores_with(*faults))
    assert found.undetermined is None
    assert {names[0] for names in map(named, found.faults)} == {f"{kind} {name}" for kind, name, _ in faults}
    assert found.faults[0][0].p <= found.faults[1][0].p


def test_a_second_fault_is_invented_at_the_agreed_rate():
    trial = [Trial(level=0.1, rows=40, seed=seed) for seed in range(100)]
    found = [localize(TOPOLOGY, scores_with((HOST, "n5", 4), seed=k), each) for k, each in enumerate(trial)]
    assert all(named(each.faults[0]) == ["host n5"] for each in found)
    # 10 are agreed, up to 20 happen with probability 0.999.
    assert sum(len(each.faults) > 1 for each in found) <= 20


def own_nics(hosts=16):
    """Every device has a NIC of its own: they always reach the same rank."""
    wiring = tuple(
        HostWiring(f"h{k}", (f"l{k % 4}",), nics=tuple(Nic(f"ib{d}") for d in range(4))) for k in range(hosts)
    )
    placement = Placement.regular([host.name for host in wiring], 4)
    communicators = communicators_of(groups_of(megatron_layout(hosts * 4, tensor=4)))
    return assemble(Cluster(wiring), placement, communicators)


def test_elements_that_reach_the_same_ranks_are_not_told_apart_by_scores():
    found = localize(own_nics(), scores_with((DEVICE, "h3/1", 6), topology=own_nics()))
    assert [named(fault) for fault in found.faults] == [["device h3/1", "NIC h3/ib1"]]
    assert found.undetermined == (
        "device h3/1, NIC h3/ib1 explain the same ranks about equally well: one of them is to blame"
    )


def test_hardware_is_named_rather_than_a_communicator_of_the_same_ranks():
    found = localize(own_nics(), scores_with((HOST, "h3", 4), topology=own_nics()))
    assert found.undetermined is None
    assert [named(fault) for fault in found.faults] == [["host h3"]]


def test_a_host_is_not_told_from_its_device_if_half_of_it_is_not_measured():
    scores = scores_with((HOST, "n5", 6))
    scores.values[:, 41:48] = np.nan
    found = localize(TOPOLOGY, scores)
    assert named(found.faults[0])[:3] == ["device n5/0", "NIC n5/mlx5_0", "host n5"]
    assert found.undetermined is not None


def test_a_switch_that_explains_two_of_its_hosts_as_well_is_named_with_them():
    """The other hosts at that switch are unusual too, but hardly."""
    scores = scores_with((LEAF, "leaf1", 1.6), (HOST, "n4", 0.8), (HOST, "n5", 0.8))
    found = localize(TOPOLOGY, scores)
    assert named(found.suspects)[0] == "leaf switch leaf1"


def measured_with(metric, kind, name, value, topology):
    rng = np.random.default_rng(6)
    values = {
        Metric.COMPUTE: 0.1 * (1 + 0.01 * rng.standard_t(5, size=(5, topology.world))),
        Metric.RETRANSMITS: rng.poisson(0.3, size=(5, topology.world)).astype(float),
        Metric.ERRORS: np.zeros((5, topology.world)),
        Metric.SILENCE: np.full((5, topology.world), 0.2),
    }
    values[metric][:, reach_of(topology, kind, name)] += value
    return standardize(Telemetry(values, np.zeros(topology.world, dtype=np.int64)))


@pytest.mark.parametrize(
    ("metric", "value", "blamed", "evidence"),
    [
        pytest.param(
            Metric.COMPUTE, 0.06, "device h3/1", "rank 13 computes 1.6 times as long as its peers", id="compute"
        ),
        pytest.param(Metric.RETRANSMITS, 40, "NIC h3/ib1", "rank 13 sent 40.4 packets again in a window", id="links"),
    ],
)
def test_a_metric_tells_what_scores_do_not(metric, value, blamed, evidence):
    topology = own_nics()
    measured = measured_with(metric, DEVICE, "h3/1", value, topology)
    found = localize(topology, measured.scores, measured=measured)
    assert found.undetermined is None
    assert named(found.suspects)[0] == blamed
    assert found.suspects[0].evidence.startswith(evidence)


@pytest.mark.parametrize(
    ("metric", "value", "evidence"),
    [
        pytest.param(
            Metric.ERRORS, 30, "4 of 4 ranks of host h3 have 30 errors in a window, their peers 0", id="errors"
        ),
        pytest.param(
            Metric.SILENCE, 4, "4 of 4 ranks of host h3 have been silent for 4.2 s, their peers for 0.2 s", id="silence"
        ),
    ],
)
def test_evidence_is_in_the_unit_of_what_is_unusual(metric, value, evidence):
    topology = own_nics()
    measured = measured_with(metric, HOST, "h3", value, topology)
    assert localize(topology, measured.scores, measured=measured).suspects[0].evidence.startswith(evidence)


def test_a_few_ranks_are_too_few():
    topology = assemble(Cluster(), Placement.regular(["a"], 4))
    found = localize(topology, Scores(np.array([[6.0, 0, 0, 0]] * 5), np.zeros(4, dtype=np.int64)))
    assert found.undetermined is not None
    assert found.undetermined.endswith("4 ranks are too few to say more")
    assert named(found.suspects) == ["device a/0"]


def test_nothing_unusual_is_said_so():
    found = localize(TOPOLOGY, Scores(np.zeros((3, 128)), np.zeros(128, dtype=np.int64)))
    assert found.undetermined == "nothing is unusual in the 128 ranks that were measured"
    assert found.suspects == ()


def test_a_region_is_explained_by_the_elements_behind_it():
    scores = scores_with((HOST, "n5", 3), (DEVICE, "n9/2", 6))
    found = attribute(TOPOLOGY, scores, [*range(40, 48), 74], p=0.01)
    assert found.undetermined is None
    assert found.method == "gbgp"
    assert named(found.suspects)[:2] == ["host n5", "device n9/2"]
    assert {each.p for each in found.suspects} == {0.01}


def test_a_region_whose_cause_is_not_in_the_topology_is_undetermined():
    """Three ranks on each of six hosts at different switches."""
    region = [8 * host + device for host in (0, 3, 5, 8, 11, 14) for device in (1, 4, 6)]
    scores = scores_with()
    scores.values[:, region] += 3
    found = attribute(TOPOLOGY, scores, region, p=0.01)
    assert found.undetermined is not None
    assert "no known element explains this region of 18 ranks" in found.undetermined
    assert found.faults == ()


def test_a_region_without_ranks_is_refused():
    with pytest.raises(ValueError, match="nothing to explain"):
        attribute(TOPOLOGY, scores_with(), [], p=0.01)
