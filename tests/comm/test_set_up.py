"""What is left behind when a set-up that nobody can free from outside is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megatron_flashrecovery.comm import set_up as module
from megatron_flashrecovery.comm.communicator import GroupIdentity, Severed
from megatron_flashrecovery.comm.set_up import SetUp
from megatron_flashrecovery.core.ids import GroupKey, Rank

IDENTITY = GroupIdentity(GroupKey("dp"), (Rank(0), Rank(1)), 0, (("cpu", "gloo"),), timedelta(seconds=9))


class SlowToConnect:
    """As NCCL, which connects when it is told to, and waits there for a member that has died."""

    others_are_there: threading.Event
    closed: threading.Event
    connected_on: list[int]

    def __init__(self, identity: GroupIdentity, store: object) -> None: ...

    def connect(self) -> None:
        self.connected_on.append(threading.get_ident())
        assert self.others_are_there.wait(10.0)

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowToConnect]:
    SlowToConnect.others_are_there, SlowToConnect.closed = threading.Event(), threading.Event()
    SlowToConnect.connected_on = []
    monkeypatch.setattr(module, "Communicator", SlowToConnect)
    return SlowToConnect


def make(severed: Callable[[], str | None], eagerly: bool = True) -> Any:
    return SetUp(dist.HashStore()).make(IDENTITY, "1/dp", severed, eagerly)


def test_who_is_told_that_a_member_is_gone_leaves_the_connecting_behind(slow: type[SlowToConnect]) -> None:
    with pytest.raises(Severed, match="rank 1 was lost"):
        make(lambda: "rank 1 was lost" if slow.connected_on else None)
    assert slow.connected_on != [threading.get_ident()]
    assert not slow.closed.is_set()
    slow.others_are_there.set()  # at last, or its wait has timed out
    assert slow.closed.wait(5.0), "nobody else knows of it"


def test_what_has_connected_is_handed_over(slow: type[SlowToConnect]) -> None:
    slow.others_are_there.set()
    assert isinstance(make(lambda: None), SlowToConnect)
    assert not slow.closed.is_set()


def test_what_is_not_wanted_at_once_is_not_connected(slow: type[SlowToConnect]) -> None:
    make(lambda: None, eagerly=False)
    assert slow.connected_on == []


def test_an_error_on_the_way_is_that_of_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_identity: object, _store: object) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module, "Communicator", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(lambda: None)
