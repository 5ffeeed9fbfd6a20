"""Before the first step: who keeps whose second copy, memory for it, and the links between them.

Who hosts whom is decided once, by rank 0, from what every rank says of its data-parallel peers, with the same code that
``flashrecovery plan`` uses. It costs O(job), at the start of a job; nothing later does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from megatron_flashrecovery.comm.registry import GroupRegistry
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import NoHost, Placement, place_mirrors
from megatron_flashrecovery.detect.cuda import place_of
from megatron_flashrecovery.runtime import dialogue
from megatron_flashrecovery.runtime.bulletin import Bulletin
from megatron_flashrecovery.runtime.framework import Framework, StepRecord
from megatron_flashrecovery.runtime.line import Line
from megatron_flashrecovery.runtime.ownership import Ownership
from megatron_flashrecovery.runtime.progress import with_record
from megatron_flashrecovery.state.content import needed_bytes
from megatron_flashrecovery.state.memory import Memory


@dataclass(frozen=True)
class Berth:
    """Where one rank's second copy goes, and whose copies it keeps; or why there is no place for it."""

    host: Rank
    guests: tuple[Rank, ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: str | None = None


_BERTH = msgspec.msgpack.Decoder(Berth)


@dataclass(frozen=True)
class Memories:
    """Mapped, and held by the agent too. ``own_fd``, for reading only, is what its host
    is lent of ``own``."""

    own: Memory
    own_fd: int
    guests: Mapping[Rank, Memory]


def find_berth(bulletin: Bulletin, seat: dialogue.Seat, peers: Sequence[Rank]) -> Berth:
    """Raises ``ConfigError`` if there is nowhere to put a second copy."""
    if seat.joining:
        return _BERTH.decode(bulletin.read(_berth_key(seat.rank)))
    bulletin.post(_epoch_key(seat, "peers", seat.rank), msgspec.msgpack.encode(list(peers)))
    if seat.rank == 0:
        _assign_berths(bulletin, seat)
    answer = bulletin.read(_epoch_key(seat, "berth", seat.rank))
    berth = _BERTH.decode(answer)
    if berth.refusal is not None:
        raise ConfigError(berth.refusal)
    bulletin.post(_berth_key(seat.rank), answer)
    return berth


def _assign_berths(bulletin: Bulletin, seat: dialogue.Seat) -> None:
    ranks = [Rank(rank) for rank in range(seat.world_size)]
    said = bulletin.read_all([_epoch_key(seat, "peers", rank) for rank in ranks])
    peers = {rank: tuple(msgspec.msgpack.decode(data, type=list[Rank])) for rank, data in zip(ranks, said, strict=True)}
    node_of = {rank: NodeId(f"node{rank // seat.ranks_per_node}") for rank in ranks}
    placement = place_mirrors(peers, node_of)
    for rank in ranks:
        bulletin.post(_epoch_key(seat, "berth", rank), msgspec.msgpack.encode(_berth(placement, rank)))


def _berth(placement: Placement | NoHost, rank: Rank) -> Berth:
    if isinstance(placement, NoHost):
        return Berth(rank, refusal=placement.reason)
    warnings = placement.warnings if rank == 0 else ()
    return Berth(placement.host_of[rank], placement.guests_of().get(rank, ()), warnings)


def take_memory(
    line: Line, bulletin: Bulletin, seat: dialogue.Seat, berth: Berth, framework: Framework, ownership: Ownership
) -> Memories:
    """Ask the agent for memory that outlives this process. Raises ``ConfigError`` if the node has not enough."""
    if seat.joining:
        own = int(bulletin.read(_size_key(seat.rank)))
        guests = {guest: int(bulletin.read(_size_key(guest))) for guest in berth.guests}
    else:
        own = needed_bytes(ownership.mirrored(), with_record(framework.values(), StepRecord(0.0, 0.0)))
        bulletin.post(_epoch_key(seat, "slot_nbytes", seat.rank), str(own).encode())
        bulletin.post(_size_key(seat.rank), str(own).encode())
        guests = {guest: int(bulletin.read(_epoch_key(seat, "slot_nbytes", guest))) for guest in berth.guests}
    granted, fds = line.ask_for_memory(dialogue.MemoryNeeded(own, guests), seat.join_timeout)
    if granted.refusal is not None:
        raise ConfigError(granted.refusal)
    memories = [Memory(fd) for fd in fds]
    own_fd = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDONLY)
    for fd in fds:
        os.close(fd)  # the mapping stays
    return Memories(memories[0], own_fd, dict(zip(granted.guests, memories[1:], strict=True)))


def description(
    rank: Rank, framework: Framework, ownership: Ownership, registry: GroupRegistry, berth: Berth
) -> dialogue.Described:
    """What this rank is part of: every group is told of by its first member."""
    members_of = {key: registry.members(key) for key in registry.groups}
    return dialogue.Described(
        sharded=ownership.sharded,
        host=berth.host,
        peers=framework.data_parallel_peers(),
        groups={key: members for key, members in members_of.items() if members[0] == rank},
        unique_nbytes=sum(piece.nbytes for piece in ownership.unique()),
        warning="; ".join(berth.warnings) or None,
        device=place_of(framework.tensor_pieces()[0].tensor.device),
    )


def _epoch_key(seat: dialogue.Seat, what: str, rank: Rank) -> str:
    """Between ranks that start together: a key of an earlier start of the whole job must not be read."""
    return f"{what}/{seat.epoch}/{rank}"


def _berth_key(rank: Rank) -> str:
    """For whoever replaces the rank later."""
    return f"berth/{rank}"


def _size_key(rank: Rank) -> str:
    return f"slot_nbytes/{rank}"
