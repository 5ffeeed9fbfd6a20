"""One round of getting stopped ranks out of each other's way, decided once everybody has reported.

A rank is *blocked* inside an operation of a whole communicator because a partner stopped before entering it. Nobody
unwinds a whole communicator by guessing. An operation under way can
- still complete by itself, because every partner has issued it: wait, for at most a grace period;
- complete if partners that stand exactly before it go ahead with this one operation: *advance* them, all those that the
  operation needs and whatever their own operations need, or none;
- not complete, because a partner stands elsewhere: once nothing else can move any more, for what moves may still bring
  a partner along, partners issue a *match* for it where they stand (see ``matching``);
- not be matched either: *sever* the group, which frees who is blocked in it.
Operations of which nobody waits for the end (asynchronous ones, eager sends) are completed or matched where that is
possible, so that their group can be kept; else their group is rebuilt, and nothing is severed for them.

Advancing ends: an advanced rank completes what somebody had begun and begins nothing that its partners do not.

With a replicated optimizer, ranks that are in the middle of an update which somebody else has applied are then
*answered* (see ``answers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_flashrecovery.core.answers import find_answers
from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.entanglement import all_or_none, under_way
from megatron_flashrecovery.core.ids import GroupKey, Rank
from megatron_flashrecovery.core.matching import find_matches
from megatron_flashrecovery.core.reports import Match, Told


@dataclass(frozen=True)
class Disentangle:
    """Orders of this round; the next one is decided when all who are concerned have reported again."""

    advance: frozenset[Rank] = frozenset()
    sever: Mapping[GroupKey, str] = field(default_factory=dict)
    answer: Mapping[Rank, tuple[Told, ...]] = field(default_factory=dict)
    match: Mapping[Rank, tuple[Match, ...]] = field(default_factory=dict)
    void: frozenset[Rank] = frozenset()
    """Whose operations end with void contents."""
    missing: Mapping[GroupKey, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """These groups have operations under way that complete by themselves; these ranks are about to be freed."""

    groups: frozenset[GroupKey]
    ranks: frozenset[Rank] = frozenset()


@dataclass(frozen=True)
class Settled:
    """Nobody is blocked and nothing moves any more."""


Decision: TypeAlias = Disentangle | Wait | Settled


@dataclass(frozen=True)
class Past:
    """What was ordered earlier in this epoch. ``answered`` counts the results that a rank had when it was answered.

    ``missing`` says of a group how much was missing in it when it was matched in this epoch.
    ``displaced`` groups were matched in this recovery: the next operation of some program there is already counted, so
    nobody is advanced in them. ``void`` ranks go on with contents that nobody computed.
    """

    severed: AbstractSet[GroupKey] = frozenset()
    answered: Mapping[Rank, int] = field(default_factory=dict)
    missing: Mapping[GroupKey, int] = field(default_factory=dict)
    displaced: AbstractSet[GroupKey] = frozenset()
    void: AbstractSet[Rank] = frozenset()


def decide_drain(census: Census, sharded: bool, past: Past, is_patient: bool) -> Decision:
    """``is_patient``: operations under way still have time to complete by themselves."""
    blocked_in = {key: min(ranks) for key, ranks in census.blocked_in.items() if ranks}
    advance: set[Rank] = set()
    moving: set[GroupKey] = set()
    closed = past.severed | past.displaced
    for key in sorted({*blocked_in, *census.suspect}):
        if not census.is_whole(key) or key in past.severed:
            continue
        for demands in under_way(census, key):
            if not demands:
                moving.add(key)
            else:
                advance |= all_or_none(census, demands, closed, past.void)
    stuck = {key: rank for key, rank in sorted(blocked_in.items()) if key not in past.severed}
    hopeless = {key: _why(census, key, rank) for key, rank in stuck.items() if not census.is_whole(key)}
    if advance or hopeless:
        return Disentangle(frozenset(advance), hopeless, void=_also_void(census, advance, past.void))
    if moving and is_patient:
        return Wait(frozenset(moving), frozenset(census.blocked))
    if freed := {rank for key in past.severed for rank in census.blocked_in.get(key, ())}:
        return Wait(frozenset(), frozenset(freed))
    matching = find_matches(census, past.severed, past.missing)
    if matching.matches:
        return Disentangle(match=matching.matches, void=matching.void, missing=matching.missing)
    if stuck:
        return Disentangle(sever={key: _why(census, key, rank, matching.refused) for key, rank in stuck.items()})
    answer = {} if sharded else find_answers(census, past.answered)
    return Disentangle(answer=answer) if answer else Settled()


def _also_void(census: Census, advance: set[Rank], void: AbstractSet[Rank]) -> frozenset[Rank]:
    """Who goes on with contents that come from a void rank."""
    if void.isdisjoint(advance):
        return frozenset()
    spots = [spot for rank in advance & void if (spot := census.reports[rank].spot) is not None]
    return frozenset(member for spot in spots for member in census.seats.members_of[spot.group])


def _why(census: Census, key: GroupKey, rank: Rank, refused: Mapping[GroupKey, str] | None = None) -> str:
    """Why ``rank``, blocked in ``key``, will not get out by itself; for the journal."""
    if (reason := census.reason_to_rebuild(key)) is not None and not census.is_whole(key):
        return reason
    spot = census.reports[rank].spot
    assert spot is not None
    for demands in under_way(census, key):
        for demand in demands:
            report = census.reports.get(demand.rank)
            other = None if report is None else report.spot
            at = "in no operation" if other is None else f"at {other.operation} of {other.group}"
            unmatched = "" if refused is None or key not in refused else f", unmatched: {refused[key]}"
            return f"rank {rank} is in {spot.operation}, but rank {demand.rank} stands {at}{unmatched}"
    return f"{spot.operation} of rank {rank} did not complete in time"
