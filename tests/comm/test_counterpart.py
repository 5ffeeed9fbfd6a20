"""Counterparts over gloo in real processes: whoever is inside gets out, and everybody counts the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.core.ids import GroupKey, Rank
from megatron_flashrecovery.core.reports import Match
from tests.comm.test_groups import registry_of, until

SIZE = 2


def given(index: int) -> torch.Tensor:
    return torch.arange(1.0, 5.0) + index


OPERATIONS: dict[str, Callable[[], Any]] = {
    "all_reduce": lambda: dist.all_reduce(given(0)),
    "small integers": lambda: dist.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.MAX),
    "bfloat16": lambda: dist.all_reduce(torch.ones(1000, dtype=torch.bfloat16)),
    "asynchronous": lambda: dist.all_reduce(torch.ones(1000), async_op=True).wait(),
    "reduce": lambda: dist.reduce(torch.ones(1000), 0),
    "broadcast": lambda: dist.broadcast(given(0), 1),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(8), given(0)),
    "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(2), given(0)),
    "recv": lambda: dist.recv(torch.empty(3, 5), 1),
    "batch": lambda: dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, given(0), 1), dist.P2POp(dist.irecv, torch.empty(4), 1)]
    )[0].wait(),
}


def matches_for(registry: GroupRegistry, key: GroupKey, me: Rank, other: Rank) -> list[Match]:
    """What ``me`` has issued and ``other``, who has issued nothing since the first collective, has not."""
    count = registry.counts()[key]
    found = [Match(key, count.recent[-1], count.issued)] if count.issued > 1 else []
    if pair := count.pairs.get(other):
        found += [Match(key, form, peer=me, is_send=True) for form in pair.receives]
        found += [Match(key, form, peer=me) for form in pair.sends]
    return found


def one_stands_elsewhere(rank: int, size: int, store: Any, operation: str) -> tuple[object, float]:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    (key,) = registry.groups
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        thread = threading.Thread(target=OPERATIONS[operation])
        thread.start()
        until(lambda: registry.standing() is not None)
        until(lambda: matches_for(registry, key, Rank(0), Rank(1)))
        found = matches_for(registry, key, Rank(0), Rank(1))
        said = "|".join(f"{match.form.hex()},{match.number},{int(match.is_send)}" for match in found)
        store.set("forms", said)
        thread.join()
    else:
        fields = [part.split(",") for part in store.get("forms").decode().split("|")]
        registry.match(
            [
                Match(key, bytes.fromhex(form), int(number), None if int(number) else Rank(0), bool(int(is_send)))
                for form, number, is_send in fields
            ]
        )
    until(lambda: registry.counts()[key].issued == registry.counts()[key].completed)
    until(lambda: not any(pair.open for pair in registry.counts()[key].pairs.values()))
    count = registry.counts()[key]
    last = given(rank)
    dist.all_reduce(last)
    sent = [(pair.sent, pair.received)[:: 1 if rank == 0 else -1] for pair in count.pairs.values()]
    return (count.issued, count.completed, count.digest, count.broken, sent), float(last.sum())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_counterpart_ends_the_operation_and_is_counted_like_it(run_ranks, operation):
    first, second = run_ranks(SIZE, one_stands_elsewhere, operation)
    assert first == second
    assert first[1] == float((given(0) + given(1)).sum()), "the group goes on as if nothing had happened"


def forms_of_what_has_consequences(rank: int, size: int, store: Any) -> tuple[bytes, ...]:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    (key,) = registry.groups
    dist.barrier()
    dist.broadcast_object_list([None] if rank else ["a path"], 0)
    return registry.counts()[key].recent


def test_barriers_and_objects_have_no_counterpart(run_ranks):
    """Who leaves a barrier may believe that a checkpoint is written. The size of an object is a number like others."""
    for barrier, size, content in run_ranks(2, forms_of_what_has_consequences):
        assert (barrier, bool(size), content) == (b"", True, b"")


def severed_while_it_matches(rank: int, size: int, store: Any) -> str | None:
    registry = registry_of(rank, size, store)
    dist.init_process_group("gloo")
    (key,) = registry.groups
    dist.all_reduce(torch.ones(1000))
    if rank == 0:
        until(lambda: store.check(["severed"]))
        return None
    form = registry.counts()[key].recent[-1]
    thread = threading.Thread(target=registry.match, args=([Match(key, form, 2)],))
    thread.start()
    until(lambda: registry.standing() is not None)
    registry.sever([key], "somebody else was lost")
    thread.join(10)
    assert not thread.is_alive()
    store.set("severed", "")
    return registry.counts()[key].broken


def test_a_counterpart_that_is_cut_short_is_no_error_of_whoever_issued_it(run_ranks):
    _, broken = run_ranks(2, severed_while_it_matches)
    assert broken is not None
