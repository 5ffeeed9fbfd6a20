"""What is under way in a whole group, and which stopped ranks it would take to complete it.

A *demand* says: this rank has to go ahead with this operation. An operation under way without demands completes by
itself. A demand can be met only by a rank that is parked exactly before the operation asked for; going ahead, it makes
demands of its own (the other members that have not issued the collective, the partners of its batch of sends and
receives). Either all of them can be met, or none of them moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.ids import GroupKey, Rank
from megatron_flashrecovery.core.reports import Report, Spot, Standing


@dataclass(frozen=True)
class Demand:
    """``rank`` has to issue collective ``number`` of ``group``; or, if that is 0, ``times`` sends to or receives from
    ``peer``."""

    rank: Rank
    group: GroupKey
    number: int = 0
    operation: str | None = None
    peer: Rank | None = None
    is_send: bool = False
    times: int = 1

    def is_met_by(self, report: Report | None) -> bool:
        """Whether the rank is parked exactly before what is asked for."""
        if report is None or report.standing is not Standing.PARKED or report.spot is None:
            return False
        spot = report.spot
        if spot.group != self.group or spot.number != self.number:
            return False
        if self.number:
            return self.operation is None or self.operation == spot.operation
        partners = spot.sends_to if self.is_send else spot.receives_from
        return self.peer is not None and partners.count(self.peer) >= self.times


def under_way(census: Census, key: GroupKey) -> Iterator[tuple[Demand, ...]]:
    """For each thing under way in a group, what it demands; an empty tuple: it completes by itself."""
    number, operation = _oldest_open(census, key)
    if number:
        yield tuple(_behind(census, key, number, operation))
    if key not in census.suspect:
        if not number and census.blocked_in.get(key):
            # Its counts were taken later than it was seen to be blocked: it is on its way out.
            yield ()
        return
    tally = census.tally(key)
    for (sender, receiver), undelivered in sorted(tally.undelivered.items()):
        if undelivered > 0:
            yield (Demand(receiver, key, peer=sender),)
        else:
            yield (Demand(sender, key, peer=receiver, is_send=True),)
    if any(_awaits_delivery(census, key, rank) for rank in tally.open):
        yield ()


def all_or_none(
    census: Census, demands: tuple[Demand, ...], closed: AbstractSet[GroupKey], void: AbstractSet[Rank]
) -> frozenset[Rank]:
    """Every rank that has to go ahead for these demands to be met; nobody if one of them cannot be met, or would have
    to be met in a ``closed`` group, or with ``void`` contents for somebody whose update depends on them."""
    going: set[Rank] = set()
    expanded: set[tuple[GroupKey, int]] = set()
    todo = list(demands)
    while todo:
        demand = todo.pop()
        report = census.reports.get(demand.rank)
        if not demand.is_met_by(report):
            return frozenset()
        assert report is not None
        assert report.spot is not None
        if demand.rank in going:
            continue
        if demand.group in closed or not census.is_whole(demand.group):
            return frozenset()
        if demand.rank in void and not all(map(census.is_before_update, census.seats.members_of[demand.group])):
            return frozenset()
        going.add(demand.rank)
        if not demand.number:
            todo.extend(_partners(census, demand.rank, report.spot))
        elif (demand.group, demand.number) not in expanded:
            expanded.add((demand.group, demand.number))
            todo.extend(_behind(census, demand.group, demand.number, report.spot.operation))
    return frozenset(going)


def _oldest_open(census: Census, key: GroupKey) -> tuple[int, str | None]:
    """The first collective that somebody has issued and not seen completed; its name if somebody is blocked in it."""
    oldest = census.tally(key).oldest_open() if key in census.suspect else 0
    blocked_at = {}
    for rank in census.blocked_in.get(key, ()):
        spot = census.reports[rank].spot
        if spot is not None and spot.number:
            blocked_at[spot.number] = spot.operation
    # A rank may have been told apart as blocked and counted as done, if it moved while it looked.
    oldest = min([number for number in (oldest, *blocked_at) if number], default=0)
    return oldest, blocked_at.get(oldest)


def _behind(census: Census, key: GroupKey, number: int, operation: str | None) -> Iterator[Demand]:
    """The members that have not issued this collective."""
    if key in census.suspect and all(issued >= number for issued in census.tally(key).issued()):
        return
    for rank in census.seats.members_of[key]:
        if census.count(rank, key).issued < number:
            yield Demand(rank, key, number, operation)


def _partners(census: Census, rank: Rank, spot: Spot) -> Iterator[Demand]:
    """What a parked batch of sends and receives needs besides what its partners have issued already."""
    tally = census.tally(spot.group)
    for peer, times in sorted(Counter(spot.sends_to).items()):
        awaited = max(0, -tally.undelivered.get((rank, peer), 0))
        if times > awaited:
            yield Demand(peer, spot.group, peer=rank, times=times - awaited)
    for peer, times in sorted(Counter(spot.receives_from).items()):
        sent = max(0, tally.undelivered.get((peer, rank), 0))
        if times > sent:
            yield Demand(peer, spot.group, peer=rank, is_send=True, times=times - sent)


def _awaits_delivery(census: Census, key: GroupKey, rank: Rank) -> bool:
    """Whether a send or receive of this rank is open although its partner has issued the other side."""
    undelivered = census.tally(key).undelivered
    return any(
        pair.open and (rank, peer) not in undelivered and (peer, rank) not in undelivered
        for peer, pair in census.count(rank, key).pairs.items()
    )
