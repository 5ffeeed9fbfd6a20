"""Lines of evidence, and who is accused by them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose import localization
from megatron_flashrecovery.diagnose.diagnosis import Diagnosis, Suspect
from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.repetition import Throws, find_repeated
from megatron_flashrecovery.runtime.case import diagnose, places_of, repeated
from megatron_flashrecovery.runtime.dossier import read_dossier
from megatron_flashrecovery.runtime.localizing import within
from megatron_flashrecovery.runtime.measured import period_of
from megatron_flashrecovery.runtime.node_messages import NodeMeasured
from megatron_flashrecovery.runtime.surroundings import surroundings_of
from tests.diagnose.clusters import topology_of
from tests.diagnose.recorded import Records


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path, hosts=10, devices=4, tensor=4)


def case_of(records, locate=None, level=0.01):
    dossier = read_dossier(records.directory)
    topology = surroundings_of(dossier, None, {}).topology
    return diagnose(dossier, topology, period_of(dossier), locate or within(5.0), level=level)


def suspects(p, *elements, ranks=(5, 6)):
    return tuple(Suspect(Element(*each), p, 4.0, ranks, "it is slow") for each in elements)


def saying(fault, undetermined=None):
    """Somebody who finds always the same."""
    return lambda topology, measured, trial: Diagnosis(fault, undetermined, "scan", (fault,) if fault else ())


def test_what_was_counted_of_hosts_is_judged_among_hosts(tmp_path):
    records = Records(tmp_path, hosts=40, devices=2).train(10)
    for host in range(40):
        records.write(
            "note", NodeMeasured(records.node(host), 10.0, {"nic.eth0.rx_errors": 900 if host == 7 else host % 5 + 1})
        )
    (accused,) = case_of(records.train(10)).accused
    assert (accused.name, accused.line) == ("host gpu07", "errors of network interfaces")
    assert (accused.hosts, accused.nodes) == (("gpu07",), ("node7",))
    assert accused.suspects[0].ranks == (14, 15)
    assert accused.suspects[0].evidence == "host gpu07 has 900 errors, its peers 3, and 0 of 39 others are unusual"


def test_what_was_counted_of_a_device_is_judged_among_ranks(tmp_path):
    records = Records(tmp_path, hosts=16, devices=4, tensor=4).train(10)
    records.write("note", NodeMeasured(records.node(5), 10.0, {"device.0000:12:00.ecc_uncorrected": 100_000}))
    (accused,) = case_of(records.train(10)).accused
    assert (accused.name, accused.line) == ("device gpu05/2", "ecc uncorrected of devices")
    assert accused.evidence.split(": ")[1].startswith("rank 22 has 1e+05 errors, its peers 0")


def test_the_more_lines_there_are_the_surer_each_must_be(records):
    levels = []

    def remember(topology, measured, trial):
        levels.append(trial.level)
        return Diagnosis((), "nothing", "scan")

    records.train(5)
    case_of(records, remember)
    records.write("note", NodeMeasured(records.node(0), 5.0, {"tcp.retransmitted": 3}))
    case_of(records.lose(1).train(5), remember)
    assert levels == [0.01, pytest.approx(0.01 / 3), pytest.approx(0.01 / 3)]


def test_those_that_are_not_told_apart_are_accused_together_if_they_are_on_one_host(records):
    records.train(5)
    of_one_host = suspects(0.001, (Kind.DEVICE, "gpu01/1"), (Kind.HOST, "gpu01"))
    (accused,) = case_of(records, saying(of_one_host, "one of them")).accused
    assert accused.name == "device gpu01/1 or host gpu01"
    assert accused.hosts == ("gpu01",)
    of_two = suspects(0.001, (Kind.HOST, "gpu01"), (Kind.HOST, "gpu02"), ranks=(5, 9))
    found = case_of(records, saying(of_two, "one of them is to blame"))
    assert (found.accused, found.undetermined) == ((), "own time of a step: one of them is to blame")


def test_of_a_communicator_no_host_is_to_be_left_out(records):
    (accused,) = case_of(records.train(5), saying(suspects(0.001, (Kind.TENSOR, "4-7")))).accused
    assert (accused.hosts, accused.nodes) == ((), ())


def test_by_own_times_a_node_is_done_without_only_if_a_rank_there_was_named_slow(records):
    records.train(5).name_slow(6)
    fault = suspects(0.0001, (Kind.LEAF, "leaf0"), ranks=(1, 6))
    (accused,) = case_of(records, saying(fault)).accused
    assert (len(accused.hosts), len(accused.nodes)) == (2, 1)
    assert accused.nodes == (read_dossier(records.directory).node_of[6],)


def test_hosts_are_named_with_all_that_speaks_against_them(records):
    records.train(5).lose(5, 5, 5, 5)
    case = case_of(records, saying(suspects(0.005, (Kind.HOST, "gpu01"))))
    assert places_of(case) == {"gpu01": ("device gpu01/1, by incidents", "host gpu01, by own time of a step")}


def test_in_a_small_job_the_alarm_decides_where_peers_cannot(tmp_path):
    records = Records(tmp_path, hosts=1, devices=4)
    slower = {2: 3.0}
    case = case_of(records.train(20).train(6, slower).name_slow(2).train(6, slower))
    (accused,) = case.accused
    assert accused.name == "device gpu00/2"
    assert accused.p > 0.01
    assert "4 ranks are too few for a smaller p, so the alarm for slow ranks counts" in accused.evidence


def test_without_an_alarm_a_small_job_is_undetermined(tmp_path):
    case = case_of(Records(tmp_path, hosts=1, devices=4).train(30))
    assert case.accused == ()
    assert case.undetermined is not None


def test_an_alarm_of_others_than_the_most_conspicuous_one_decides_nothing(tmp_path):
    records = Records(tmp_path, hosts=1, devices=4)
    case = case_of(records.train(20).train(6, {2: 3.0}).name_slow(1).train(6, {2: 3.0}))
    assert case.accused == ()


def test_where_nothing_was_measured_that_is_the_reason(records):
    assert "nothing was measured in this time" in str(case_of(records).undetermined)


def test_p_counts_that_incidents_are_looked_at_again_and_again():
    """Five are the second look, which has a third of the level, and eight are the third."""
    topology, hosts = topology_of(hosts=16), np.arange(128) // 8
    for number, share in ((5, 3), (8, 4)):
        struck = [(Rank(5),)] * 3 + [(Rank(8 + 16 * other),) for other in range(number - 3)]
        alone = find_repeated(topology, hosts, struck, Throws(level=0.05)).suspects[0]
        counted = repeated(topology, hosts, struck, level=0.05 * share).suspects[0]
        assert counted.element == alone.element
        assert counted.p == pytest.approx(share * alone.p)
    struck = [(Rank(rank),) for rank in (8, 10, 12, 40, 100)]
    assert find_repeated(topology, hosts, struck, Throws(level=0.2)).suspects
    assert not repeated(topology, hosts, struck, level=0.2).suspects


def test_p_counts_that_the_scan_is_not_alone(tmp_path):
    """GBGP looks as well, so the scan has half of the level."""
    seen = []

    def locate(topology, measured, trial):
        seen.append(localization.localize(topology, measured.scores, trial))
        return within(5.0)(topology, measured, trial)

    records = Records(tmp_path, hosts=10, devices=4, tensor=4).train(8, dict.fromkeys(range(4, 8), 3.0))
    (accused,) = case_of(records, locate).accused
    (alone,) = (each.suspects[0] for each in seen)
    assert accused.suspects[0].element == alone.element
    assert accused.p == pytest.approx(2 * alone.p, rel=0.3)
