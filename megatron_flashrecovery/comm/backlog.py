"""How far the device of this process is behind: the oldest operation that was issued and is not complete on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_flashrecovery.comm.communicator import Progress
from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.pending import PendingWork
from megatron_flashrecovery.core.pace import OnDevice
from megatron_flashrecovery.core.reports import Spot


@dataclass(frozen=True)
class _Oldest:
    pending: PendingWork
    is_reached: bool
    issued: int
    incomplete: int


def backlog(groups: Iterable[FlashGroup]) -> OnDevice | None:
    """From any thread; waits for nothing. ``None`` if everything is complete, or the host waits for it itself."""
    oldest = _oldest(groups)
    if oldest is None:
        return None
    spot, completed = oldest.pending.spot, max(0, oldest.issued - oldest.incomplete)
    return OnDevice(f"{spot.operation} of {spot.group}", spot.number, oldest.is_reached, oldest.issued, completed)


def held_up_in(groups: Iterable[FlashGroup]) -> Spot | None:
    """The operation in which the device waits for the others; ``None`` if it is at something of its own. From any
    thread; waits for nothing."""
    oldest = _oldest(groups)
    return oldest.pending.spot if oldest is not None and oldest.is_reached else None


def _oldest(groups: Iterable[FlashGroup]) -> _Oldest | None:
    issued = incomplete = 0
    oldest: tuple[PendingWork, Progress] | None = None
    for group in groups:
        issued += group.ledger.issued
        for pending in group.ledger.under_way():
            assert isinstance(pending, PendingWork), pending
            progress = pending.progress()
            if progress is Progress.OVER:
                continue
            incomplete += 1
            if oldest is None or pending.issued_at < oldest[0].issued_at:
                oldest = pending, progress
    if oldest is None:
        return None
    pending, progress = oldest
    return _Oldest(pending, progress is Progress.INSIDE, issued, incomplete)
