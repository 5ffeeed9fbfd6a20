"""What the stopped ranks of one epoch have said so far, folded so that a verdict costs only what is exceptional.

A communicator may be kept only if every member holds the same one, and nothing is under way in it (invariant 7):
- no member was lost, and no member says that it is broken;
- every member has issued the same collectives (count and running hash), and all of them are completed on the device;
- for each ordered pair as many sends as the other side counts receives, none of them open.
Each group therefore keeps a tally of what its members say, not a list of members: a job-sized group in which everybody
agrees costs one entry. A report touches the groups of its rank and nothing else; groups that do not (yet) agree are in
a set, which is empty of healthy groups once everybody has reported.

A member that leaves a group out of its report has never used it: that is the same as a count of zero.

Groups that lost a member are *doomed* from the start, whatever is said of them. So are groups that an earlier plan of
the same recovery was to rebuild and that was not executed by everybody: some members hold the old communicator and some
the new one, and both may count zero operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from megatron_flashrecovery.core.ids import GroupKey, OrderNumber, Rank, Step
from megatron_flashrecovery.core.reports import GroupCount, PairCount, Report, Standing, Update
from megatron_flashrecovery.core.seats import Seats

Item = TypeVar("Item")
Said = tuple[int, int, int]
UNUSED: Said = (0, 0, 0)
NO_PAIR = PairCount()
NO_COUNT = GroupCount()


class GroupTally:
    """What the members of one group have said."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.said: Counter[Said] = Counter()
        self.broken: dict[Rank, str] = {}
        self.open: set[Rank] = set()
        self.undelivered: dict[tuple[Rank, Rank], int] = {}
        """(sender, receiver) -> sends that the sender counts minus receives that the receiver counts, if not zero."""

    def fold(self, rank: Rank, count: GroupCount, sign: int) -> None:
        said = (count.issued, count.completed, count.digest)
        self.said[said] += sign
        if not self.said[said]:
            del self.said[said]
        is_open = count.issued != count.completed
        for peer, pair in count.pairs.items():
            is_open = is_open or pair.open > 0
            self._shift((rank, peer), sign * pair.sent)
            self._shift((peer, rank), -sign * pair.received)
        if sign > 0 and is_open:
            self.open.add(rank)
        if sign > 0 and count.broken is not None:
            self.broken[rank] = count.broken
        if sign < 0:
            self.open.discard(rank)
            self.broken.pop(rank, None)

    def _shift(self, pair: tuple[Rank, Rank], by: int) -> None:
        undelivered = self.undelivered.get(pair, 0) + by
        if undelivered:
            self.undelivered[pair] = undelivered
        else:
            self.undelivered.pop(pair, None)

    def issued(self) -> set[int]:
        """How many collectives members have issued, absent ones included."""
        return {said[0] for said in self.said} | ({0} if self.said.total() < self.size else set())

    def oldest_open(self) -> int:
        """The first collective that somebody has issued and not seen completed, or 0."""
        return min((completed + 1 for issued, completed, _ in self.said if issued > completed), default=0)

    def agrees(self) -> bool:
        if self.broken or self.open or self.undelivered or len(self.said) > 1:
            return False
        heard = self.said.total()
        return heard == self.size or not heard or UNUSED in self.said

    def reason(self) -> str:
        """Why the group is not as every member would have it; for people."""
        if self.broken:
            rank = min(self.broken)
            return f"rank {rank}: {self.broken[rank]}"
        if self.open:
            return f"an operation is under way on rank {min(self.open)}"
        if self.undelivered:
            (sender, receiver), number = min(self.undelivered.items())
            what = f"{number} sends not received" if number > 0 else f"{-number} receives never sent"
            return f"rank {sender} to rank {receiver}: {what}"
        issued = sorted(self.issued())
        if len(issued) > 1:
            return f"members issued {issued[0]} to {issued[-1]} operations"
        return f"members issued different operations up to number {issued[0] if issued else 0}"


class Census:
    """The reports of one epoch. ``doomed`` are the groups that will be rebuilt in any case, with the reason."""

    def __init__(self, seats: Seats, doomed: Mapping[GroupKey, str]) -> None:
        self.seats = seats
        self.doomed = doomed
        self.reports: dict[Rank, Report] = {}
        self.numbers: dict[Rank, OrderNumber] = {}
        self.blocked: set[Rank] = set()
        self.blocked_in: dict[GroupKey, set[Rank]] = {}
        self.updating: set[Rank] = set()
        """Ranks that are between the gate and the end of their step: armed, writing or applied."""
        self.newest: Step | None = None
        """The newest step that somebody has completed or applied."""
        self.suspect: set[GroupKey] = set()
        self._tallies: dict[GroupKey, GroupTally] = {}

    def record(self, report: Report, number: OrderNumber) -> bool:
        """Fold one report in; false if a newer one of the same rank is here already. ``number`` is the newest order
        that the rank had obeyed; between two orders counts only ever grow."""
        rank, before = report.rank, self.reports.get(report.rank)
        if before is not None:
            age = (number, _progress(report))
            if age < (self.numbers[rank], _progress(before)):
                return False
        self.reports[rank] = report
        self.numbers[rank] = number
        self._note_blocked(rank, before, report)
        _put(self.updating, rank, report.update is not Update.BEFORE)
        live = Step(report.step + 1) if report.update is Update.APPLIED else report.step
        self.newest = live if self.newest is None else max(self.newest, live)
        for key in self.seats.groups_of.get(rank, ()):
            if key in self.doomed:
                continue
            tally = self._tallies.get(key)
            if tally is None:
                tally = self._tallies[key] = GroupTally(len(self.seats.members_of[key]))
            if before is not None:
                tally.fold(rank, before.counts.get(key, NO_COUNT), -1)
            tally.fold(rank, report.counts.get(key, NO_COUNT), +1)
            _put(self.suspect, key, not tally.agrees())
        return True

    def _note_blocked(self, rank: Rank, before: Report | None, report: Report) -> None:
        if before is not None and before.spot is not None:
            self.blocked_in.get(before.spot.group, set()).discard(rank)
        is_blocked = report.standing is Standing.BLOCKED
        _put(self.blocked, rank, is_blocked)
        if is_blocked and report.spot is not None:
            self.blocked_in.setdefault(report.spot.group, set()).add(rank)

    def count(self, rank: Rank, key: GroupKey) -> GroupCount:
        report = self.reports.get(rank)
        return NO_COUNT if report is None else report.counts.get(key, NO_COUNT)

    def tally(self, key: GroupKey) -> GroupTally:
        return self._tallies[key]

    def mark(self, key: GroupKey) -> tuple[int, int, int]:
        """Changes when something that was under way in the group has ended; costs nothing in a large group."""
        if key not in self.suspect:
            return (0, 0, -1 if self.blocked_in.get(key) else 0)
        tally = self._tallies[key]
        oldest = tally.oldest_open()
        return (oldest, 0 if oldest else len(tally.open), len(tally.broken))

    def is_before_update(self, rank: Rank) -> bool:
        """Nothing that it computes can reach its state, or be told to others, before it has passed the gate."""
        report = self.reports.get(rank)
        return report is not None and report.update is Update.BEFORE

    def is_whole(self, key: GroupKey) -> bool:
        """No member was lost or holds it broken: an operation under way in it can still complete."""
        tally = self._tallies.get(key)
        return key not in self.doomed and (tally is None or not tally.broken)

    def reason_to_rebuild(self, key: GroupKey) -> str | None:
        if key in self.doomed:
            return self.doomed[key]
        return self._tallies[key].reason() if key in self.suspect else None

    def rebuild(self) -> dict[GroupKey, str]:
        """Every group that must not be kept, with the reason, in order. Call it when everybody has reported."""
        keys = sorted({*self.doomed, *self.suspect})
        return {key: reason for key in keys if (reason := self.reason_to_rebuild(key)) is not None}


def _progress(report: Report) -> int:
    return sum(count.issued + count.completed for count in report.counts.values()) + sum(
        pair.sent + pair.received - pair.open for count in report.counts.values() for pair in count.pairs.values()
    )


def _put(items: set[Item], item: Item, present: bool) -> None:
    if present:
        items.add(item)
    else:
        items.discard(item)
