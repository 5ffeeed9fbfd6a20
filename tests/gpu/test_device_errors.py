"""Real errors of a real device, with several processes that share it (`make gpu`). The toy computes on the CPU over
gloo; what fails is a small computation beside it, so one device is enough. Never run yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.cuda import place_of
from megatron_flashrecovery.detect.device_probe import DeviceProbe
from megatron_flashrecovery.detect.exceptions import fault_of, leaves_device_unusable
from tests.processes.conftest import Equal
from tests.processes.launcher import Job, run
from tests.processes.test_device_errors import faults

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(
    ("error", "fault"),
    [("illegal access", "device error"), ("assert", "exception"), ("memory", "out of device memory")],
)
def test_a_real_error_of_a_device_is_told_as_such_and_changes_no_bit(
    tmp_path: Path, assert_equal: Equal, error: str, fault: str
) -> None:
    once = ("--once", str(tmp_path / "once"))
    job = Job(arguments=("--raise-at", "5", "--only-rank", "2", "--break-device", error, *once))
    outcome = run(job, tmp_path / "run", timeout=300.0)
    assert_equal(job, outcome, also_lost=(2,))
    assert faults(outcome) == [fault]
    assert outcome.recoveries[0].seconds.detect < 1.0


def test_an_injected_device_error_is_a_real_one(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(injections=("device:rank=1,step=4,at=backward",))
    outcome = run(job, tmp_path / "run", timeout=300.0)
    assert_equal(job, outcome)
    assert faults(outcome) == ["device error"]


def test_memory_that_runs_out_leaves_the_device_usable() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert fault_of(raised.value) is Fault.DEVICE_MEMORY
    assert not leaves_device_unusable(raised.value)
    assert float(torch.ones(1, device="cuda")) == 1.0


def test_nvml_and_torch_name_a_device_alike() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install megatron-flashrecovery[gpu]")
    probe = DeviceProbe()
    try:
        for _ in range(100_000):
            assert [trouble for trouble in probe.look() if trouble.fault is not None] == []
            if probe.devices or probe.why_not:
                break
        assert probe.why_not == ""
        place = place_of(torch.device("cuda", torch.cuda.current_device()))
        assert place in probe.devices.values() or place in probe.devices
    finally:
        probe.close()
