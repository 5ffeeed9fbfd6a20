"""What the driver says of devices, and for whom it counts."""

import pytest

from megatron_flashrecovery.core.coordinator import JobConfig
from megatron_flashrecovery.core.devices import XIDS, Incidents, Trouble, device_of, place_on_bus, xid_in
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, WorkerId
from megatron_flashrecovery.core.messages import (
    Fence,
    Loss,
    NodeJoined,
    Park,
    StartWorkers,
    Stop,
    WorkersLost,
)
from megatron_flashrecovery.core.policy import Fault
from tests.core.jobs import A, play, training_job

PLACE = "0000:3b:00"


@pytest.mark.parametrize("text", ["00000000:3B:00.0", "0000:3b:00", "3b:00.0", "0000:3B:00\n"])
def test_one_place_has_one_name(text):
    assert place_on_bus(text) == PLACE


@pytest.mark.parametrize(
    ("line", "fault", "says"),
    [
        pytest.param(
            "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            Fault.DEVICE_LOST,
            "Xid 79 of device 0000:3b:00, the device has fallen off the bus: pid='<unknown>'",
            id="off-the-bus",
        ),
        pytest.param(
            "NVRM: Xid (PCI:0000:3b:00): 48, pid=7, DBE", Fault.DEVICE_POISONED, "double-bit", id="double-bit"
        ),
        pytest.param("NVRM: Xid (0000:3b:00): 74, pid=7", Fault.DEVICE_ERROR, "NVLink", id="nvlink-in-an-old-spelling"),
        pytest.param("NVRM: Xid (PCI:0000:3b:00): 94, Contained", Fault.DEVICE_POISONED, "contained", id="contained"),
        pytest.param("NVRM: Xid (PCI:0000:3b:00): 31, pid=7", None, "the application's", id="of-the-application"),
        pytest.param("NVRM: Xid (PCI:0000:3b:00): 45", None, "after another error", id="follow-up"),
        pytest.param("NVRM: Xid (PCI:0000:3b:00): 999, new", None, "not known here", id="unknown"),
    ],
)
def test_a_line_of_the_kernels_log(line, fault, says):
    trouble = xid_in(f"[ 12.3] {line}")
    assert (trouble.device, trouble.fault) == (PLACE, fault)
    assert says in trouble.evidence


@pytest.mark.parametrize("line", ["", "NVRM: loading NVIDIA UNIX x86_64", "usb 1-1: Xid (PCI:0000:3b:00): 79"])
def test_any_other_line_says_nothing(line):
    assert xid_in(line) is None


def test_what_ends_a_rank_is_said_in_the_words_of_the_policy():
    faults = {fault for fault, _ in XIDS.values()}
    assert faults == {None, Fault.DEVICE_ERROR, Fault.DEVICE_POISONED, Fault.DEVICE_LOST}


@pytest.mark.parametrize(
    ("then", "after", "is_news"),
    [
        pytest.param(Fault.DEVICE_POISONED, 1.0, False, id="the-same-told-in-another-way"),
        pytest.param(Fault.DEVICE_ERROR, 1.0, False, id="what-follows-from-it"),
        pytest.param(Fault.DEVICE_LOST, 1.0, True, id="graver"),
        pytest.param(Fault.DEVICE_POISONED, 11.0, True, id="later-on"),
        pytest.param(None, 1.0, True, id="a-note"),
    ],
)
def test_a_replacement_is_not_ended_for_what_its_predecessor_was_ended_for(then, after, is_news):
    incidents = Incidents()
    assert incidents.is_news(Trouble(PLACE, Fault.DEVICE_POISONED, "Xid 48"), 100.0)
    assert incidents.is_news(Trouble(PLACE, then, "Xid 94"), 100.0 + after) is is_news
    assert incidents.is_news(Trouble("0000:af:00", Fault.DEVICE_ERROR, "Xid 74"), 100.0 + after)


def test_a_note_that_comes_all_the_time_is_told_once():
    incidents = Incidents()
    told = [incidents.is_news(Trouble(PLACE, None, "it is hot"), float(now)) for now in range(30)]
    assert told == [True] + [False] * 29


DEVICES = {"GPU-aa1": "0000:3b:00", "GPU-aa2": "0000:5e:00", "GPU-bb1": "0000:af:00"}


@pytest.mark.parametrize(
    ("local_rank", "visible", "place"),
    [
        pytest.param(1, None, "0000:5e:00", id="all-visible"),
        pytest.param(4, None, "0000:5e:00", id="several-ranks-on-one"),
        pytest.param(0, "2,0", "0000:af:00", id="by-number"),
        pytest.param(1, "GPU-bb1, GPU-aa2", "0000:5e:00", id="by-uuid"),
        pytest.param(0, "GPU-bb", "0000:af:00", id="by-the-beginning-of-a-uuid"),
        pytest.param(1, "1,7,0", "0000:5e:00", id="what-follows-an-unknown-name-does-not-count"),
        pytest.param(0, "GPU-aa", None, id="of-two"),
        pytest.param(0, "", None, id="none"),
    ],
)
def test_the_device_of_a_rank(local_rank, visible, place):
    assert device_of(local_rank, visible, DEVICES) == place


# --- what follows for the job -----------------------------------------------------------------------------------------

NO_OTHER_NODE = JobConfig(drain_timeout=10.0, drain_grace=2.0, spare_nodes=0)


def lost_to(fault, life=1, rank=0, raised=None):
    loss = Loss(
        Rank(rank), WorkerId(f"{rank}.{life}"), "Xid 48 of device 0000:3b:00", Epoch(life - 1), None, raised, fault
    )
    return WorkersLost(A, (loss,))


def test_a_device_that_fails_for_the_first_time_costs_its_process():
    job = training_job(config=NO_OTHER_NODE)
    assert isinstance(play(job, lost_to(Fault.DEVICE_POISONED))[0], Park)


@pytest.mark.parametrize("fault", [Fault.DEVICE_POISONED, Fault.DEVICE_ERROR])
def test_one_that_fails_again_is_not_used_any_more(fault):
    job = training_job(config=NO_OTHER_NODE)
    play(job, lost_to(Fault.DEVICE_POISONED))
    (stop,) = play(job, lost_to(fault, life=2))
    assert isinstance(stop, Stop)
    assert f"the device of rank 0 on {A} was suspected 2 times, and no other node has room" in stop.reason
    assert f"start the job again without {A}" in stop.reason


def test_one_that_is_gone_is_not_tried_again():
    job = training_job(config=NO_OTHER_NODE)
    *_, stop = play(job, lost_to(Fault.DEVICE_LOST))
    assert isinstance(stop, Stop)


def test_an_illegal_access_is_not_held_against_the_device():
    job = training_job(config=NO_OTHER_NODE)
    for life in (1, 2):
        raised = f"AcceleratorError at train.py:{life} in step"
        assert isinstance(play(job, lost_to(Fault.DEVICE_ERROR, life, raised=raised))[0], Park)


def test_with_room_on_another_node_all_ranks_of_this_one_move():
    job = training_job()
    spare = NodeId("spare")
    play(job, NodeJoined(spare, 2))
    fence, park, start = play(job, lost_to(Fault.DEVICE_LOST))
    assert fence == Fence(A, (0, 1), fence.reason, 1, Fault.NODE_LOST)
    assert park == Park(1, 1, (0, 1))
    assert start == StartWorkers(spare, 1, (0, 1))
