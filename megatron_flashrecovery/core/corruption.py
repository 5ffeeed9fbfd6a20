"""What is done about data-parallel peers that hold different parameters: nobody knows since when, so the job goes back
to its newest checkpoint, or stops.

Each rank compares itself with its guest. Of three and more peers the odd one out differs from its guest *and* from its
host; of two nobody can tell.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_flashrecovery.core.findings import PeersDiffered
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.core.job import SETTLED_AFTER, Job
from megatron_flashrecovery.core.messages import Command, Fence
from megatron_flashrecovery.core.phases import Starting
from megatron_flashrecovery.core.policy import Action, Fault, decide
from megatron_flashrecovery.core.staffing import fall_back, halt

_SHOWN = 4


def note_difference(job: Job, event: PeersDiffered, now: float) -> list[Command]:
    """It is decided a moment later: the host and the guest of an odd one see it at about the same time."""
    if isinstance(job.phase, Starting):
        return []
    if not job.differing:
        job.differing_since = now
    job.differing[event.rank, event.guest] = event
    return []


def check_differences(job: Job, now: float) -> list[Command]:
    if not job.differing or now < job.differing_since + SETTLED_AFTER:
        return []
    events = list(job.differing.values())
    odd = odd_one_out(events)
    if odd is not None:
        job.suspect(odd)
    rule = decide(Fault.CORRUPTION, job.history(now, odd))
    why = describe(events, odd)
    if odd is None or rule.action is Action.FALL_BACK:
        return fall_back(job, why, now)
    node = job.seats.node_of[odd]
    why += f"; {rule.when}: {node} is left out"
    if rule.action is Action.STOP:
        return halt(job, f"{why}: start the job again without it")
    # As of a lost node: whoever only restarts would take these seats again, beside those who have them then.
    fence = Fence(node, tuple(sorted(job.seats.ranks_on[node])), why, Epoch(job.epoch + 1), Fault.NODE_LOST)
    job.capacity.pop(node, None)
    job.seats.evict(node)
    return [fence, *fall_back(job, why, now)]


def odd_one_out(events: Iterable[PeersDiffered]) -> Rank | None:
    """Who is in every pair that differs, if there are two at least and they are not the same two ranks."""
    pairs = [{event.rank, event.guest} for event in events if event.peers > 2]
    in_all = set.intersection(*pairs) if pairs else set()
    return next(iter(in_all)) if len(in_all) == 1 and len(pairs) > 1 else None


def describe(events: list[PeersDiffered], odd: Rank | None) -> str:
    first = events[0]
    pairs = "; ".join(f"rank {event.rank} and rank {event.guest}" for event in events[:_SHOWN])
    whose = "nobody can tell whose are wrong" if odd is None else f"those of rank {odd} are wrong"
    return f"data-parallel peers hold different parameters in step {first.step} ({first.part}): {pairs}, and {whose}"
