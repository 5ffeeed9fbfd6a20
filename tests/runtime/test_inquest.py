"""Of what a worker has died, in the words of the policy."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flashrecovery.core.ids import Epoch, Rank, WorkerId
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.runtime.inquest import Inquest
from megatron_flashrecovery.runtime.node_messages import LastWords
from megatron_flashrecovery.runtime.workers import WorkerEnded

ID = WorkerId("rank2.1")
EXIT = 1 << 8


def end_of(directory: Path, status: int, server_ended: str = "") -> WorkerEnded:
    log = directory / "rank2.log"
    log.write_text("torch.AcceleratorError\n")
    seat = SimpleNamespace(rank=Rank(2), epoch=Epoch(0))
    worker: Any = SimpleNamespace(id=ID, seat=seat, pid=17, log=log, log_begins=0)
    return WorkerEnded(worker, status, server_ended)


def inquest(fault: Fault, oom: bool = False, of_device: Fault | None = None) -> Inquest:
    watch: Any = SimpleNamespace(last_words=lambda rank, worker: LastWords(rank, worker, fault=fault))
    devices: Any = SimpleNamespace(fault_of=lambda _worker, fault: of_device or fault)
    out_of_memory: Any = SimpleNamespace(has_struck=lambda: oom)
    return Inquest(watch, out_of_memory, devices)


@pytest.mark.parametrize(
    ("fault", "of_device", "word"),
    [
        pytest.param(Fault.DEVICE_ERROR, None, "device error: ", id="told-by-the-worker"),
        pytest.param(Fault.DEVICE_MEMORY, None, "out of device memory: ", id="device-memory"),
        pytest.param(Fault.PROCESS_ENDED, Fault.DEVICE_LOST, "device lost: ", id="told-by-the-driver"),
        pytest.param(Fault.EXCEPTION, None, "", id="exception"),
        pytest.param(Fault.PROCESS_ENDED, None, "", id="process-ended"),
    ],
)
def test_what_an_exit_code_does_not_tell_is_named(
    tmp_path: Path, fault: Fault, of_device: Fault | None, word: str
) -> None:
    loss = inquest(fault, of_device=of_device).hold(end_of(tmp_path, EXIT)).loss
    assert loss.cause == f"{word}exit code 1, its last words: torch.AcceleratorError"
    assert loss.fault is (of_device or fault)


def test_what_it_was_ended_for_by_order_is_told_as_it_was_ordered(tmp_path: Path) -> None:
    found = inquest(Fault.DEVICE_ERROR)
    end = end_of(tmp_path, signal.SIGKILL)
    found.note_fenced([end.worker], "Xid 79 of device 0", Fault.DEVICE_ERROR)
    assert found.hold(end).loss.cause == "Xid 79 of device 0"


@pytest.mark.parametrize(
    ("server_ended", "cause"),
    [
        ("", "killed by the out-of-memory killer"),
        (
            "killed by SIGKILL",
            "ended together with the fork server of its node (killed by SIGKILL), for want of memory",
        ),
    ],
)
def test_the_out_of_memory_killer_is_named(tmp_path: Path, server_ended: str, cause: str) -> None:
    end = end_of(tmp_path, signal.SIGKILL, server_ended)
    loss = inquest(Fault.PROCESS_ENDED, oom=True).hold(end).loss
    assert (loss.cause, loss.fault) == (cause, Fault.OUT_OF_MEMORY)
