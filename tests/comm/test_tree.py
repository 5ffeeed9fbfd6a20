"""Job-sized groups: small operations use the tree, large ones a flat communicator, replacements touch few links."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_flashrecovery.comm import tree_links
from megatron_flashrecovery.comm.communicator import Severed
from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.comm.startup_record import StartupRecord
from megatron_flashrecovery.comm.tree import ancestors, preorder
from megatron_flashrecovery.comm.tree_link import Kind, LinkBroken, LinkTimeout, TreeLink, Wake
from megatron_flashrecovery.comm.tree_links import TreeLinks, children_of, parent_of
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.testing.parking import FakeParking

SIZE = 8
LOST = 1
"""It has a parent and two children: no member touches more links."""


def mine(rank: int, round_: int = 0, n: int = 7) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(100 * round_ + rank))


def operations(rank: int, size: int, round_: int) -> dict[str, Any]:
    """Everything that the tree carries, and one that it does not."""
    found: dict[str, Any] = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX), ("product", dist.ReduceOp.PRODUCT)):
        found[f"int {name}"] = (mine(rank, round_) * 3).long()
        dist.all_reduce(found[f"int {name}"], op=op)
        found[f"float {name}"] = mine(rank, round_)
        dist.all_reduce(found[f"float {name}"], op=op)
    found["float avg"] = mine(rank, round_)
    dist.all_reduce(found["float avg"], op=dist.ReduceOp.AVG)
    for root in (0, 6, 3):
        found[f"broadcast {root}"] = mine(rank, round_)
        dist.broadcast(found[f"broadcast {root}"], root)
        reduced = (mine(rank, round_) * 3).long()
        dist.reduce(reduced, root)
        found[f"reduce {root}"] = reduced if rank == root else None
        gathered = [torch.zeros(7) for _ in range(size)] if rank == root else None
        dist.gather(mine(rank, round_), gathered, dst=root)
        found[f"gather {root}"] = gathered
    found["all_gather"] = [torch.zeros(7) for _ in range(size)]
    dist.all_gather(found["all_gather"], mine(rank, round_))
    found["all_gather_single"] = torch.zeros(7 * size)
    dist.all_gather_single(found["all_gather_single"], mine(rank, round_))
    found["objects"] = [None] * size
    dist.all_gather_object(found["objects"], {"rank": rank})
    dist.barrier()
    return {name: numbers(value) for name, value in found.items()}


def numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [numbers(each) for each in value] if isinstance(value, list) else value


def registry_of(rank: int, size: int, store: Any, **options: Any) -> GroupRegistry:
    registry = GroupRegistry(
        rank=Rank(rank),
        world_size=size,
        store=store,
        parking=FakeParking(),
        timeout=timedelta(seconds=30),
        **{"epoch": Epoch(0), "tree_above": 2, **options},
    )
    registry.install()
    return registry


def compared(rank: int, size: int, store: Any) -> Any:
    dist.init_process_group("gloo", store=dist.PrefixStore("plain", store), rank=rank, world_size=size)
    plain = operations(rank, size, 0)
    dist.destroy_process_group()
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    world = next(iter(registry.groups.values()))
    through_tree = operations(rank, size, 0)
    assert world.communicator is None, "nothing so far needs a flat communicator"
    large = torch.ones(100_000, dtype=torch.int64)
    dist.all_reduce(large)
    assert world.communicator is not None
    assert large.unique().tolist() == [size]
    return plain, through_tree


def test_the_tree_gives_what_the_plain_group_gives(run_ranks):
    for plain, through_tree in run_ranks(SIZE, compared, deadline=60):
        for name, expected in plain.items():
            if name in {"float sum", "float product", "float avg"}:
                assert torch.allclose(torch.tensor(through_tree[name]), torch.tensor(expected)), name
            else:
                assert through_tree[name] == expected, name


def undisturbed(rank: int, size: int, store: Any) -> Any:
    registry_of(rank, size, store)
    dist.init_process_group("gloo")
    return operations(rank, size, 1), operations(rank, size, 2)


def disturbed(rank: int, size: int, store: Any, record: bytes | None) -> Any:
    if record is None:
        registry = registry_of(rank, size, store)
        dist.init_process_group("gloo")
        world = next(iter(registry.groups.values()))
        store.set(f"record/{rank}", registry.startup_record().to_bytes())
        registry.stop_recording()
        first = operations(rank, size, 1)
        made = world.tree.links.made
        if rank == LOST:
            time.sleep(0.05)  # so that others are inside: not waited for, either way must work
            os.kill(os.getpid(), signal.SIGKILL)
        stop = threading.Thread(target=sever_when_lost, args=(store, registry))
        stop.start()
        with pytest.raises(RuntimeError):
            dist.all_reduce(mine(rank, 99))
        stop.join()
        registry.rebuild(registry.groups, Epoch(1))
    else:
        registry = registry_of(rank, size, store, epoch=Epoch(1), joining=StartupRecord.from_bytes(record))
        dist.init_process_group("gloo")
        world = next(iter(registry.groups.values()))
        first, made = None, 0
        registry.go_live(Epoch(1))
    return first, operations(rank, size, 2), world.tree.links.made - made


def sever_when_lost(store: Any, registry: GroupRegistry) -> None:
    store.wait(["lost"], timedelta(seconds=30))
    registry.sever(registry.groups, "a rank is lost")


def test_a_replacement_relinks_its_own_links_only_and_no_bit_changes(run_ranks):
    expected = run_ranks(SIZE, undisturbed)
    run_ranks.prefix("disturbed")
    started = [run_ranks.start(disturbed, rank, SIZE, None) for rank in range(SIZE)]
    assert run_ranks.results([started[LOST]], deadline=30, dying=[0]) == [-9]
    store = run_ranks.store()
    store.set("lost", b"")
    started[LOST] = run_ranks.start(disturbed, LOST, SIZE, store.get(f"record/{LOST}"))
    results = run_ranks.results(started, deadline=40)
    for rank, (first, second, _) in enumerate(results):
        assert second == expected[rank][1]
        assert first is None or first == expected[rank][0]
    touched = {rank: made for rank, (_, _, made) in enumerate(results) if made}
    assert touched == {LOST: 3, 0: 1, 3: 1, 4: 1}


def freed(rank: int, size: int, store: Any) -> float:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    if rank == 0:
        store.wait(["blocked"], timedelta(seconds=30))
        return 0.0
    thread = threading.Thread(target=sever_oneself, args=(rank, size, store, registry))
    thread.start()
    with pytest.raises(Severed):
        dist.all_reduce(torch.ones(1))
    thread.join()
    return time.monotonic() - float(store.get(f"severed {rank}"))


def sever_oneself(rank: int, size: int, store: Any, registry: GroupRegistry) -> None:
    while registry.standing() is None:
        threading.Event().wait(0.002)
    store.set(f"severed {rank}", str(time.monotonic()))
    registry.sever(registry.groups, "a test")
    if store.add("inside", 1) == size - 1:
        store.set("blocked", b"")


def test_a_member_inside_the_tree_is_freed_by_severing(run_ranks):
    assert max(run_ranks(4, freed)) < 1.0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 4800])
def test_the_tree_reaches_everybody_once_with_three_links_at_most(size):
    assert sorted(preorder(0, size)) == list(range(size))
    for member in range(0, size, max(1, size // 50)):
        assert len(children_of(member, size)) + (member > 0) <= 3
        assert all(parent_of(child) == member for child in children_of(member, size))
        assert ancestors(member)[-1] == 0
        assert len(ancestors(member)) <= size.bit_length()


@pytest.fixture
def link_ends():
    """The two ends of one link."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = socket.create_connection(listener.getsockname()), listener.accept()[0]
    wakes = (Wake(), Wake())
    ends = [TreeLink(*each) for each in zip(connections, wakes, strict=True)]
    yield ends
    for end, wake in zip(ends, wakes, strict=True):
        end.close()
        wake.close()


def soon() -> float:
    return time.monotonic() + 5


def test_a_marker_that_comes_while_an_operation_waits_is_not_lost(link_ends):
    ours, theirs = link_ends
    theirs.send(Kind.MARKER, 1, b"", soon())
    with pytest.raises(LinkBroken, match="epoch 1"):
        ours.data(7, soon())
    assert ours.try_marker(1, soon())


def test_what_an_aborted_operation_left_on_its_way_is_discarded(link_ends):
    ours, theirs = link_ends
    for number, kind in ((7, Kind.DATA), (1, Kind.MARKER), (1, Kind.DATA)):
        theirs.send(kind, number, b"payload", soon())
    assert ours.try_marker(1, soon())
    assert ours.data(1, soon()) == b"payload"


def test_a_frame_that_was_cut_by_severing_is_sent_to_its_end_later(link_ends):
    ours, theirs = link_ends
    large = b"x" * 10_000_000
    theirs._wake.ring("a test")
    with pytest.raises(Severed):
        theirs.send(Kind.DATA, 7, large, soon())
    theirs._wake.clear()
    sender = threading.Thread(target=theirs.send, args=(Kind.MARKER, 1, b"", soon()))
    sender.start()
    assert ours.try_marker(1, soon())
    sender.join()


def test_a_wake_is_cleared_also_where_its_descriptor_is_larger_than_select_takes():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 1500:
        pytest.skip("no process may have so many descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1501), hard))
    wake = Wake()
    try:
        low, wake.descriptor = wake.descriptor, fcntl.fcntl(wake.descriptor, fcntl.F_DUPFD_CLOEXEC, 1400)
        os.close(low)
        for _ in range(2):
            wake.ring("a test")
            wake.clear()
            wake.check()
            with pytest.raises(LinkTimeout):
                wake.wait(None, time.monotonic())
    finally:
        wake.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def child_of_one_that_is_gone() -> tuple[TreeLinks, Any]:
    """Its parent has published an address at which nobody listens any more."""
    store = dist.HashStore()
    store.set("tree/0-1", f"{free_port()} 00 127.0.0.1")
    return TreeLinks(1, 2, timeout=30), store


def test_a_parent_that_has_gone_is_a_broken_link():
    links, store = child_of_one_that_is_gone()
    with pytest.raises(LinkBroken, match="member 0"):
        links.relink(store, 1)
    links.close()


def test_who_was_severed_does_not_connect_any_more():
    links, store = child_of_one_that_is_gone()
    links.wake.ring("epoch 2: rank 0 was lost")
    with pytest.raises(Severed, match="rank 0 was lost"):
        links.relink(store, 1)
    links.close()


def test_a_stranger_that_says_nothing_does_not_keep_a_child_out(monkeypatch):
    monkeypatch.setattr(tree_links, "_TOKEN_TIMEOUT", 0.2)
    store = dist.HashStore()
    ends = [TreeLinks(member, 2, timeout=30) for member in range(2)]
    parent = threading.Thread(target=ends[0].relink, args=(store, 1))
    parent.start()
    store.wait(["tree/0-1"])
    port, _token, host = store.get("tree/0-1").decode().split(" ")
    with socket.create_connection((host, int(port))):
        ends[1].relink(store, 1)
        parent.join(10)
        assert not parent.is_alive()
    for links in ends:
        links.close()


def linked(member: int, size: int, store: Any, links: TreeLinks, epoch: int, made: list[int]) -> None:
    before = links.made
    links.relink(store, epoch)
    made[member] = links.made - before


def test_relinking_counts_do_not_grow_with_the_group():
    """Threads for members: what one replacement costs all others together, for growing groups."""
    for size in (3, 15, 60):
        stores = dist.HashStore()
        members = [TreeLinks(member, size, timeout=30) for member in range(size)]
        for epoch, lost in ((0, None), (1, 1)):
            if lost is not None:
                members[lost].close()
                members[lost] = TreeLinks(lost, size, timeout=30)
            made = [0] * size
            threads = [
                threading.Thread(
                    target=linked, args=(m, size, dist.PrefixStore(str(epoch), stores), members[m], epoch, made)
                )
                for m in range(size)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(made) == (2 * (size - 1) if lost is None else 2 * (1 + len(children_of(1, size))))
        for links in members:
            links.close()
