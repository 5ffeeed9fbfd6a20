"""Whoever is in the middle of an update that somebody else has applied can be told the results that it lacks.

A replicated optimizer keeps no copy to go back to: once one rank has applied the update, the job goes on to the state
after it. A rank past the gate has its reduced gradients; all it lacks are results of small reductions. It gets them
- from a data-parallel peer, all of them: the peer's reductions since the gate were the same, one by one;
- else from a member of the group in whose operation it stands, only the next one: that result they share.
A rank that is armed and stands in no operation stands right before its first write and lacks nothing: it is past the
gate, for nobody applies the update before everybody is. It is told to go on. Whoever cannot be answered copies the
state from a peer when the plan is executed.

An answer is given once for each number of results that a rank had: if it did not help, repeating it will not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.reports import Report, Told, Update


def find_answers(census: Census, answered: Mapping[Rank, int]) -> dict[Rank, tuple[Told, ...]]:
    """What to tell whom; ``answered`` counts the results that a rank had when it was last answered in this epoch."""
    found: dict[Rank, tuple[Told, ...]] = {}
    if census.newest is None:
        return found
    for rank in sorted(census.updating):
        report = census.reports[rank]
        if report.step + 1 != census.newest or not _can_finish(report):
            continue
        if answered.get(rank) == known_results(report, census.newest):
            continue
        if (answer := _answer(census, report, census.newest)) is not None:
            found[rank] = answer
    return found


def known_results(report: Report, step: Step) -> int:
    """How many results of the update to ``step`` a rank has."""
    return len(_results(report, step))


def _can_finish(report: Report) -> bool:
    # A rank that is half way through restoring writes too, but stands in no operation of an update.
    return report.update is Update.ARMED or report.spot is not None


def _answer(census: Census, report: Report, step: Step) -> tuple[Told, ...] | None:
    own = _results(report, step)
    known = len(own)
    for told, is_peer in _givers(census, report, step):
        if told[:known] != own:
            continue
        rest = told[known:] if is_peer else told[known : known + 1]
        if rest or (report.update is not Update.APPLIED and len(told) == known):
            return rest
    stands_before_the_write = report.update is Update.ARMED and report.spot is None
    return () if stands_before_the_write else None


def _givers(census: Census, report: Report, step: Step) -> Iterator[tuple[tuple[Told, ...], bool]]:
    """The results of the update to ``step`` from those who applied it, data-parallel peers (true) first."""
    peers = census.seats.peers_of.get(report.rank, ())
    members = () if report.spot is None else census.seats.members_of.get(report.spot.group, ())
    for rank in (*peers, *(member for member in members if member not in peers)):
        giver = census.reports.get(rank)
        if giver is not None and _has_applied(giver, step):
            yield _results(giver, step), rank in peers


def _has_applied(report: Report, step: Step) -> bool:
    return report.step == step or (report.step + 1 == step and report.update is Update.APPLIED)


def _results(report: Report, step: Step) -> tuple[Told, ...]:
    return tuple(told for told in report.told if told.step == step)
