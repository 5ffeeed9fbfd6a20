"""Groups over gloo in real processes: severed, rebuilt, counted, recorded and replayed."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore

from megatron_flashrecovery.comm import rendezvous
from megatron_flashrecovery.comm.communicator import Severed
from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.parking import Interrupted, Proceed
from megatron_flashrecovery.comm.registry import GroupRegistry, group_key
from megatron_flashrecovery.comm.startup_record import StartupMismatch, StartupRecord
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.reports import PairCount, Spot
from megatron_flashrecovery.testing.parking import FakeParking

DEADLINE = timedelta(seconds=30)
REBUILDS = 50


def registry_of(rank: int, size: int, store: Any, parking: FakeParking | None = None, **options: Any) -> GroupRegistry:
    registry = GroupRegistry(
        rank=Rank(rank),
        world_size=size,
        store=store,
        parking=parking or FakeParking(),
        timeout=DEADLINE,
        **{"epoch": Epoch(0), **options},
    )
    registry.install()
    return registry


def meet(store: Any, name: str, size: int) -> None:
    """Until all ranks are here; on the store, because groups are what is tested."""
    if store.add(name, 1) == size:
        store.set(f"{name}/all", "")
    store.wait([f"{name}/all"], DEADLINE)


def until(condition: Any) -> None:
    end = time.monotonic() + DEADLINE.total_seconds()
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        threading.Event().wait(0.002)


def block_in(rank: int, group: Any) -> None:
    """Wait for rank 0, which never comes. (Gloo ends the process on mismatched collectives: all issue the same one.)"""
    if rank == 2:
        dist.recv(torch.ones(5), 0, group=group)
    elif rank == 4:
        dist.batch_isend_irecv([dist.P2POp(dist.irecv, torch.ones(5), 0, group)])[0].wait()
    else:
        work = dist.all_reduce(torch.ones(1000), group=group, async_op=True)
        work.wait()


def severed_by_one(rank: int, size: int, store: Any) -> tuple[bool, float]:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    other = dist.new_group(list(range(size)), group_desc="OTHER")
    keys = list(registry.groups)
    if rank == 0:
        meet(store, "blocked", size)
        begun = time.monotonic()
        registry.sever(keys[:1], "a test")
        took = time.monotonic() - begun
    else:

        def watch() -> None:
            until(lambda: registry.standing() is not None)
            meet(store, "blocked", size)

        thread = threading.Thread(target=watch)
        thread.start()
        with pytest.raises(RuntimeError):
            block_in(rank, None)
        thread.join()
        took = 0.0
    meet(store, "severed", size)
    # The other group, with the same members, was not touched.
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=other)
    assert tensor.item() == size
    assert registry.counts()[keys[0]].broken is not None
    assert registry.counts()[keys[1]].broken is None
    return registry.standing() is None, took


def test_severing_a_group_frees_every_member_and_no_other_group(run_ranks):
    results = run_ranks(6, severed_by_one)
    assert all(free for free, _ in results)
    assert results[0][1] < 0.05, "severing itself takes milliseconds"


def sever_latency(rank: int, size: int, store: Any) -> float:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    world = next(iter(registry.groups))
    if rank == 0:
        meet(store, "blocked", size)
        store.set("severed at", str(time.monotonic()))
        registry.sever([world], "a test")
        return 0.0
    thread = threading.Thread(
        target=lambda: (until(lambda: registry.standing() is not None), meet(store, "blocked", size))
    )
    thread.start()
    with pytest.raises(RuntimeError):
        block_in(rank, None)
    took = time.monotonic() - float(store.get("severed at"))
    thread.join()
    return took


def test_remote_members_are_free_within_a_fraction_of_a_second(run_ranks):
    # Milliseconds on a quiet machine; the bound leaves room for a busy one, and is far below any timeout of gloo's.
    assert max(run_ranks(4, sever_latency)) < 1.0


def cut_by_one(rank: int, size: int, store: Any) -> tuple[float, str | None]:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    world = next(iter(registry.groups))
    dist.barrier()
    if rank == 0:
        meet(store, "blocked", size)
        store.set("cut at", str(time.monotonic()))
        registry.cut_a_connection()
        with pytest.raises(RuntimeError):
            block_in(1, None)
        return 0.0, registry.counts()[world].broken
    thread = threading.Thread(
        target=lambda: (until(lambda: registry.standing() is not None), meet(store, "blocked", size))
    )
    thread.start()
    with pytest.raises(RuntimeError):
        block_in(rank, None)
    took = time.monotonic() - float(store.get("cut at"))
    thread.join()
    return took, registry.counts()[world].broken


def test_a_connection_that_is_cut_fails_the_operation_at_both_ends(run_ranks):
    results = run_ranks(2, cut_by_one)
    assert max(took for took, _ in results) < 1.0
    assert all(broken is not None for _, broken in results)


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def rebuilt_often(rank: int, size: int, store: Any) -> None:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    before = held()
    meet(store, "made", size)
    for epoch in range(1, REBUILDS + 1):
        for key in registry.groups:
            if rank == epoch % size:
                registry.sever([key], "a test")
            else:
                with pytest.raises(RuntimeError):
                    dist.all_reduce(torch.ones(100))
        registry.rebuild(registry.groups, Epoch(epoch))
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        assert tensor.item() == size
        meet(store, f"rebuilt {epoch}", size)
    # A thread that closes what was replaced is gone for Python a moment before it is gone for the kernel. The first
    # rebuild makes one connection for all of them.
    most = (before[0] + 1, before[1])
    until(lambda: all(now <= then for now, then in zip(held(), most, strict=True)))


def test_fifty_rebuilds_leave_no_descriptor_and_no_thread_behind(run_ranks):
    run_ranks(3, rebuilt_often)


def left_waiting(rank: int, size: int, store: Any) -> float:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    dist.new_group([0, 1, 2], group_desc="SECOND")
    meet(store, "made", size)
    if rank == 0:
        return 0.0  # never rebuilds

    def sever() -> None:
        store.set(f"severed {rank}", str(time.monotonic()))
        registry.sever(registry.groups, "rank 0 is lost as well", Epoch(2))

    thread = threading.Thread(target=sever)
    if rank == 1:
        sever()  # the order of epoch 2 comes before the rebuild of epoch 1 has begun
    else:
        until(lambda: store.check(["severed 1"]))
    thread.start()
    with pytest.raises(Severed, match="lost as well"):
        registry.rebuild(registry.groups, Epoch(1))
    thread.join()
    registry.reset_counts()
    assert all(count.broken is not None for count in registry.counts().values()), "not made, so nobody may keep it"
    took = time.monotonic() - float(store.get(f"severed {rank}"))
    return took


def test_a_rebuild_that_waits_for_a_lost_member_can_be_severed(run_ranks):
    assert max(run_ranks(3, left_waiting)) < 1.0


def died_while_connecting(rank: int, size: int, store: Any) -> float:
    """Rank 0 comes to the meeting of epoch 1, and no further."""
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    (world,) = registry.groups
    dist.all_reduce(torch.ones(1))
    meet(store, "made", size)
    took = 0.0
    if rank == 0:
        rendezvous.meet(PrefixStore(f"1/{world}", store), size, lambda: None, DEADLINE)
        registry.sever([world], "rank 0 is lost")
    else:

        def sever() -> None:
            until(lambda: any(thread.name == "flashrecovery-connect" for thread in threading.enumerate()))
            store.set("severed", str(time.monotonic()))
            registry.sever([world], "rank 0 is lost", Epoch(2))

        thread = threading.Thread(target=sever)
        thread.start()
        with pytest.raises(Severed, match="rank 0 is lost"):
            registry.rebuild([world], Epoch(1))
        took = time.monotonic() - float(store.get("severed"))
        thread.join()
    registry.rebuild([world], Epoch(2))
    dist.all_reduce(torch.ones(1))
    return took


def test_a_member_that_dies_while_all_connect_leaves_nobody_waiting(run_ranks):
    assert max(run_ranks(2, died_while_connecting)) < 1.0


def other_traffic(stop: threading.Event, kept: list[tuple[socket.socket, socket.socket]]) -> None:
    """What mirror links and RPC do meanwhile: sockets and event loops come and go at any moment."""
    while not stop.is_set():
        with socket.create_server(("127.0.0.1", 0)) as listener, selectors.EpollSelector() as loop:
            loop.register(listener, selectors.EVENT_READ)
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
            loop.register(theirs, selectors.EVENT_READ)
        if len(kept) < 40:
            kept.append((ours, theirs))
        else:
            ours.close()
            theirs.close()


def beside_others(rank: int, size: int, store: Any) -> int:
    stop, kept = threading.Event(), []
    thread = threading.Thread(target=other_traffic, args=(stop, kept))
    thread.start()
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    meet(store, "made", size)  # a rebuild severs, and the other one may still be connecting
    for epoch in range(1, 6):
        registry.rebuild(registry.groups, Epoch(epoch))
        dist.all_reduce(torch.ones(1))
    meet(store, "rebuilt", size)
    stop.set()
    thread.join()
    registry.sever(registry.groups, "a test")
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1))
    for ours, theirs in kept:
        ours.sendall(b"alive")
        assert theirs.recv(5) == b"alive"
        ours.close()
        theirs.close()
    return len(kept)


def test_severing_leaves_the_sockets_of_other_threads_alone(run_ranks):
    assert min(run_ranks(2, beside_others)) > 0


def killed(rank: int, size: int, store: Any) -> str:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    meet(store, "made", size)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1000))
    assert registry.groups_with([Rank(2)]) == list(registry.groups)
    meet(store, "failed", size - 1)
    return "failed"


def test_a_killed_member_fails_the_others(run_ranks):
    assert run_ranks(3, killed, dying=[2]) == ["failed", "failed", -9]


def counted(rank: int, size: int, store: Any) -> Any:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    world = next(iter(registry.groups))
    if rank == 0:
        dist.isend(torch.ones(3), 1)
        until(lambda: registry.counts()[world].pairs[Rank(1)].open == 0)
    else:
        tensor = torch.zeros(3)
        work = dist.irecv(tensor, 0)
        # Nobody waits for it, and gloo says nothing of itself: the registry has to find out.
        until(lambda: registry.counts()[world].pairs[Rank(0)].open == 0)
        work.wait()
        assert tensor.tolist() == [1, 1, 1]
    dist.all_reduce(torch.ones(3000), async_op=True)
    until(lambda: registry.counts()[world].completed == 1)
    assert not registry.outstanding()
    count = registry.counts()[world]
    registry.reset_counts()
    assert registry.counts()[world].issued == 0
    return count.issued, count.digest, dict(count.pairs)


def test_counts_see_the_completion_of_work_that_nobody_waits_for(run_ranks):
    sender, receiver = run_ranks(2, counted)
    assert sender[:2] == receiver[:2]
    assert sender[2] == {1: PairCount(sent=1)}
    assert receiver[2] == {0: PairCount(received=1)}


def parks(rank: int, size: int, store: Any) -> Any:
    spots: list[Spot] = []

    def stop(spot: Spot) -> Proceed:
        spots.append(spot)
        if len(spots) == 2:
            raise Interrupted(Step(0))
        return Proceed()

    registry = registry_of(rank, size, store, FakeParking(entering=stop))
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    with pytest.raises(Interrupted):
        dist.all_reduce(torch.ones(1))
    (count,) = registry.counts().values()
    return [spot.number for spot in spots], count.issued


def test_a_parked_operation_is_not_counted_as_issued(run_ranks):
    assert run_ranks(2, parks) == [([1, 2], 1)] * 2


def start_up(rank: int, size: int, store: Any) -> list[Any]:
    """What a framework does before its first step: every rank must see what the others contributed."""
    group = dist.new_group(list(range(size)), group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    alone = dist.new_group([rank], group_desc="ALONE", use_local_synchronization=True)
    decision = torch.tensor([rank, 10])
    dist.broadcast(decision, 0, group=group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(sizes, torch.tensor([rank * 7]), group=group)
    names: list[Any] = [None] * size
    dist.all_gather_object(names, f"rank {rank}")
    large = torch.full((20000,), float(rank))
    dist.all_reduce(large, group=group)
    work = dist.all_reduce(total := torch.ones(900), async_op=True)
    work.wait()
    dist.barrier(group=alone)
    return [decision, sizes, names, total, c10d.get_backend(group), dist.get_process_group_ranks(group), large]


def as_numbers(values: list[Any]) -> list[Any]:
    """Tensors do not outlive the process that sends them."""
    return [
        value.tolist() if isinstance(value, torch.Tensor) else as_numbers(value) if isinstance(value, list) else value
        for value in values
    ]


def recorded(rank: int, size: int, store: Any, record: bytes | None) -> Any:
    if record is None:
        registry = registry_of(rank, size, store)
        dist.init_process_group("gloo")
        values = start_up(rank, size, store)
        record = registry.startup_record().to_bytes()
        registry.stop_recording()
        meet(store, "recorded", size)
        if rank == 1:
            return as_numbers(values), record
        registry.sever(registry.groups, "rank 1 is replaced")
        registry.rebuild(registry.groups_with([Rank(1)]), Epoch(1))
    else:
        joining = StartupRecord.from_bytes(record)
        registry = registry_of(rank, size, store, epoch=Epoch(1), joining=joining)
        dist.init_process_group("gloo")
        values = start_up(rank, size, store)
        assert registry.startup_record() == joining
        registry.go_live(Epoch(1))
        assert registry.startup_record() == joining, "it may be lost as well"
    tensor = torch.tensor([rank + 1])
    dist.all_reduce(tensor)
    assert tensor.item() == 3
    late = dist.new_group([0, 1], group_desc="LATE")
    dist.all_reduce(tensor, group=late)
    return as_numbers(values), list(registry.groups)


def test_a_replacement_starts_from_the_record_and_then_joins_the_others(run_ranks):
    survivor = run_ranks.start(recorded, 0, 2, None)
    ((values, record),) = run_ranks.results([run_ranks.start(recorded, 1, 2, None)], deadline=30)
    replacement = run_ranks.start(recorded, 1, 2, record)
    (_, keys), (again, same_keys) = run_ranks.results([survivor, replacement], deadline=30)
    assert same_keys == [key.replace("ALONE[0]", "ALONE[1]") for key in keys]
    assert again[:-1] == values[:-1]
    assert again[-1] == [1.0] * 20000, "outputs above 64 KiB are left as they are"


def cut_short(rank: int, size: int, store: Any, record: bytes, tree_above: int) -> None:
    """A replacement whose partner is lost while it connects joins by the next plan, and its start goes on."""
    joining = StartupRecord.from_bytes(record)
    registry = registry_of(rank, size, store, epoch=Epoch(1), joining=joining, tree_above=tree_above)
    dist.init_process_group("gloo")
    (world,) = registry.groups
    registry.sever([world], "rank 0 is lost", Epoch(2))
    with pytest.raises(Severed):
        registry.go_live(Epoch(1))
    meet(store, "cut short", size)
    registry.rebuild([world], Epoch(2))
    registry.rehearse(True)
    dist.all_reduce(tensor := torch.ones(1))  # the start is not over
    assert tensor.item() == 2
    registry.rehearse(False)
    dist.all_reduce(tensor := torch.ones(3))
    assert tensor.tolist() == [2, 2, 2]


def starts_and_goes_on(rank: int, size: int, store: Any, tree_above: int) -> bytes | None:
    """Rank 1 is lost after the start."""
    registry = registry_of(rank, size, store, tree_above=tree_above)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    record = registry.startup_record().to_bytes()
    registry.stop_recording()
    meet(store, "recorded", size)
    if rank == 1:
        return record
    registry.sever(registry.groups, "rank 1 is replaced")
    meet(store, "cut short", size)
    registry.rebuild(registry.groups, Epoch(2))
    dist.all_reduce(torch.ones(3))
    return None


@pytest.mark.parametrize("tree_above", [64, 1], ids=["flat", "tree"])
def test_a_replacement_that_is_cut_short_while_it_connects_keeps_the_rest_of_its_start(run_ranks, tree_above):
    survivor = run_ranks.start(starts_and_goes_on, 0, 2, tree_above)
    (record,) = run_ranks.results([run_ranks.start(starts_and_goes_on, 1, 2, tree_above)], deadline=30)
    run_ranks.results([survivor, run_ranks.start(cut_short, 1, 2, record, tree_above)], deadline=30)


def recording_of(function: Any) -> StartupRecord:
    registry = registry_of(0, 1, dist.HashStore())
    try:
        dist.init_process_group("gloo")
        function()
        return registry.startup_record()
    finally:
        dist.destroy_process_group()
        registry.uninstall()


@pytest.mark.parametrize(
    ("again", "message"),
    [
        pytest.param(
            lambda: dist.all_reduce(torch.ones(3)), r"recorded allreduce of float32\[2\].*float32\[3\]", id="shape"
        ),
        pytest.param(lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32)), r"replacement.*int32\[2\]", id="dtype"),
        pytest.param(lambda: dist.broadcast(torch.ones(2), 0), "replacement issues broadcast root 0", id="operation"),
        pytest.param(
            lambda: [dist.all_reduce(torch.ones(2)) for _ in range(2)], "record of the start ends after 1", id="surplus"
        ),
    ],
)
def test_a_replacement_that_starts_differently_is_stopped_with_both_sides_named(again, message):
    record = recording_of(lambda: dist.all_reduce(torch.ones(2)))
    registry = registry_of(0, 1, dist.HashStore(), joining=record)
    try:
        dist.init_process_group("gloo")
        with pytest.raises(StartupMismatch, match=message) as caught:
            again()
        assert str(caught.value).count("test_groups.py:") >= (1 if "ends after" in message else 2)
    finally:
        dist.destroy_process_group()
        registry.uninstall()


def test_uninstall_gives_torch_back():
    before = (dist.init_process_group, dist.batch_isend_irecv, c10d._new_process_group_helper)
    registry = registry_of(0, 1, dist.HashStore())
    assert dist.init_process_group is not before[0]
    registry.uninstall()
    assert (dist.init_process_group, dist.batch_isend_irecv, c10d._new_process_group_helper) == before


def kinds_of_groups(rank: int, size: int, store: Any) -> list[str]:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    groups = [dist.group.WORLD, mesh.get_group("dp"), mesh.get_group("tp")]
    groups += [dist.new_subgroups(2)[0], dist.new_subgroups_by_enumeration([[0, 3], [1, 2]])[0]]
    groups += [dist.split_group(None, [[0, 1], [2, 3]], group_desc="SPLIT")]
    for group in groups:
        assert isinstance(group, FlashGroup)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == group.size()
        assert dist.get_backend(group) == "gloo"
    return list(registry.groups)


def test_every_way_to_make_a_group_makes_a_handle(run_ranks):
    names = run_ranks(4, kinds_of_groups)
    assert [name for name in names[0] if name in names[1]], "members agree on keys"
    assert "SPLIT[0,1]#2" in names[0]
    assert "SPLIT[0,1]#2" in names[1]


def test_keys_of_large_groups_are_short():
    key = group_key("default_pg", tuple(map(Rank, range(4800))), 0)
    assert len(key) < 48
    assert key == group_key("default_pg", tuple(map(Rank, range(4800))), 0)
    assert key != group_key("default_pg", tuple(map(Rank, range(4799))), 0)
