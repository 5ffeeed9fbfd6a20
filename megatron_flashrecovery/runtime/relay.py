"""What an agent passes on: orders narrowed to one rank on the way down, words of several ranks merged on the way up."""

from __future__ import annotations

from dataclasses import replace

from megatron_flashrecovery.core import messages as core
from megatron_flashrecovery.core.ids import Rank


def narrowed(order: core.Drain, rank: Rank) -> core.Drain:
    return replace(
        order,
        advance=(rank,) if rank in order.advance else (),
        answer={rank: order.answer[rank]} if rank in order.answer else {},
        match={rank: order.match[rank]} if rank in order.match else {},
    )


def merged(told: list[object]) -> list[object]:
    """What ranks of this node said at about the same time becomes one event per kind."""
    merged: list[object] = []
    for message in told:
        last = merged[-1] if merged else None
        match (last, message):
            case (core.RanksReady(), core.RanksReady()) if last.epoch == message.epoch:
                merged[-1] = replace(last, ranks=last.ranks + message.ranks)
            case (core.RanksStood(), core.RanksStood()) if (last.epoch, last.number) == (message.epoch, message.number):
                merged[-1] = replace(last, reports=last.reports + message.reports)
            case (core.OperationsFailed(), core.OperationsFailed()) if last.epoch == message.epoch:
                step = max(last.step, message.step)
                merged[-1] = replace(last, failed={**last.failed, **message.failed}, step=step)
            case _:
                merged.append(message)
    return merged
