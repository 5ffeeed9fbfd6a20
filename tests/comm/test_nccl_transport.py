"""What the NCCL transport asks of torch, seen on a fake of its backend; the real thing is in tests/gpu."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import GroupIdentity, Severed
from megatron_flashrecovery.comm.nccl_communicator import NcclTransport, contradictions, nccl_environment
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import GroupKey, Rank


class FakeNccl:
    """Takes the place of ``ProcessGroupNCCL``. ``log`` is shared by all, because their order is what matters."""

    log: ClassVar[list[str]] = []
    abort_may_end: ClassVar[threading.Event]

    class Options:
        _timeout: Any = None

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.name = options.group_name

    def _set_sequence_number_for_group(self) -> None:
        pass

    def _group_start(self) -> None:
        self.log.append("start")

    def _group_end(self) -> None:
        self.abort_may_end.wait(10)
        self.log.append("end")

    def abort(self) -> None:
        self.log.append(f"abort {self.name}")

    def shutdown(self) -> None:
        self.log.append(f"shutdown {self.name}")

    def __del__(self) -> None:
        self.log.append(f"free {self.name}")


@pytest.fixture
def make(monkeypatch):
    FakeNccl.log.clear()
    FakeNccl.abort_may_end = threading.Event()
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)

    def transport(name: str) -> NcclTransport:
        identity = GroupIdentity(GroupKey(name), (Rank(0), Rank(1)), 0, (("cuda", "nccl"),), timedelta(seconds=9))
        return NcclTransport(identity, dist.HashStore())

    yield transport
    FakeNccl.abort_may_end.set()


def test_all_abort_in_one_batch_and_before_any_is_freed(make):
    transports = [make("a"), make("b")]
    FakeNccl.abort_may_end.set()
    NcclTransport.sever_batch(transports)
    for transport in transports:
        transport.close(gently=False)
    assert FakeNccl.log == ["start", "abort a", "abort b", "end", "free a", "free b"]


def test_severing_does_not_wait_for_the_abort_but_settling_does(make):
    transport = make("a")
    transport.sever()
    settled = threading.Thread(target=transport.settle)
    settled.start()
    assert settled.is_alive()
    assert "end" not in FakeNccl.log
    FakeNccl.abort_may_end.set()
    settled.join(timeout=10)
    assert not settled.is_alive()


def test_severing_twice_aborts_once(make):
    transport = make("a")
    FakeNccl.abort_may_end.set()
    transport.sever()
    transport.sever()
    transport.settle()
    assert FakeNccl.log.count("abort a") == 1


def test_an_operation_that_ends_after_an_abort_began_is_not_finished(make, monkeypatch):
    class Event:
        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            transport.sever()  # the abort is what lets the device get here

    class Work:
        def wait(self) -> bool:
            return True

    transport = make("a")
    monkeypatch.setattr("torch.cuda.Event", Event)
    with pytest.raises(Severed):
        transport.finish(Work())
    FakeNccl.abort_may_end.set()
    transport.settle()


def test_a_torch_without_nccl_says_so_in_one_line():
    if dist.is_nccl_available():
        pytest.skip("this torch has NCCL")
    identity = GroupIdentity(GroupKey("a"), (Rank(0),), 0, (("cuda", "nccl"),), timedelta(seconds=9))
    with pytest.raises(ConfigError, match="no NCCL"):
        NcclTransport(identity, dist.HashStore())


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        pytest.param({}, [], id="nothing-set"),
        pytest.param(dict(nccl_environment()), [], id="ours"),
        pytest.param({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}, ["TORCH_NCCL_ASYNC_ERROR_HANDLING=3"], id="tear-down"),
        pytest.param({"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "60"}, ["HEARTBEAT_TIMEOUT_SEC=60"], id="heartbeat"),
        pytest.param({"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "7200"}, [], id="longer-heartbeat"),
        pytest.param({"NCCL_BLOCKING_WAIT": "1"}, ["NCCL_BLOCKING_WAIT"], id="old-spelling"),
    ],
)
def test_settings_that_recovery_cannot_live_with_are_named(environ, named):
    found = contradictions(environ)
    assert len(found) == len(named)
    assert all(name in line for name, line in zip(named, found, strict=True))
