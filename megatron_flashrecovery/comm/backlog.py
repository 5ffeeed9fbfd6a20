"""How far the device of this process is behind: the oldest operation that was issued and is not complete on it."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_flashrecovery.comm.communicator import Progress
from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.pending import PendingWork
from megatron_flashrecovery.core.pace import OnDevice


def backlog(groups: Iterable[FlashGroup]) -> OnDevice | None:
    """From any thread; waits for nothing. ``None`` if everything is complete, or the host waits for it itself."""
    issued = incomplete = 0
    oldest: tuple[float, PendingWork, Progress] | None = None
    for group in groups:
        issued += group.ledger.issued
        for pending in group.ledger.under_way():
            assert isinstance(pending, PendingWork), pending
            progress = pending.progress()
            if progress is Progress.OVER:
                continue
            incomplete += 1
            if oldest is None or pending.issued_at < oldest[0]:
                oldest = pending.issued_at, pending, progress
    if oldest is None:
        return None
    _, pending, progress = oldest
    operation = f"{pending.spot.operation} of {pending.spot.group}"
    return OnDevice(operation, pending.spot.number, progress is Progress.INSIDE, issued, max(0, issued - incomplete))
