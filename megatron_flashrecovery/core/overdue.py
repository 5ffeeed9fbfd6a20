"""Who does not stop though it was told to: who is only busy, who is overdue, and who never will.

A rank stops before its next operation, and until then it may compute for as long as it usually does: a long evaluation
is no reason to end it. So a rank that has not reported is overdue when it was given its time, and its node does not say
that it is busy. Whoever has none of its threads running cannot report at all, so it is not waited for any longer.
"""

from __future__ import annotations

from megatron_flashrecovery.core.hangs import few
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.job import SETTLED_AFTER, Job
from megatron_flashrecovery.core.messages import RanksHung
from megatron_flashrecovery.core.phases import Draining

LOOK_AGAIN = 1.0
"""Seconds between two looks at ranks that are busy."""


def note_watched(phase: Draining, event: RanksHung, now: float) -> None:
    before = _silent(phase)
    phase.watched[event.node] = event
    silent = _silent(phase)
    if silent - before:
        phase.stopped_since = now
    elif not silent:
        phase.stopped_since = None


def stopped_for_good(job: Job, phase: Draining, now: float) -> dict[Rank, str]:
    """Ranks to be ended at once, with the evidence: a few, for many at the same time are not to blame."""
    if phase.stopped_since is None or now < phase.stopped_since + SETTLED_AFTER:
        return {}
    late = set(late_ranks(job, phase))
    found = {
        rank: event.hung[rank]
        for node, event in phase.watched.items()
        for rank in event.silent
        if rank in late and rank in event.hung and job.seats.node_of[rank] == node
    }
    if not found or len(found) > few(len(job.seats)):
        phase.stopped_since = None
        return {}
    return found


def overdue_ranks(job: Job, phase: Draining) -> list[Rank]:
    """Of those whose time is over."""
    busy = {(node, rank) for node, event in phase.watched.items() for rank in event.busy}
    return [rank for rank in late_ranks(job, phase) if (job.seats.node_of[rank], rank) not in busy]


def late_ranks(job: Job, phase: Draining) -> list[Rank]:
    """Who has to report (again), and has not."""
    return [rank for rank in job.seats.node_of if rank not in phase.heard and rank not in phase.joining]


def _silent(phase: Draining) -> set[tuple[NodeId, Rank]]:
    return {(node, rank) for node, event in phase.watched.items() for rank in event.silent}
