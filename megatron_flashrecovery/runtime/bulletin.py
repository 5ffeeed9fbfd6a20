"""Where ranks post small things for each other: a store that outlives every worker, held by the launcher of node 0."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_flashrecovery.core.errors import LinkLost
from megatron_flashrecovery.core.ids import Epoch

_MAC_NBYTES = 32
_EPOCH_NBYTES = 8


class Bulletin:
    """``read`` waits until somebody has posted, at most ``timeout`` seconds (``dist.DistStoreError``).

    The store listens to whoever can reach it, so what is posted is signed with the job's token.
    """

    def __init__(self, host: str, port: int, timeout: float, token: bytes) -> None:
        self._token = token
        self.store = dist.TCPStore(host, port, None, False, timedelta(seconds=timeout), wait_for_workers=False)

    def post(self, key: str, value: bytes) -> None:
        signed = self._mac(key, value) + value
        self.store.set(key, signed)  # type: ignore[arg-type]  # torch's stub says str; its binding takes both

    def read(self, key: str) -> bytes:
        """Raises ``LinkLost``: what is there was not posted by a worker of this job."""
        return self._checked(key, self.store.get(key))

    def post_newest(self, key: str, epoch: Epoch, value: bytes) -> None:
        """As a worker that took its seat in that epoch; for ``read_newest``. What a worker of a newer one has posted
        stays: this one may have been frozen, or its message long under way."""
        stamped = int(epoch).to_bytes(_EPOCH_NBYTES, "big") + value
        signed, seen = self._mac(key, stamped) + stamped, b""
        while True:
            there = self.store.compare_set(key, seen, signed)  # type: ignore[arg-type]  # as above
            if there == signed or self._checked(key, there)[:_EPOCH_NBYTES] > stamped[:_EPOCH_NBYTES]:
                return
            seen = there

    def read_newest(self, key: str) -> bytes:
        """As ``read``."""
        return self.read(key)[_EPOCH_NBYTES:]

    def has(self, key: str) -> bool:
        """Whether anything was posted there; never waits."""
        return self.store.check([key])

    def read_all(self, keys: Sequence[str]) -> list[bytes]:
        """In one round trip."""
        return [self._checked(key, signed) for key, signed in zip(keys, self.store.multi_get(list(keys)), strict=True)]

    def _checked(self, key: str, signed: bytes) -> bytes:
        value = signed[_MAC_NBYTES:]
        if not hmac.compare_digest(signed[:_MAC_NBYTES], self._mac(key, value)):
            raise LinkLost(f"what is posted as {key} in the store is not from this job")
        return value

    def _mac(self, key: str, value: bytes) -> bytes:
        return hmac.new(self._token, key.encode() + b"\0" + value, hashlib.sha256).digest()
