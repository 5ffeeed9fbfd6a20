"""What a diagnosis learns from a journal."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.core.findings import NumbersBad, PeersDiffered
from megatron_flashrecovery.core.ids import Epoch, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.job import JobConfig
from megatron_flashrecovery.core.messages import (
    Loss,
    NodeLost,
    OperationsFailed,
    Park,
    RanksHung,
    StartWorkers,
    WorkersLost,
)
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.diagnose.telemetry import Metric
from megatron_flashrecovery.runtime import dossier as dossier_module
from megatron_flashrecovery.runtime.case import strikes_of
from megatron_flashrecovery.runtime.chronicle import SlowNoted
from megatron_flashrecovery.runtime.dossier import OWN_TIME, read_dossier
from megatron_flashrecovery.runtime.journal import FILE_NAME, JobStarted, Journal
from megatron_flashrecovery.runtime.measured import Period, period_of
from megatron_flashrecovery.runtime.node_messages import DeviceNoted, HeartbeatsLate, NodeMeasured
from tests.diagnose.recorded import START, Records

NODE = NodeId("node1")


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path, hosts=4, devices=2)


def test_it_knows_where_ranks_sit_and_what_they_are_part_of(records):
    dossier = read_dossier(records.directory)
    assert dossier.host_of == {rank: f"gpu{rank // 2:02d}" for rank in range(8)}
    assert [dossier.local[rank] for rank in range(8)] == [0, 1] * 4
    assert dossier.devices[5] == "0000:11:00"
    assert dossier.peers[3] == tuple(range(8))
    assert list(dossier.groups.values()) == [tuple(range(8))]


def test_own_times_are_kept_as_they_were_told(records):
    dossier = read_dossier(records.train(2).directory)
    assert {(sample.label, sample.metric) for sample in dossier.samples} == {(OWN_TIME, Metric.COMPUTE)}
    assert len(dossier.samples) == 8
    assert sorted(rank for sample in dossier.samples[:4] for rank in sample.values) == list(range(8))


def test_counters_become_those_of_ranks_where_they_are_of_devices_and_else_of_hosts(records):
    grown = {
        "device.0000:11:00.ecc_corrected": 7,
        "device.0000:99:00.ecc_corrected": 1,
        "nic.eth0.rx_errors": 2,
        "nic.eth1.rx_errors": 3,
        "ib.mlx5_0/1.symbol_error": 4,
        "tcp.sent": 1000,
        "tcp.retransmitted": 5,
    }
    records.write("note", NodeMeasured(NODE, 20.0, grown))
    records.write("note", HeartbeatsLate(NODE, 3, 1.5))
    told = {(each.label, each.host): each for each in read_dossier(records.directory).samples}
    assert told["ecc corrected of devices", ""].values == {3: 7}
    hosts = {label: sample.value for (label, host), sample in told.items() if host == "gpu01"}
    assert hosts == {
        "errors of network interfaces": 5,
        "errors of InfiniBand ports": 4,
        "TCP segments sent again": 5,
        "late heartbeats": 3,
    }
    assert told["TCP segments sent again", "gpu01"].seconds == 20.0


def test_incidents_have_their_class_and_some_say_nothing_of_a_place(records):
    rank = Rank(3)
    records.lose(3).lose(4, fault=Fault.EXCEPTION)
    records.write("event", RanksHung(NODE, Epoch(0), {rank: "it hangs"}, {}, Step(1)))
    records.write("event", RanksHung(NODE, Epoch(0), {rank: "it still hangs"}, {}, Step(1)))
    records.write("event", OperationsFailed(NODE, Epoch(0), {rank: "connection reset"}, Step(1)))
    records.write("note", DeviceNoted(NODE, "0000:11:00", (rank,), Fault.DEVICE_POISONED.value, "Xid 48"))
    records.write("note", DeviceNoted(NODE, "0000:11:00", (rank,), "", "it is hot"))
    records.write("event", NumbersBad(NODE, Epoch(0), Step(1), (rank,), "NaN", {rank: "gradient"}))
    records.write("event", PeersDiffered(NODE, Epoch(0), Step(1), rank, Rank(4), 8, "part 1"))
    records.write("event", NodeLost(NODE, "silent"))
    found = [(each.kind, each.ranks, each.is_own) for each in read_dossier(records.directory).incidents]
    assert found == [
        ("process ended", (3,), True),
        ("exception", (4,), False),
        ("hang", (3,), False),
        ("communicator error", (3,), False),
        ("uncorrectable memory error", (3,), True),
        ("note of a device", (3,), False),
        ("bad numbers", (3,), True),
        ("silent corruption", (3, 4), False),
        ("node lost", (2, 3), True),
    ]


def test_what_hits_a_host_at_one_moment_is_one_incident(records):
    records.lose(1, 1).lose_host(2)
    records.write("note", DeviceNoted(NodeId("node2"), "0000:11:00", (Rank(5),), "device lost", "off the bus"))
    assert strikes_of(read_dossier(records.directory)) == [(1,), (1,), (4, 5)]


def test_a_loss_that_is_told_twice_counts_once(records):
    records.lose(1)
    records._lives[1] = 1
    assert len(read_dossier(records.lose(1).directory).incidents) == 1


def test_to_end_again_in_the_same_step_speaks_against_no_place_for_the_data_is_the_same(records):
    for life, (step, fault) in enumerate(
        [
            (7, Fault.PROCESS_ENDED),
            (7, Fault.PROCESS_ENDED),
            (7, Fault.DEVICE_ERROR),
            (8, Fault.PROCESS_ENDED),
            (None, Fault.PROCESS_ENDED),
            (None, Fault.PROCESS_ENDED),
        ]
    ):
        at = None if step is None else Step(step)
        loss = Loss(Rank(3), WorkerId(f"rank3.{life}"), "killed by SIGSEGV", Epoch(0), at, fault=fault)
        records.write("event", WorkersLost(NODE, (loss,)))
    assert [each.is_own for each in read_dossier(records.directory).incidents] == [True, False, True, True, True, True]


def test_who_is_named_for_what_others_may_have_done_is_no_incident_of_a_place(records):
    records.lose(1, fault=Fault.DEADLINE).lose(2, fault=Fault.PLAN_FAILED)
    assert strikes_of(read_dossier(records.directory)) == []


def test_measurements_of_days_are_left_in_the_journal_and_those_that_count_are_not(records, monkeypatch):
    records.train(20).train(10, {2: 2.0}).name_slow(2)
    alarm = records.now
    records.now += 7 * 3600
    records.train(700)
    decoded = []
    real = dossier_module.decode_as

    def counting(cls, line):
        decoded.append(line.time)
        return real(cls, line)

    monkeypatch.setattr(dossier_module, "decode_as", counting)
    whole = read_dossier(records.directory)
    assert whole.end == records.now
    assert sum(time < records.now - 2 * 3600 for time in decoded) < 20
    times = {each.time for each in read_dossier(records.directory, last=8 * 3600.0).samples}
    assert min(times) == START + 1
    assert period_of(whole) == Period(records.now - 3600, records.now)
    records.write("note", SlowNoted(Rank(2), None))
    records.name_slow(3)
    records.write("note", SlowNoted(Rank(3), None))
    assert alarm < min(each.time for each in read_dossier(records.directory).samples)


def test_a_time_in_which_somebody_was_slow_is_read_though_it_is_long_over(records):
    records.train(20).train(10, {2: 2.0}).name_slow(2).train(5)
    over = records.now
    records.write("note", SlowNoted(Rank(2), None))
    records.now += 7 * 3600
    dossier = read_dossier(records.train(10).directory)
    assert (dossier.samples[0].time, dossier.samples[-1].time) == (START + 1, over)
    assert (dossier.end, period_of(dossier).end) == (records.now, over)


def test_alarms_begin_and_end(records):
    records.train(1).name_slow(2)
    assert read_dossier(records.directory).slow == ((START + 1, 2, True),)


def test_a_new_epoch_ends_all_alarms(records):
    records.train(1).name_slow(2, 5).train(1)
    records.write("command", Park(Epoch(1), OrderNumber(1), (Rank(7),)), epoch=1)
    records.train(1)
    records.write("command", Park(Epoch(2), OrderNumber(2), (Rank(7),)), epoch=2)
    began, ended = START + 1, START + 2
    assert read_dossier(records.directory).slow == tuple((began, rank, True) for rank in (2, 5)) + tuple(
        (ended, rank, False) for rank in (2, 5)
    )


def move(records, *ranks, to="node9"):
    records.write("command", StartWorkers(NodeId(to), Epoch(1), tuple(map(Rank, ranks))), epoch=1)


def test_what_was_seen_of_a_rank_speaks_of_the_node_where_it_sat_then(records):
    """A lost node is no part of the job any more, and the one in its place is not to blame for it."""
    records.train(2, {3: 4.0}).name_slow(3).lose(3)
    records.write("note", HeartbeatsLate(NODE, 3, 1.5))
    records.write("note", NodeMeasured(NODE, 20.0, {"nic.eth0.rx_errors": 2}))
    records.now += 60.0
    records.write("event", NodeLost(NODE, "silent"))
    move(records, 2, 3)
    late = WorkersLost(NODE, (Loss(Rank(2), WorkerId("rank2.7"), "killed", Epoch(0)),))
    records.now += 1.0
    records.write("event", late)
    records.write("note", HeartbeatsLate(NodeId("node9"), 1, 1.5))
    dossier = read_dossier(records.directory, last=600.0)
    assert {rank: dossier.node_of[rank] for rank in (1, 2, 3, 4)} == {1: "node0", 2: "node9", 3: "node9", 4: "node2"}
    assert (dossier.host_of[2], dossier.host_of[4]) == ("node9", "gpu02")
    assert (dossier.incidents, dossier.slow) == ((), ())
    assert not {2, 3} & {rank for sample in dossier.samples for rank in sample.values}
    assert {sample.host for sample in dossier.samples} == {"", "node9"}
    assert not {2, 3} & dossier.devices.keys()
    records.write(
        "event", WorkersLost(NodeId("node9"), (Loss(Rank(2), WorkerId("rank2.1@node9"), "killed", Epoch(1)),))
    )
    assert strikes_of(read_dossier(records.directory)) == [(2,)]


def test_a_rank_that_is_started_again_where_it_was_has_not_moved(records):
    records.lose(3)
    move(records, 3, to="node1")
    assert [each.ranks for each in read_dossier(records.directory).incidents] == [(3,)]


def test_a_spare_node_is_no_place_of_the_job(records):
    records.write("note", HeartbeatsLate(NodeId("node9"), 1, 1.5))
    records.write("event", NodeLost(NodeId("node9"), "silent"))
    dossier = read_dossier(records.directory)
    assert (dossier.incidents, dossier.samples) == ((), ())


def test_a_job_that_never_began_has_no_layout(tmp_path):
    journal = Journal(tmp_path / FILE_NAME)
    journal.started(JobStarted(JobConfig(), {NODE: (Rank(0),)}), time=START, now=0.0)
    with pytest.raises(RecordDamaged, match="the job has not come to its first step"):
        read_dossier(tmp_path)


def test_no_records_are_no_dossier(tmp_path):
    with pytest.raises(RecordDamaged, match="name the --log-dir of a run"):
        read_dossier(tmp_path)
