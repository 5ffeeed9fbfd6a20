"""What second copies a job will have: where, at what cost, and against which losses. For start-up and `plan` alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_flashrecovery.core.bill import Bill, bill
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import FailureDomain, NoHost, Placement, place_mirrors
from megatron_flashrecovery.core.survival import Survival, survivable


@dataclass(frozen=True)
class Arrangement:
    """What has to be known of a job. ``peers[rank]`` includes the rank; ``unique_nbytes`` is the size of a snapshot.

    ``sharded``: what is unique is a share of the optimizer state. Else it is the small pieces only, and the big state
    has its other copies in the live memory of data-parallel peers.
    """

    node_of: Mapping[Rank, NodeId]
    peers: Mapping[Rank, tuple[Rank, ...]]
    unique_nbytes: Mapping[Rank, int]
    sharded: bool


@dataclass(frozen=True)
class Outlook:
    placement: Placement
    bill: Bill
    survival: Survival
    warnings: tuple[str, ...]


def outlook(job: Arrangement, failure_domain: FailureDomain = "node") -> Outlook | NoHost:
    placement = place_mirrors(job.peers, job.node_of, failure_domain)
    if isinstance(placement, NoHost):
        return placement
    return outlook_of(job, placement)


def outlook_of(job: Arrangement, placement: Placement) -> Outlook:
    """The same for mirrors that have been placed already."""
    survival = survivable(placement, job.peers, job.node_of, job.sharded)
    return Outlook(
        placement=placement,
        bill=bill(placement, job.node_of, job.unique_nbytes),
        survival=survival,
        warnings=(*placement.warnings, *_warnings(job, survival)),
    )


def _warnings(job: Arrangement, survival: Survival) -> tuple[str, ...]:
    found = []
    if survival.fatal_nodes and len(set(job.node_of.values())) > 1:
        names = ", ".join(survival.fatal_nodes[:4]) + (", ..." if len(survival.fatal_nodes) > 4 else "")
        found.append(f"the loss of one of these nodes is not survived: {names}: spread data-parallel peers over nodes")
    sizes = {len(group) for group in job.peers.values()}
    if len(sizes) > 1:
        found.append(f"data-parallel groups differ in size ({', '.join(map(str, sorted(sizes)))}): check the layout")
    return tuple(found)
