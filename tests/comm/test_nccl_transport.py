"""What the NCCL transport asks of torch, seen on a fake of its backend; the real thing is in tests/gpu."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType

from megatron_flashrecovery.comm.communicator import GroupIdentity, Progress, Severed
from megatron_flashrecovery.comm.nccl_communicator import NcclTransport, contradictions, nccl_environment
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import GroupKey, Rank


class FakeNccl:
    """Takes the place of ``ProcessGroupNCCL``. ``log`` is shared by all, because their order is what matters."""

    log: ClassVar[list[str]] = []
    abort_may_end: ClassVar[threading.Event]
    aborts_meet: ClassVar[threading.Barrier]

    class Options:
        _timeout: Any = None

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.name = options.group_name

    def _set_sequence_number_for_group(self) -> None:
        self.found = ErrorType.SUCCESS

    def get_error(self) -> ErrorType:
        return self.found

    def abort(self) -> None:
        self.log.append(f"abort {self.name}")
        self.aborts_meet.wait(10)
        self.abort_may_end.wait(10)
        self.log.append("end")

    def shutdown(self) -> None:
        self.log.append(f"shutdown {self.name}")

    def __del__(self) -> None:
        self.log.append(f"free {self.name}")


@pytest.fixture
def make(monkeypatch):
    FakeNccl.log.clear()
    FakeNccl.abort_may_end = threading.Event()
    FakeNccl.aborts_meet = threading.Barrier(1)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)

    def transport(name: str) -> NcclTransport:
        identity = GroupIdentity(GroupKey(name), (Rank(0), Rank(1)), 0, (("cuda", "nccl"),), timedelta(seconds=9))
        return NcclTransport(identity, dist.HashStore())

    yield transport
    FakeNccl.abort_may_end.set()


def test_all_abort_at_once_and_before_any_is_freed(make):
    """Each waits for the other here, as an abort does for kernels that wait for those of another communicator."""
    transports = [make("a"), make("b")]
    FakeNccl.aborts_meet = threading.Barrier(2)
    FakeNccl.abort_may_end.set()
    NcclTransport.sever_batch(transports)
    for transport in transports:
        transport.close(gently=False)
    assert sorted(FakeNccl.log[:2]) == ["abort a", "abort b"]
    assert FakeNccl.log[2:] == ["end", "end", "free a", "free b"]


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


class Work:
    """Over. Like WorkNCCL it does not say whether it succeeded."""

    def __init__(self, error: str = "") -> None:
        self._error = error

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self) -> bool:
        if self._error:
            raise RuntimeError(self._error)
        return True


def test_what_is_over_has_succeeded_unless_nccl_reports_an_error_or_an_abort_has_begun(make):
    transport = make("a")
    assert transport.succeeded(Work())
    assert not transport.succeeded(Work("ncclRemoteError"))
    FakeNccl.abort_may_end.set()
    transport.sever()
    transport.settle()
    assert not transport.succeeded(Work())


class UnderWay(Work):
    def __init__(self, is_over: bool, error: str = "") -> None:
        super().__init__(error)
        self._is_over = is_over

    def is_completed(self) -> bool:
        if self._error:
            raise RuntimeError(self._error)
        return self._is_over


@pytest.mark.parametrize(
    ("event", "work", "found"),
    [
        pytest.param(False, UnderWay(False), Progress.BEFORE, id="at-something-earlier"),
        pytest.param(True, UnderWay(False), Progress.INSIDE, id="waiting-for-others"),
        pytest.param(True, UnderWay(True), Progress.OVER, id="over"),
        pytest.param(False, UnderWay(False, "CUDA error"), Progress.OVER, id="nothing-is-said-of-a-broken-device"),
    ],
)
def test_where_a_device_is_by_the_event_before_an_operation_and_its_work(make, monkeypatch, event, work, found):
    log = []

    class Event:
        def record(self) -> None:
            log.append("recorded")

        def query(self) -> bool:
            assert log[-1] == "device 2", "the session's thread has to name the device"
            return event

    def device(index: int) -> contextlib.AbstractContextManager[None]:
        log.append(f"device {index}")
        return contextlib.nullcontext()

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    mark = make("a").mark()
    assert log == ["recorded"]
    assert mark.look([work]) is found


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
        pytest.param({"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}, ["TORCH_NCCL_DUMP_ON_TIMEOUT=1"], id="reports"),
        pytest.param({"TORCH_NCCL_DESYNC_DEBUG": "1"}, ["TORCH_NCCL_DESYNC_DEBUG"], id="desync"),
        pytest.param({"TORCH_DISTRIBUTED_DEBUG": "detail"}, ["TORCH_DISTRIBUTED_DEBUG"], id="detail"),
        pytest.param({"TORCH_DISTRIBUTED_DEBUG": "INFO"}, [], id="info"),
    ],
)
def test_settings_that_recovery_cannot_live_with_are_named(environ, named):
    found = contradictions(environ)
    assert len(found) == len(named)
    assert all(name in line for name, line in zip(named, found, strict=True))


def test_what_the_watchdog_has_seen_is_told_until_the_abort(make):
    transport = make("tp")
    assert transport.error() is None
    transport.backend.found = ErrorType.REMOTE_ERROR
    assert transport.error() == "NCCL reports REMOTE_ERROR"
    FakeNccl.abort_may_end.set()
    transport.sever()
    assert transport.error() is None
    transport.settle()
