"""What is said of a device that is behind its host, on a real one (`make gpu`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Progress
from megatron_flashrecovery.comm.nccl_communicator import NcclMark
from megatron_flashrecovery.comm.registry import GroupRegistry
from tests.gpu.test_nccl_groups import run, summed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dist.is_nccl_available() or not torch.cuda.is_available(), reason="needs a GPU with NCCL"),
]
A_SECOND = 2_000_000_000
"""Cycles of a kernel that does nothing; devices run at one to two GHz."""
PATIENCE = 60.0


class Work:
    """Of an operation that is under way until it is told to be over."""

    is_over = False

    def is_completed(self) -> bool:
        return self.is_over


def until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not claim():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def in_another_thread(call: Callable[[], Any]) -> Any:
    """As the session's does, which has named no device."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_a_device_that_is_at_something_earlier_has_not_come_to_an_operation():
    work: Any = Work()
    torch.cuda._sleep(3 * A_SECOND)
    mark = NcclMark()
    begun = time.monotonic()
    assert in_another_thread(lambda: mark.look([work])) is Progress.BEFORE
    assert time.monotonic() - begun < 0.5, "looking waits for nothing"
    torch.cuda.synchronize()
    assert in_another_thread(lambda: mark.look([work])) is Progress.INSIDE
    work.is_over = True
    assert in_another_thread(lambda: mark.look([work])) is Progress.OVER


def test_looking_makes_no_context_on_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 devices")
    before = torch.cuda.device_memory_used(0)
    with torch.cuda.device(1):
        torch.zeros(1, device="cuda")
        mark = NcclMark()
    in_another_thread(lambda: mark.look([Work()]))  # type: ignore[list-item]
    assert torch.cuda.device_memory_used(0) - before < 100 << 20


def behind(rank: int, registry: GroupRegistry, parking: Any, store: Any) -> Any:
    """Rank 0 has a long kernel before the reduction that both issue. What each says of its own device meanwhile."""
    summed(registry.world_size)
    if rank == 0:
        torch.cuda._sleep(10 * A_SECOND)
    tensor = torch.ones(1000, device="cuda")
    work = dist.all_reduce(tensor, async_op=True)
    store.set(f"issued{rank}", "")
    store.wait(["issued0", "issued1"])
    if rank == 1:
        until(lambda: (found := registry.backlog()) is not None and found.is_reached, "never inside")
    found = in_another_thread(registry.backlog)
    work.wait()
    torch.cuda.synchronize()
    return found.operation, found.is_reached, registry.backlog() is None


def test_the_device_that_is_late_is_told_from_the_one_that_waits_for_it():
    (late, is_there, _), (waiting, is_inside, is_done) = run(2, behind)
    assert late == waiting
    assert "allreduce of " in waiting
    assert (is_there, is_inside, is_done) == (False, True, True)
