"""Operations of a whole group whose partners stand elsewhere end by counterparts that the partners issue on the spot.

Without them, a group that lost nobody would have to be rebuilt only because a loss elsewhere stopped its members at
different places. The step in progress is discarded anyway, so what its operations deliver does not matter, as long as
everybody counts the same in the end: whoever has issued less issues the counterpart of what the others have, with
tensors that nobody reads, and stands where it stood. The others get *void* contents. What keeps those from ever
reaching a state:
- only ranks that are before their update get any: they stand at the gate at the latest, and nothing that is void there
  can be told to others (``answers`` concerns only ranks past the gate);
- of a collective, all members issue what they lack, or none does;
- nobody is advanced in such a group any more: the program of whoever issued a counterpart stands before an operation
  that is already counted.

A receive that is matched by a send is void; a send that is matched by a receive harms nobody, whatever its sender does.
Along a pipeline each rank may wait for the one before: those that stand issue theirs first, and the rest in later
rounds. It ends because a group is matched again only if less is missing in it than the last time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.ids import GroupKey, Rank
from megatron_flashrecovery.core.reports import Match, PairCount, Standing

_NO_PAIR = PairCount()


@dataclass(frozen=True)
class Matching:
    """``void`` are the ranks that get void contents; ``missing`` says of a matched group how many operations it took to
    complete what is under way in it, ``refused`` of another why it is not matched."""

    matches: Mapping[Rank, tuple[Match, ...]]
    void: frozenset[Rank]
    missing: Mapping[GroupKey, int]
    refused: Mapping[GroupKey, str]


@dataclass(frozen=True)
class _Lack:
    """Something that ``rank`` has not issued, and others have; it ends theirs with void contents for ``void``."""

    rank: Rank
    match: Match
    void: frozenset[Rank]


def find_matches(census: Census, severed: AbstractSet[GroupKey], missing_before: Mapping[GroupKey, int]) -> Matching:
    """Call it when nobody can be advanced, and nothing under way completes by itself any more."""
    matches: defaultdict[Rank, list[Match]] = defaultdict(list)
    void: set[Rank] = set()
    missing: dict[GroupKey, int] = {}
    refused: dict[GroupKey, str] = {}
    for key in sorted(census.suspect):
        if key in severed or not census.is_whole(key):
            continue
        collectives, transfers = list(_collectives(census, key)), list(_transfers(census, key))
        number = len(collectives) + len(transfers)
        objection = next(_objections(census, collectives, transfers), None)
        if objection is None and number >= missing_before.get(key, number + 1):
            objection = "it did not help"
        if objection is not None:
            refused[key] = objection
            continue
        for lack in (*collectives, *(one for one in transfers if _stands(census, one.rank))):
            matches[lack.rank].append(lack.match)
            void |= lack.void
            missing[key] = number
    return Matching({rank: tuple(found) for rank, found in sorted(matches.items())}, frozenset(void), missing, refused)


def _collectives(census: Census, key: GroupKey) -> Iterator[_Lack]:
    issued = census.tally(key).issued()
    fewest, most = min(issued), max(issued)
    if fewest == most:
        return
    count_of = {rank: census.count(rank, key) for rank in census.seats.members_of[key]}
    # Who has completed an operation that others have not issued has its contents from elsewhere: it had sent them.
    void = frozenset(rank for rank, count in count_of.items() if count.issued > max(fewest, count.completed))
    recent = next(count.recent for count in count_of.values() if count.issued == most)
    if most - fewest > len(recent):
        yield _unknown(next(rank for rank, count in count_of.items() if count.issued == fewest), key)
        return
    for rank, count in count_of.items():
        for number in range(count.issued + 1, most + 1):
            yield _Lack(rank, Match(key, recent[-1 - (most - number)], number), void)


def _transfers(census: Census, key: GroupKey) -> Iterator[_Lack]:
    for (sender, receiver), number in sorted(census.tally(key).undelivered.items()):
        if number > 0:
            forms = census.count(sender, key).pairs.get(receiver, _NO_PAIR).sends
            if number > len(forms):
                yield _unknown(receiver, key)
                continue
            for back in reversed(range(number)):
                yield _Lack(receiver, Match(key, forms[-1 - back], peer=sender), frozenset())
        else:
            forms = census.count(receiver, key).pairs.get(sender, _NO_PAIR).receives
            if -number > len(forms):
                yield _unknown(sender, key)
                continue
            for back in reversed(range(-number)):
                match = Match(key, forms[-1 - back], peer=receiver, is_send=True)
                yield _Lack(sender, match, frozenset({receiver}))


def _unknown(rank: Rank, key: GroupKey) -> _Lack:
    """Of more than is remembered; however much that is, it is one reason not to match the group."""
    return _Lack(rank, Match(key, b""), frozenset())


def _objections(census: Census, collectives: Sequence[_Lack], transfers: Sequence[_Lack]) -> Iterator[str]:
    for lack in (*collectives, *transfers):
        if not lack.match.form:
            yield f"nobody can say what rank {lack.rank} would have to issue"
        for rank in sorted(lack.void):
            if not census.is_before_update(rank):
                yield f"rank {rank} is {census.reports[rank].update.value}"
    moving = [lack.rank for lack in (*collectives, *transfers) if not _stands(census, lack.rank)]
    if moving and (collectives or len(moving) == len(transfers)):
        yield f"rank {min(moving)} does not stand"


def _stands(census: Census, rank: Rank) -> bool:
    report = census.reports.get(rank)
    return report is not None and report.standing is not Standing.BLOCKED
