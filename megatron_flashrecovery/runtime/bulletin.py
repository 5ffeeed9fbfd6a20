"""Where ranks post small things for each other: a store that outlives every worker, held by the launcher of node 0."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


class Bulletin:
    """``read`` waits until somebody has posted, at most ``timeout`` seconds (``dist.DistStoreError``)."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.store = dist.TCPStore(host, port, None, False, timedelta(seconds=timeout), wait_for_workers=False)

    def post(self, key: str, value: bytes) -> None:
        self.store.set(key, value)  # type: ignore[arg-type]  # torch's stub says str; its binding takes both

    def read(self, key: str) -> bytes:
        return self.store.get(key)

    def read_all(self, keys: Sequence[str]) -> list[bytes]:
        """In one round trip."""
        return self.store.multi_get(list(keys))
