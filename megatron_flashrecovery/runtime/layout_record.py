"""How a job is arranged, read from its journal: what the nodes described, and what each rank said that it mirrors."""

from __future__ import annotations

from pathlib import Path

from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.messages import SeatsDescribed
from megatron_flashrecovery.core.mirroring import Placement, warnings_of
from megatron_flashrecovery.core.outlook import Arrangement, Outlook, outlook_of
from megatron_flashrecovery.runtime.journal import FILE_NAME, decode_as, read_journal
from megatron_flashrecovery.runtime.node_messages import BillNoted


def recorded_outlook(directory: Path) -> tuple[Arrangement, Outlook]:
    """Raises ``RecordDamaged`` if the nodes have not described their seats, or some rank has no second copy."""
    described: dict[NodeId, SeatsDescribed] = {}
    nbytes_of: dict[Rank, int] = {}
    for line in read_journal(directory / FILE_NAME):
        if line.name == SeatsDescribed.__name__:
            seats = decode_as(SeatsDescribed, line)
            described[seats.node] = seats
        elif line.name == BillNoted.__name__:
            bill = decode_as(BillNoted, line)
            nbytes_of[bill.rank] = bill.unique_nbytes
    host_of = {guest: host for seats in described.values() for guest, host in seats.hosts.items()}
    peers = {rank: group for seats in described.values() for rank, group in seats.peers.items()}
    if not host_of:
        raise RecordDamaged(
            f"{directory / FILE_NAME} has no layout: the job has not come to its first step, or has one rank"
        )
    job = Arrangement(
        node_of={rank: seats.node for seats in described.values() for rank in seats.peers},
        peers=peers,
        unique_nbytes={rank: nbytes_of.get(rank, 0) for rank in peers},
        sharded=any(seats.sharded for seats in described.values()),
    )
    return job, outlook_of(job, Placement(host_of, warnings_of(host_of, job.peers, job.node_of)))
