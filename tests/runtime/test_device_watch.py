"""Who is ended for what the driver says of a device, and as what they count."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from megatron_flashrecovery.core.counting import EVERY
from megatron_flashrecovery.core.devices import Trouble
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.runtime.device_watch import DeviceWatch
from megatron_flashrecovery.runtime.node_messages import NodeMeasured, NodePlaced

NODE = NodeId("node1")
XID_48 = "NVRM: Xid (PCI:0000:3b:00): 48, pid=7, DBE"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Control(list):
    send = list.append


class Log:
    """The kernel's."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def lines(self) -> list[str]:
        found, self.new = self.new, []
        return found

    def close(self) -> None:
        pass


class Probe(Log):
    devices: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.devices = {"GPU-1": "0000:3b:00", "GPU-2": "0000:5e:00"}
        self.counters: dict[str, int] = {}
        self.troubles: list[Trouble] = []

    def look(self) -> Iterable[Trouble]:
        found, self.troubles = self.troubles, []
        return found


class Node:
    """Two ranks, 4 and 5, on two devices."""

    def __init__(self) -> None:
        self.clock, self.control, self.log, self.probe = Clock(), Control(), Log(), Probe()
        ranks = (Rank(4), Rank(5))
        self.watch = DeviceWatch(NODE, ranks, self.control, self.log, self.probe, self.clock)  # type: ignore[arg-type]
        self.workers = [worker(4, 1), worker(5, 1)]

    def look(self, ended=()):
        self.clock.now += 0.2
        return self.watch.look([each for each in self.workers if each not in ended], list(ended))


def worker(rank, life):
    return SimpleNamespace(rank=Rank(rank), id=f"{rank}.{life}")


@pytest.fixture
def node(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Node()


def test_whoever_computes_on_a_device_that_fails_is_ended_with_the_evidence(node):
    node.log.new = [XID_48]
    ((doomed, evidence),) = node.look()
    assert doomed is node.workers[0]
    assert "Xid 48 of device 0000:3b:00, double-bit memory error" in evidence
    (note,) = node.control
    assert (note.device, note.ranks, note.fault) == ("0000:3b:00", (4,), "uncorrectable memory error")
    assert node.watch.fault_of("4.1", Fault.PROCESS_ENDED) is Fault.DEVICE_POISONED
    assert node.watch.fault_of("4.1", Fault.PROCESS_ENDED) is Fault.PROCESS_ENDED


def test_what_a_worker_says_of_its_device_counts_more_than_its_number(node):
    node.watch.note_device(Rank(4), "0000:5e:00")
    node.watch.note_device(Rank(5), "GPU-1")
    node.log.new = [XID_48]
    ((doomed, _),) = node.look()
    assert doomed.rank == 5


def test_a_note_ends_nobody(node):
    node.probe.troubles = [Trouble("0000:3b:00", None, "it is hot")]
    assert node.look() == []
    assert [note.evidence for note in node.control] == ["it is hot"]


def test_the_replacement_is_left_alone_when_nvml_tells_the_same_again(node):
    node.log.new = [XID_48]
    assert node.look()
    node.workers[0] = worker(4, 2)
    node.probe.troubles = [Trouble("0000:3b:00", Fault.DEVICE_POISONED, "double-bit memory error")]
    assert node.look() == []


def test_one_that_has_just_died_is_judged_by_what_the_log_has_by_now(node):
    node.look()
    node.log.new = [XID_48]
    ((doomed, _),) = node.watch.look([node.workers[1]], [node.workers[0]])
    assert doomed is node.workers[0]
    assert node.watch.fault_of("4.1", Fault.EXCEPTION) is Fault.DEVICE_POISONED


def test_one_that_the_driver_does_not_let_go_counts_as_gone_after_a_moment(node):
    node.log.new = [XID_48]
    node.look()
    assert node.watch.stuck() == []
    node.clock.now += 0.5
    (end,) = node.watch.stuck()
    assert end.worker is node.workers[0]
    assert node.watch.fault_of("4.1", Fault.PROCESS_ENDED) is Fault.DEVICE_POISONED
    assert node.watch.stuck() == []


def test_one_whose_end_was_no_loss_is_forgotten(node):
    node.log.new = [XID_48]
    node.look()
    node.watch.forget_all_but({"5.1"})
    node.clock.now += 0.5
    assert node.watch.stuck() == []


def test_who_computes_on_no_device_is_not_ended_for_one(node):
    node.watch.note_device(Rank(4), "")
    node.log.new = [XID_48]
    assert node.look() == []


# --- for the record --------------------------------------------------------------------------------------------------


def notes(node, kind):
    return [note for note in node.control if isinstance(note, kind)]


def test_where_ranks_are_is_told_once_all_have_said_it_and_again_when_it_changes(node):
    node.watch.note_device(Rank(4), "GPU-1")
    node.look()
    assert notes(node, NodePlaced) == []
    node.watch.note_device(Rank(5), "")
    node.look()
    node.look()
    (placed,) = notes(node, NodePlaced)
    assert (placed.node, placed.ranks, placed.machine) == (NODE, (4, 5), platform.node())
    assert (placed.devices, placed.uuids) == ({4: "0000:3b:00"}, {"0000:3b:00": "GPU-1"})
    node.watch.note_device(Rank(5), "0000:5E:00.0")
    node.look()
    assert notes(node, NodePlaced)[1].devices == {4: "0000:3b:00", 5: "0000:5e:00"}


def test_a_node_without_seats_has_no_places_to_tell_until_it_gets_some(node):
    node.watch.ranks = ()
    node.log.new = [XID_48]
    assert node.look() == []
    assert notes(node, NodePlaced) == []
    node.watch.ranks = (Rank(6), Rank(7))
    for rank, device in ((6, "GPU-1"), (7, "GPU-2")):
        node.watch.note_device(Rank(rank), device)
    node.look()
    (placed,) = notes(node, NodePlaced)
    assert placed.devices == {6: "0000:3b:00", 7: "0000:5e:00"}


def test_what_counters_of_devices_have_grown_by_is_told(node):
    node.probe.counters = {"device.0000:3b:00.pcie_replays": 5}
    node.look()
    node.clock.now += EVERY
    node.probe.counters = {"device.0000:3b:00.pcie_replays": 8}
    node.look()
    (measured,) = notes(node, NodeMeasured)
    assert measured.grown["device.0000:3b:00.pcie_replays"] == 3
    assert measured.seconds == pytest.approx(EVERY, abs=0.5)
