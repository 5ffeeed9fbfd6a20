"""Members meet in the store before they connect, so that waiting for a member that died can be cut short.

Inside gloo's or NCCL's own set-up nobody can be freed from another thread: there is no connection yet to shut, and the
wait ends with the timeout of the group. Once all have said that they are here, the set-up itself takes milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

from megatron_flashrecovery.comm.communicator import Severed

_FIRST_LOOK, _LAST_LOOK = 0.001, 0.05
_TOO_LATE = 0.25
"""At most, as a part of the time that was waited."""


def meet(store: Store, size: int, severed: Callable[[], str | None], timeout: timedelta) -> None:
    """Until ``size`` members are here. ``store`` has the prefix of this one meeting. Raises ``Severed``."""
    if size == 1:
        return
    if store.add("here", 1) == size:
        store.set("all", "")
    began = time.monotonic()
    # Looks, not waits: a wait in the store cannot be woken, and torch warns of each one that times out.
    while not store.check(["all"]):
        reason = severed()
        if reason is not None:
            raise Severed(reason)
        waited = time.monotonic() - began
        if waited >= timeout.total_seconds():
            raise RuntimeError(f"only {store.add('here', 0)} of {size} members came within {timeout}")
        time.sleep(min(max(_FIRST_LOOK, _TOO_LATE * waited), _LAST_LOOK))
