"""The NCCL transport on real devices: abort, rebuild, and an aborted operation that nobody believes (`make gpu`)."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Severed
from megatron_flashrecovery.comm.nccl_communicator import nccl_environment
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.testing.parking import FakeParking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dist.is_nccl_available() or not torch.cuda.is_available(), reason="needs a GPU with NCCL"),
]
DEVICES = torch.cuda.device_count()
TIMEOUT = timedelta(seconds=60)


def worker(function: Callable[..., Any], rank: int, size: int, port: int, results: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    parking = FakeParking()
    registry = GroupRegistry(
        rank=Rank(rank), world_size=size, store=store, parking=parking, epoch=Epoch(0), timeout=TIMEOUT
    )
    registry.install()
    dist.init_process_group("nccl")
    results.send(function(rank, registry, parking, store))


def run(size: int, function: Callable[..., Any]) -> list[Any]:
    if size > DEVICES:
        pytest.skip(f"needs {size} devices: NCCL puts no two ranks on one")
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in nccl_environment().items():
            environment.setenv(name, value)
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=worker, args=(function, rank, size, store.port, pipes[rank][1]))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
    try:
        for ours, _ in pipes:
            assert ours.poll(TIMEOUT.total_seconds()), "no result in time"
        return [ours.recv() for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def summed(size: int) -> bool:
    tensor = torch.ones(1000, device="cuda")
    dist.all_reduce(tensor)
    return bool(tensor.sum().item() == 1000 * size)


def rebuilt(rank: int, registry: GroupRegistry, parking: FakeParking, store: Any) -> list[bool]:
    found = [summed(registry.world_size)]
    for epoch in (1, 2, 3):
        registry.sever(registry.groups, "a test")
        registry.settle()
        registry.rebuild(registry.groups, Epoch(epoch))
        found.append(summed(registry.world_size))
    return found


@pytest.mark.parametrize("size", [1, 2, 8])
def test_groups_work_again_after_abort_and_rebuild(size):
    assert all(all(found) for found in run(size, rebuilt))


def stuck(rank: int, registry: GroupRegistry, parking: FakeParking, store: Any) -> Any:
    """Rank 0 never comes. The others are inside a small reduction, whose kernel spins until the abort ends it."""
    summed(registry.world_size)
    if rank == 0:
        store.wait(["freed"], TIMEOUT)
    else:

        def watch() -> None:
            while registry.standing() is None:
                threading.Event().wait(0.005)
            registry.sever(registry.groups, "rank 0 is lost")

        thread = threading.Thread(target=watch)
        thread.start()
        begun = time.monotonic()
        with pytest.raises(Severed):
            dist.all_reduce(torch.ones(1, device="cuda"))
        thread.join()
        assert time.monotonic() - begun < 20
        assert not [results for _, results in parking.results if results is not None], "garbage was told as a result"
        store.set("freed", "")
    registry.sever(registry.groups, "rank 0 is lost")
    registry.settle()
    registry.rebuild(registry.groups, Epoch(1))
    return summed(registry.world_size)


def test_an_aborted_reduction_raises_though_nccl_returns():
    assert run(2, stuck) == [True, True]


def pipelined(rank: int, registry: GroupRegistry, parking: FakeParking, store: Any) -> float:
    received = torch.zeros(1 << 20, device="cuda")
    peer = 1 - rank
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, torch.full_like(received, float(rank + 1)), peer),
            dist.P2POp(dist.irecv, received, peer),
        ]
    )
    for work in works:
        work.wait()
    return received.mean().item()


def test_a_batch_of_large_sends_and_receives_does_not_deadlock():
    assert run(2, pipelined) == [2.0, 1.0]
