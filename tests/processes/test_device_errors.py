"""What torch raises when a device fails, on the CPU stand-in: the class is told, the worker leaves at once, and what
comes again is judged by its class. ``tests/gpu/test_device_errors.py`` has the real errors."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_flashrecovery.detect.device_probe import DRIVER
from megatron_flashrecovery.detect.kernel_log import KMSG
from tests.processes.conftest import Equal
from tests.processes.launcher import Job, Outcome, run, started

AT_RANK_2 = ("--raise-at", "5", "--only-rank", "2")


def faults(outcome: Outcome) -> list[str]:
    return [loss["fault"] for line in outcome.journal("WorkersLost") for loss in line.body["losses"]]


def test_a_device_error_is_told_as_such_and_changes_no_bit(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(arguments=(*AT_RANK_2, "--raise-code", "700", "--once", str(tmp_path / "once")))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome, also_lost=(2,))
    assert faults(outcome) == ["device error"]
    (words,) = outcome.journal("LastWords")
    assert (words.body["fault"], words.body["step"]) == ("device error", 6)
    assert "an illegal memory access was encountered" in words.body["traceback"]
    assert "rank 2: device error: exit code 1, its last words: torch.AcceleratorError" in outcome.said


@pytest.mark.parametrize("code", ["2", "710"])
def test_too_little_memory_or_an_assertion_again_stops_the_job(tmp_path: Path, code: str) -> None:
    outcome = run(Job(arguments=(*AT_RANK_2, "--raise-code", code)), tmp_path / "run")
    assert outcome.exit_code == 1
    assert len(outcome.recoveries) == 1
    assert "rank 2 raised the same exception in step 6 again after a retry" in outcome.said
    assert "the device has not enough memory" in outcome.said if code == "2" else "the script's" in outcome.said


@pytest.mark.parametrize("source", ["live", "own"])
def test_a_survivor_whose_device_fails_while_it_carries_out_a_plan_is_refilled(
    tmp_path: Path, assert_equal: Equal, source: str
) -> None:
    job = Job(
        arguments=("--raise-in-plan", "3", "--raise-code", "700", "--once", str(tmp_path / "once")),
        injections=("kill:rank=1,step=5,at=" + {"live": "backward", "own": "optimizer"}[source],),
    )
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome, also_lost=(3,))
    assert faults(outcome) == ["process ended", "device error"]


def test_what_the_kernel_says_of_a_device_ends_who_computes_on_it(tmp_path: Path, assert_equal: Equal) -> None:
    job = Job(arguments=("--steps", "600", "--pretend-devices"))
    with started(job, tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 5, "some steps")
        said = say_in_kernel_log("NVRM: Xid (PCI:0000:f0:02): 74, pid=1, NVLink: fatal error detected on link 3")
        say_in_kernel_log("NVRM: Xid (PCI:0000:f0:03): 31, pid=1, MMU Fault")
        said_by_job, _ = running.process.communicate(timeout=90)
    outcome = Outcome(tmp_path / "run", running.process.returncode, said_by_job)
    assert_equal(job, outcome, also_lost=(2,))
    assert faults(outcome) == ["device error"]
    (lost,) = outcome.journal("WorkersLost")
    assert lost.time - said < 1.0
    assert "rank 2: Xid 74 of device 0000:f0:02, error of an NVLink" in outcome.recoveries[0].cause
    assert [line.body["ranks"] for line in outcome.journal("DeviceNoted")] == [[2], [3]]


def test_a_device_that_is_off_the_bus_is_not_tried_again(tmp_path: Path) -> None:
    with started(Job(arguments=("--steps", "100000", "--pretend-devices")), tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 5, "some steps")
        say_in_kernel_log("NVRM: Xid (PCI:0000:f0:01): 79, pid=1, GPU has fallen off the bus.")
        said, _ = running.process.communicate(timeout=60)
    assert running.process.returncode == 1
    assert "Xid 79 of device 0000:f0:01" in said
    assert "the device of rank 1 on node0 is of no more use, and no other node has room: start the job again" in said


def say_in_kernel_log(line: str) -> float:
    """When it was said. Never where there is a driver: others may watch its words, too."""
    if DRIVER.exists():
        pytest.skip("there is a real driver here")
    try:
        log = os.open(KMSG, os.O_WRONLY)
    except OSError as error:
        pytest.skip(f"{KMSG} cannot be written: {error.strerror}")
    os.write(log, line.encode() + b"\n")
    os.close(log)
    return time.time()
