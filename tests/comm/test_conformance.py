"""Every operation of the installed torch gives with the handle what it gives with plain gloo, also after a rebuild."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.distributed_c10d as c10d

from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.operation import COLLECTIVES, POINT_TO_POINT, unclassified
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.testing.parking import FakeParking

Case = Callable[[int, int, Any], Any]
SIZE = 4
NOT_IN_GLOO = {"allgather_coalesced"}
"""Names that gloo refuses in this torch or that ``dist`` reaches by other names; they are compared as refusals."""


def mine(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    value = torch.randn(*(shape or (5,)), generator=generator)
    return value.to(dtype) if dtype.is_floating_point else (value * 100).to(dtype)


def reductions() -> dict[str, Case]:
    def reduce_with(op: Any, dtype: torch.dtype, n: int, asynchronous: bool) -> Case:
        def case(rank: int, size: int, group: Any) -> Any:
            tensor = mine(rank, n, dtype=dtype)
            work = dist.all_reduce(tensor, op=op, group=group, async_op=asynchronous)
            if work is not None:
                work.wait()
            return tensor

        return case

    operations = dist.ReduceOp
    cases = {
        f"all_reduce {name} {dtype} {n} {asynchronous}": reduce_with(op, dtype, n, asynchronous)
        for name, op in (("sum", operations.SUM), ("max", operations.MAX), ("prod", operations.PRODUCT))
        for dtype in (torch.float32, torch.bfloat16, torch.int64)
        for n, asynchronous in ((3, False), (3, True), (500, False), (500, True))
    }
    cases["all_reduce avg"] = reduce_with(operations.AVG, torch.float32, 3, False)
    cases["all_reduce band"] = reduce_with(operations.BAND, torch.int32, 3, False)
    return cases


def all_reduce_coalesced(rank: int, size: int, group: Any) -> Any:
    tensors = [mine(rank, 3), mine(rank, 4)]
    dist.all_reduce_coalesced(tensors, group=group)
    return tensors


def all_reduce_coalesced_async(rank: int, size: int, group: Any) -> Any:
    tensors = [mine(rank, 300), mine(rank, 4)]
    dist.all_reduce_coalesced(tensors, group=group, async_op=True).wait()
    return tensors


def complex_all_reduce(rank: int, size: int, group: Any) -> Any:
    tensor = torch.complex(mine(rank, 3), mine(rank + 7, 3))
    dist.all_reduce(tensor, group=group)
    return tensor


def coalescing_manager(kind: str, asynchronous: bool, device: bool) -> Case:
    def case(rank: int, size: int, group: Any) -> Any:
        outputs = [torch.zeros(6), torch.zeros(3)]
        target = torch.device("cpu") if device else None
        with c10d._coalescing_manager(group, device=target, async_ops=asynchronous) as manager:
            for i, output in enumerate(outputs):
                if kind == "all_reduce":
                    output.copy_(mine(rank + i, output.numel()))
                    dist.all_reduce(output, group=group)
                elif kind == "all_gather":
                    outputs[i] = torch.zeros(output.numel() * size)
                    dist.all_gather_single(outputs[i], mine(rank + i, output.numel()), group=group)
                else:
                    dist.reduce_scatter_single(output, mine(rank + i, output.numel() * size), group=group)
        if asynchronous:
            manager.wait()
        return outputs

    return case


def broadcast(rank: int, size: int, group: Any) -> Any:
    tensors = [mine(rank), mine(rank, 2, 2)]
    dist.broadcast(tensors[0], 1, group=group)
    dist.broadcast(tensors[1], 2, group=group, async_op=True).wait()
    return tensors


def reduce(rank: int, size: int, group: Any) -> Any:
    tensors = [mine(rank), mine(rank, 300)]
    for tensor in tensors:
        dist.reduce(tensor, 2, group=group)
    return tensors if rank == 2 else None


def all_gather(rank: int, size: int, group: Any) -> Any:
    outputs = [torch.zeros(5) for _ in range(size)]
    dist.all_gather(outputs, mine(rank), group=group)
    other = [torch.zeros(500) for _ in range(size)]
    dist.all_gather(other, mine(rank, 500), group=group, async_op=True).wait()
    return outputs, other


def all_gather_single(rank: int, size: int, group: Any) -> Any:
    outputs = [torch.zeros(5 * size) for _ in range(3)]
    dist.all_gather_single(outputs[0], mine(rank), group=group)
    dist.all_gather_into_tensor(outputs[1], mine(rank), group=group, async_op=True).wait()
    dist._all_gather_base(outputs[2], mine(rank), group=group)
    return outputs


def gather(rank: int, size: int, group: Any) -> Any:
    outputs = [torch.zeros(5) for _ in range(size)] if rank == 3 else None
    dist.gather(mine(rank), outputs, dst=3, group=group)
    return outputs


def scatter(rank: int, size: int, group: Any) -> Any:
    output = torch.zeros(5)
    dist.scatter(output, [mine(i) for i in range(size)] if rank == 1 else None, src=1, group=group)
    return output


def reduce_scatter(rank: int, size: int, group: Any) -> Any:
    outputs = [torch.zeros(5) for _ in range(4)]
    dist.reduce_scatter(outputs[0], [mine(rank + i) for i in range(size)], group=group)
    dist.reduce_scatter_single(outputs[1], mine(rank, 5 * size), group=group)
    dist.reduce_scatter_tensor(outputs[2], mine(rank, 5 * size), group=group, async_op=True).wait()
    dist._reduce_scatter_base(outputs[3], mine(rank, 5 * size), group=group)
    return outputs


def all_to_all(rank: int, size: int, group: Any) -> Any:
    outputs = [torch.zeros(2) for _ in range(size)]
    dist.all_to_all(outputs, [mine(rank + i, 2) for i in range(size)], group=group)
    return outputs


def all_to_all_single(rank: int, size: int, group: Any) -> Any:
    even, uneven = torch.zeros(2 * size), torch.zeros((rank + 1) * size)
    dist.all_to_all_single(even, mine(rank, 2 * size), group=group)
    dist.all_to_all_single(
        uneven,
        mine(rank, sum(range(1, size + 1))),
        output_split_sizes=[rank + 1] * size,
        input_split_sizes=list(range(1, size + 1)),
        group=group,
    )
    return even, uneven


def send_and_receive(rank: int, size: int, group: Any) -> Any:
    tensor = torch.zeros(5)
    if rank % 2 == 0:
        dist.send(mine(rank), rank + 1, group=group)
        dist.irecv(tensor, rank + 1, group=group, tag=3).wait()
    else:
        dist.recv(tensor, rank - 1, group=group)
        dist.isend(mine(rank), rank - 1, group=group, tag=3).wait()
    return tensor


def receive_from_anybody(rank: int, size: int, group: Any) -> Any:
    if rank:
        dist.send(mine(rank), 0, group=group, tag=9)  # or rank 0 takes what a later case sends
        return None
    received = {}
    for _ in range(size - 1):
        tensor = torch.zeros(5)
        received[dist.recv(tensor, group=group, tag=9)] = tensor
    return [received[source] for source in sorted(received)]


def batched(rank: int, size: int, group: Any) -> Any:
    left, right = torch.zeros(5), torch.zeros(900)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine(rank), (rank + 1) % size, group),
            dist.P2POp(dist.irecv, left, (rank - 1) % size, group),
            dist.P2POp(dist.isend, mine(rank, 900), (rank - 1) % size, group),
            dist.P2POp(dist.irecv, right, (rank + 1) % size, group),
        ]
    )
    for work in works:
        work.wait()
    return left, right


def objects(rank: int, size: int, group: Any) -> Any:
    everything: list[Any] = [None] * size
    dist.all_gather_object(everything, {"rank": rank, "text": "x" * rank}, group=group)
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object((rank, 1.5), gathered, dst=0, group=group)
    told = [{"from": rank}, rank]
    dist.broadcast_object_list(told, src=2, group=group)
    scattered: list[Any] = [None]
    dist.scatter_object_list(scattered, [f"for {i}" for i in range(size)] if rank == 1 else None, src=1, group=group)
    sent = [rank, "hello"]
    if rank == 0:
        dist.send_object_list(sent, 1, group=group)
    elif rank == 1:
        dist.recv_object_list(sent, 0, group=group)
    return everything, gathered, told, scattered, sent


def barriers(rank: int, size: int, group: Any) -> Any:
    dist.barrier(group=group)
    dist.barrier(group=group, async_op=True).wait()
    dist.monitored_barrier(group=group, timeout=timedelta(seconds=20))


def functional_collectives(rank: int, size: int, group: Any) -> Any:
    reduced = functional.all_reduce(mine(rank), "sum", group)
    gathered = functional.all_gather_tensor(mine(rank), 0, group)
    scattered = functional.reduce_scatter_tensor(mine(rank, 4 * size), "sum", 0, group)
    return [functional.wait_tensor(each).clone() for each in (reduced, gathered, scattered)]


def data_parallel(rank: int, size: int, group: Any) -> Any:
    torch.manual_seed(5)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(40, 40), process_group=group)
    model(mine(rank, 3, 40)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def direct(name: str) -> Case:
    """Methods of ``ProcessGroup`` as C++ and older callers call them."""

    def case(rank: int, size: int, group: Any) -> Any:
        out, big = torch.zeros(5), torch.zeros(5 * size)
        method = getattr(group, name)
        single = {"all_gather_single", "_allgather_base"}
        if name in single:
            method(big, mine(rank)).wait()
        elif name in {"all_gather_single_coalesced", "allgather_into_tensor_coalesced"}:
            method([big], [mine(rank)]).wait()
        elif name == "allgather_coalesced":
            lists = [[torch.zeros(5)] for _ in range(size)]
            method(lists, [mine(rank)]).wait()
            return lists
        elif name in {"reduce_scatter_single", "_reduce_scatter_base"}:
            method(out, mine(rank, 5 * size)).wait()
        elif name in {"reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"}:
            method([out], [mine(rank, 5 * size)]).wait()
        elif name in {"all_to_all_single", "alltoall_base"}:
            method(big, mine(rank, 5 * size), [], []).wait()
        elif name == "allreduce":
            out = mine(rank)
            method(out).wait()
            method([big.copy_(mine(rank, 5 * size))]).wait()
        elif name == "broadcast":
            out = mine(rank)
            method(out, 1).wait()
        elif name == "reduce":
            out = mine(rank)
            method(out, root=0).wait()
            return out if rank == 0 else None
        elif name == "recv_anysource":
            return receive_from_anybody(rank, size, group)
        return out, big

    return case


def cases() -> dict[str, Case]:
    plain = (
        *(all_reduce_coalesced, all_reduce_coalesced_async, complex_all_reduce, broadcast, reduce, all_gather),
        *(all_gather_single, gather, scatter, reduce_scatter, all_to_all, all_to_all_single, send_and_receive),
        *(receive_from_anybody, batched, objects, barriers, functional_collectives, data_parallel),
    )
    found: dict[str, Case] = {case.__name__: case for case in plain} | reductions()
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        for asynchronous in (False, True):
            found[f"coalescing {kind} {asynchronous}"] = coalescing_manager(kind, asynchronous, device=False)
    found["coalescing all_reduce device"] = coalescing_manager("all_reduce", True, device=True)
    for name in sorted(COLLECTIVES | POINT_TO_POINT):
        if hasattr(dist.ProcessGroup, name):
            found[f"direct {name}"] = direct(name)
    return found


def outcomes(rank: int, group: Any) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates names that must go on working
        for name, case in cases().items():
            try:
                found[name] = ("returned", case(rank, SIZE, group))
            except Exception as error:
                found[name] = ("raised", type(error).__name__)
                c10d._world.pg_coalesce_state.clear()
    return found


def compare(rank: int, size: int, store: Any) -> tuple[list[str], list[str], set[str]]:
    dist.init_process_group("gloo", store=dist.PrefixStore("plain", store), rank=rank, world_size=size)
    expected = outcomes(rank, dist.new_group(list(range(size))))
    dist.destroy_process_group()

    parking = FakeParking()
    registry = GroupRegistry(
        rank=Rank(rank), world_size=size, store=store, parking=parking, epoch=Epoch(0), timeout=timedelta(seconds=30)
    )
    registry.install()
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(size)))
    assert isinstance(group, FlashGroup)
    differences = []
    for moment in ("before a rebuild", "after a rebuild"):
        if moment == "after a rebuild":
            registry.rebuild(registry.groups, Epoch(1))
        found = outcomes(rank, group)
        differences += [
            f"{moment}: {name}: plain {expected[name]}, handle {found[name]}"
            for name in expected
            if not same(expected[name], found[name])
        ]
    dist.destroy_process_group()
    registry.uninstall()
    refused = [name for name, (how, _) in expected.items() if how == "raised"]
    return differences, refused, {spot.operation for spot in parking.entered}


def same(expected: Any, found: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return bool(expected.dtype == found.dtype and torch.equal(expected, found))
    if isinstance(expected, (list, tuple)):
        if expected and expected[0] == "raised":
            return True  # plain gloo cannot; the handle may do better or fail alike
        return len(expected) == len(found) and all(same(*pair) for pair in zip(expected, found, strict=True))
    return bool(expected == found)


def test_every_operation_gives_the_same_as_plain_gloo(run_ranks):
    for differences, _refused, _operations in run_ranks(SIZE, compare, deadline=60):
        assert not differences, "\n".join(differences)


def test_no_name_of_the_installed_torch_is_unclassified():
    assert unclassified(dist.ProcessGroup) == []
