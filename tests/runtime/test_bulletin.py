"""What ranks post for each other, in a real store."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_flashrecovery.core.errors import LinkLost
from megatron_flashrecovery.core.ids import Epoch
from megatron_flashrecovery.runtime.bulletin import Bulletin

KEY = "mirror/3"


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def bulletin(port: int, token: bytes = b"token") -> Bulletin:
    return Bulletin("127.0.0.1", port, 5.0, token)


def test_what_is_posted_is_read_by_others_of_the_job_only(store: dist.TCPStore) -> None:
    bulletin(store.port).post(KEY, b"here")
    assert bulletin(store.port).read(KEY) == b"here"
    with pytest.raises(LinkLost, match="not from this job"):
        bulletin(store.port, b"another").read(KEY)


def test_a_successor_overwrites_its_predecessor_and_never_the_other_way_round(store: dist.TCPStore) -> None:
    frozen, successor = bulletin(store.port), bulletin(store.port)
    frozen.post_newest(KEY, Epoch(1), b"first")
    assert frozen.read_newest(KEY) == b"first"
    successor.post_newest(KEY, Epoch(2), b"second")
    frozen.post_newest(KEY, Epoch(1), b"late")
    assert frozen.read_newest(KEY) == b"second"
    successor.post_newest(KEY, Epoch(2), b"again")
    assert frozen.read_newest(KEY) == b"again"
    successor.post_newest(KEY, Epoch(256), b"many epochs later")
    frozen.post_newest(KEY, Epoch(255), b"late")
    assert frozen.read_newest(KEY) == b"many epochs later"


def test_a_message_of_the_predecessor_that_comes_late_changes_nothing(store: dist.TCPStore) -> None:
    """As the network may deliver it: the store applies it when somebody else has posted."""
    frozen, successor = bulletin(store.port), bulletin(store.port)
    applied_late = []

    class Late:
        def compare_set(self, key: str, seen: bytes, value: bytes) -> bytes:
            if not applied_late:
                applied_late.append(value)
                successor.post_newest(KEY, Epoch(2), b"second")
            return frozen.store.compare_set(key, seen, value)

    late = bulletin(store.port)
    late.store = Late()  # type: ignore[assignment]
    late.post_newest(KEY, Epoch(1), b"first")
    assert applied_late
    assert successor.read_newest(KEY) == b"second"


def test_what_somebody_else_has_put_there_is_told(store: dist.TCPStore) -> None:
    bulletin(store.port, b"another").post_newest(KEY, Epoch(1), b"first")
    with pytest.raises(LinkLost, match="not from this job"):
        bulletin(store.port).post_newest(KEY, Epoch(2), b"second")
