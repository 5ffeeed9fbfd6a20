"""Seats that have changed their node: which of them an event has moved where, and how a person is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Command, Event, NodeJoined, NodeLost, StartWorkers
from megatron_flashrecovery.core.phases import Finished, Halted

_SHOWN = 8


@dataclass(frozen=True)
class Move:
    """All seats that went from one node to another at one time."""

    ranks: tuple[Rank, ...]
    origin: NodeId
    target: NodeId


def moves_of(node_of: Mapping[Rank, NodeId], commands: Iterable[Command]) -> list[Move]:
    """``node_of``: where each rank sat before, also if that node is gone by now."""
    found: list[Move] = []
    for command in commands:
        if isinstance(command, StartWorkers):
            by_origin: dict[NodeId, list[Rank]] = {}
            for rank in command.ranks:
                if node_of[rank] != command.node:
                    by_origin.setdefault(node_of[rank], []).append(rank)
            found += [Move(tuple(ranks), origin, command.node) for origin, ranks in sorted(by_origin.items())]
    return found


def in_words(event: Event, moves: Sequence[Move], node_of: Mapping[Rank, NodeId], job: Job) -> list[str]:
    """A line for each turn; nothing if no node has come, is lost, or is left out. ``job`` has handled the event."""
    match event:
        case _ if isinstance(job.phase, Halted | Finished):
            return []  # the reason for the end says it
        case NodeLost(node=node, cause=cause):
            return [f"{node} is lost ({cause}): {_fate_of(node, moves, node_of, job)}"]
        case NodeJoined(node=node) if moves:
            come = "; ".join(f"{names_of(move.ranks)} of {move.origin} move there" for move in moves)
            return [f"spare node {node} has come: {come}"]
        case NodeJoined(node=node):
            return [f"{node} is there as a spare node"]
        case _:
            return [f"{names_of(move.ranks)} move from {move.origin} to {move.target}" for move in moves]


def names_of(ranks: Sequence[Rank]) -> str:
    """``ranks 4 to 7``, where they follow each other."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) > _SHOWN:
        return f"ranks {', '.join(map(str, ranks[:_SHOWN]))} and {len(ranks) - _SHOWN} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _fate_of(node: NodeId, moves: Sequence[Move], node_of: Mapping[Rank, NodeId], job: Job) -> str:
    said = [f"its {names_of(move.ranks)} move to {move.target}" for move in moves if move.origin == node]
    if waiting := sorted(rank for rank in job.seats.homeless if node_of[rank] == node):
        said.append(f"its {names_of(waiting)} wait for a spare node")
    left = len(job.spares)
    return ", ".join(said) or f"it had no seats; {left} spare {'node is' if left == 1 else 'nodes are'} left"
