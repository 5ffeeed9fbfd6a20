"""What an agent makes of what its workers need and describe."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_flashrecovery.core.errors import FlashRecoveryError
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank
from megatron_flashrecovery.core.messages import SeatsDescribed
from megatron_flashrecovery.runtime.dialogue import Described, MemoryGranted
from megatron_flashrecovery.state.vault import Holding, Vault


def grant(
    vault: Vault, rank: Rank, own_nbytes: int, guests: Mapping[Rank, int]
) -> tuple[MemoryGranted, tuple[int, ...]]:
    """Memory for a rank's copies and its guests', with the descriptors; or a refusal with the reason."""
    ordered = tuple(sorted(guests))
    sizes = tuple(guests[guest] for guest in ordered)
    holdings = [Holding(rank), *(Holding(guest, host=rank) for guest in ordered)]
    try:
        fd_of = vault.reserve(dict(zip(holdings, (own_nbytes, *sizes), strict=True)))
    except FlashRecoveryError as error:
        return MemoryGranted(own_nbytes, ordered, sizes, refusal=str(error)), ()
    return MemoryGranted(own_nbytes, ordered, sizes), tuple(fd_of[holding] for holding in holdings)


def seats_described(node: NodeId, epoch: Epoch, described: Mapping[Rank, Described]) -> SeatsDescribed:
    return SeatsDescribed(
        node=node,
        epoch=epoch,
        sharded=any(seat.sharded for seat in described.values()),
        hosts={rank: seat.host for rank, seat in described.items() if seat.host is not None},
        peers={rank: seat.peers for rank, seat in described.items()},
        groups={key: ranks for seat in described.values() for key, ranks in seat.groups.items()},
    )
