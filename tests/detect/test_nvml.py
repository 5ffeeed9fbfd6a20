"""What is made of NVML, on a library of the same functions; and that they are the same."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from collections.abc import Callable

import pytest

from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.counters import PortCounters
from megatron_flashrecovery.detect.device_probe import DeviceProbe
from megatron_flashrecovery.detect.nvml import Library, Nvml, watch
from tests.detect import fake_nvml
from tests.detect.fake_nvml import FakeDevice, FakeEvent, FakeNvml

PLACE = "0000:3b:00"
COUNTERS = ("ecc_corrected", "ecc_uncorrected", "pcie_replays")


@pytest.fixture
def device():
    return FakeDevice(b"00000000:3B:00.0", "GPU-1")


@pytest.fixture
def library(device):
    return FakeNvml([device])


@pytest.fixture
def nvml(library):
    nvml = Nvml(library)
    assert nvml.look(lambda device: None) == []
    return nvml


@pytest.mark.parametrize(
    ("change", "fault", "says"),
    [
        pytest.param({"uncorrectable": 2}, Fault.DEVICE_POISONED, "2 uncorrectable memory errors more", id="ecc"),
        pytest.param({"rows": (0, 1, 1, 0)}, None, "remapped at the next reset", id="remap-pending"),
        pytest.param({"rows": (0, 1, 0, 1)}, Fault.DEVICE_ERROR, "could not be remapped", id="remap-failed"),
        pytest.param({"links": [1, 0, 0]}, Fault.DEVICE_ERROR, "NVLink 1 went down", id="nvlink"),
        pytest.param({"reasons": 64}, None, "too hot", id="thermal"),
        pytest.param({"is_lost": True}, Fault.DEVICE_LOST, "NVML has lost the device", id="lost"),
    ],
)
def test_what_changes_is_told_once(nvml, device, change, fault, says):
    for name, value in change.items():
        setattr(device, name, value)
    (trouble,) = nvml.look(lambda device: None)
    assert (trouble.device, trouble.fault) == (PLACE, fault)
    assert says in trouble.evidence
    assert nvml.look(lambda device: None) == []


@pytest.mark.parametrize(
    ("kind", "data", "fault"),
    [
        pytest.param(8, 79, Fault.DEVICE_LOST, id="off-the-bus"),
        pytest.param(8, 31, None, id="of-the-application"),
        pytest.param(2, 0, Fault.DEVICE_POISONED, id="double-bit"),
    ],
)
def test_events_are_told_as_they_come(nvml, library, device, kind, data, fault):
    assert nvml.wait_for_events(1) == []
    library.events.append(FakeEvent(device, kind, data))
    (trouble,) = nvml.wait_for_events(1)
    assert (trouble.device, trouble.fault) == (PLACE, fault)


def test_a_device_that_supports_little_is_no_trouble(library, device):
    device.supports_events = False
    nvml = Nvml(library)
    assert nvml.wait_for_events(1) == []
    assert nvml.look(lambda device: None) == []


def test_who_is_asked_is_said_before_and_that_nobody_is_asked_after(nvml, tmp_path):
    said: list[dict[str, object]] = []
    next(watch(nvml, PortCounters(tmp_path), said.append, itertools.count().__next__))
    counters = dict.fromkeys((f"device.{PLACE}.{name}" for name in COUNTERS), 0)
    assert said == [
        {"devices": {"GPU-1": PLACE}},
        {"asking": PLACE},
        {"asking": "any"},
        {"counters": counters},
        {"asking": ""},
    ]


def test_counters_that_a_device_does_not_have_are_left_out_and_so_is_a_device_that_is_lost(nvml, device):
    device.corrected, device.replays = 7, None
    assert nvml.counters() == {f"device.{PLACE}.ecc_corrected": 7, f"device.{PLACE}.ecc_uncorrected": 0}
    device.is_lost = True
    assert nvml.counters() == {}


def functions_of(library: object) -> dict[str, list[str]]:
    names = [name for name in vars(Library) if name.startswith("nvml") and callable(getattr(library, name))]
    drop = ("self",)
    return {
        name: [each for each in inspect.signature(getattr(library, name)).parameters if each not in drop]
        for name in names
    }


def test_the_fake_has_the_functions_constants_and_errors_of_the_installed_package():
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    assert len(functions_of(FakeNvml)) == 14
    assert functions_of(real) == functions_of(FakeNvml) == functions_of(Library)
    constants = [name for name in Library.__annotations__ if not name.startswith("NVMLError")]
    assert {name: getattr(real, name) for name in constants} == {name: getattr(FakeNvml, name) for name in constants}
    for name in ("NVMLError_Timeout", "NVMLError_GpuIsLost", "NVMLError_NotSupported", "NVMLError_InvalidArgument"):
        error = getattr(real, name)()
        assert isinstance(error, real.NVMLError)
        assert error.value == getattr(fake_nvml, name).value
    assert {"device", "eventType", "eventData"} <= {name for name, _ in real.c_nvmlEventData_t._fields_}
    assert "busId" in {name for name, _ in real.nvmlPciInfo_t._fields_}


# --- the process that asks, seen from outside -------------------------------------------------------------------------


def probe_that_says(*messages: dict[str, object], clock: Callable[[], float], then: str = "") -> DeviceProbe:
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    script = f"import os, sys, time; os.write(int(sys.argv[1]), {lines.encode()!r}); {then or 'time.sleep(60)'}"
    return DeviceProbe((sys.executable, "-c", script), clock)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_for(probe: DeviceProbe, claim: Callable[[], bool]) -> list[object]:
    found: list[object] = []
    for _ in range(1_000_000):
        found += probe.look()
        if claim():
            return found
    raise AssertionError("it never said so")


def test_what_the_process_says_is_heard_and_that_it_hangs_is_a_note_told_once():
    clock = Clock()
    trouble = {"trouble": [PLACE, "DEVICE_POISONED", "bad memory"]}
    counted = {"counters": {"ib.mlx5_0/1.symbol_error": 3}}
    probe = probe_that_says({"devices": {"GPU-1": PLACE}}, trouble, counted, {"asking": PLACE}, clock=clock)
    try:
        found = wait_for(probe, lambda: probe._asking == PLACE)
        assert probe.devices == {"GPU-1": PLACE}
        assert probe.counters == {"ib.mlx5_0/1.symbol_error": 3}
        assert [(each.fault, each.evidence) for each in found] == [(Fault.DEVICE_POISONED, "bad memory")]
        clock.now = 4.0
        assert probe.look() == []
        clock.now = 6.0
        (note,) = probe.look()
        assert (note.device, note.fault) == (PLACE, None)
        assert "NVML has not answered for 6 s" in note.evidence
        assert probe.look() == []
    finally:
        probe.close()


def test_a_process_that_ends_says_why_and_is_no_trouble():
    probe = probe_that_says({"missing": "ModuleNotFoundError: pynvml"}, clock=Clock(), then="sys.exit()")
    try:
        assert wait_for(probe, lambda: bool(probe.why_not)) == []
        assert probe.why_not == "ModuleNotFoundError: pynvml"
    finally:
        probe.close()


def test_where_there_is_no_library_the_real_process_says_so():
    probe = DeviceProbe((sys.executable, "-m", "megatron_flashrecovery.detect.nvml"), Clock())
    try:
        assert wait_for(probe, lambda: bool(probe.why_not or probe.devices)) == []
    finally:
        probe.close()
