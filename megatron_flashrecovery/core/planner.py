"""Decide how to recover: from which step, each rank from which copy, and which groups are rebuilt. Pure.

**The step** is the newest one that every rank can produce (invariant 6). By the gate (invariant 1) the ranks are at
most one completed step apart, and the older of the two is always there unless a rank and its copies went together.

**Sharded optimizers.** What a rank has, nobody else has. In order: its live memory, its own snapshot, the mirror at its
host; for a replacement the mirror, then what its node's vault kept of its predecessor. Parameters are gathered again.

**Replicated optimizers.** The big state is in the live memory of data-parallel peers, and only values are unique. In
order: live memory (also of a rank that has applied the update and not returned), else a peer's live memory together
with the values from the own snapshot, the mirror, or the vault. There is no undo: nobody can produce a step that no
peer holds live.

Live memory counts only together with the own snapshot of the same step: early pieces are put back from it.

A source that somebody failed to restore from in this recovery is tried again only if there is no other one of the same
step; one that failed twice does not exist (invariant 8), and an older step may be what is left.

What a seat kept whose worker had a memory that may have been wrong (``poisoned``) is no source: neither what it left of
its own state nor the mirrors of its guests, also if a replacement finds them there, until these ranks have executed a
plan and so brought new ones. The mirror of its own state at *its* host is one: it was right when it was copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, Rank, Step
from megatron_flashrecovery.core.reports import Report, Update
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.core.shares import Share, Source


@dataclass(frozen=True)
class Origin:
    """Where one rank's state comes from. ``unique_from`` is who sends the unique pieces beside a peer's state."""

    source: Source
    giver: Rank | None = None
    unique_from: Rank | None = None

    def __str__(self) -> str:
        match self.source:
            case Source.LIVE:
                return "live memory"
            case Source.OWN:
                return "own snapshot"
            case Source.MIRROR:
                return f"mirror at rank {self.giver}"
            case Source.PEER:
                values = "own snapshot" if self.unique_from is None else f"mirror at rank {self.unique_from}"
                return f"peer rank {self.giver}, values from {values}"


@dataclass(frozen=True)
class Holdings:
    """What a plan may draw on: the reports, what agents kept of replaced workers, how often sources have failed, whose
    copies may be wrong, and who has brought new ones of which step."""

    census: Census
    vault: Mapping[Rank, tuple[Step, ...]] = field(default_factory=dict)
    failed: Mapping[tuple[Rank, Origin, Step], int] = field(default_factory=dict)
    poisoned: AbstractSet[Rank] = frozenset()
    renewed: AbstractSet[tuple[Rank, Step]] = frozenset()

    def trusts(self, keeper: Rank, rank: Rank, step: Step) -> bool:
        """Whether what ``keeper`` has of the state of ``rank`` counts."""
        return keeper not in self.poisoned or (rank, step) in self.renewed


@dataclass(frozen=True)
class RecoveryPlan:
    """Everything that the job does in one recovery. ``origin_of`` names whoever is not restored from live memory."""

    epoch: Epoch
    resume_step: Step
    regather: bool
    rebuild: Mapping[GroupKey, str]
    kept: int
    origin_of: Mapping[Rank, Origin]
    shares_of: Mapping[NodeId, tuple[Share, ...]]


@dataclass(frozen=True)
class Unrecoverable:
    """No step can be produced by every rank; ``orphans`` cannot produce ``step``, the best one. ``step`` is ``None`` if
    nobody holds anything."""

    step: Step | None
    orphans: tuple[Rank, ...]

    def __str__(self) -> str:
        if self.step is None:
            return "no copy of any step is left"
        shown = ", ".join(str(rank) for rank in self.orphans[:8])
        more = f" and {len(self.orphans) - 8} more" if len(self.orphans) > 8 else ""
        return f"no copy of step {self.step} is left of rank {shown}{more}"


LIVE = Origin(Source.LIVE)
OWN = Origin(Source.OWN)
_GIVEN_UP = 2


def plan_recovery(epoch: Epoch, seats: Seats, holdings: Holdings) -> RecoveryPlan | Unrecoverable:
    """Resume at the newest step that every rank can produce. Call it when nobody moves and every seat is filled."""
    best = Unrecoverable(None, tuple(sorted(seats.node_of)))
    find = _sharded if seats.sharded else _replicated
    for step in sorted(_steps(holdings), reverse=True):
        origin_of: dict[Rank, Origin] = {}
        orphans: list[Rank] = []
        for rank in seats.node_of:
            origin = _most_trusted(holdings, rank, step, find(holdings, rank, step))
            if origin is None:
                orphans.append(rank)
            elif origin is not LIVE:
                origin_of[rank] = origin
        if not orphans:
            return _write_plan(epoch, seats, holdings.census, step, origin_of)
        if best.step is None or len(orphans) < len(best.orphans):
            best = Unrecoverable(step, tuple(sorted(orphans)))
    return best


def _most_trusted(holdings: Holdings, rank: Rank, step: Step, origins: Iterable[Origin]) -> Origin | None:
    if not holdings.failed:
        return next(iter(origins), None)
    failures = [(holdings.failed.get((rank, origin, step), 0), origin) for origin in origins]
    fewest, origin = min(failures, key=lambda failure: failure[0], default=(_GIVEN_UP, None))
    return origin if fewest < _GIVEN_UP else None


def _steps(holdings: Holdings) -> set[Step]:
    steps = {step for kept in holdings.vault.values() for step in kept}
    for report in holdings.census.reports.values():
        steps.update(report.own)
        for kept in report.guests.values():
            steps.update(kept)
    return steps


def is_live(report: Report | None, step: Step, sharded: bool) -> bool:
    """Whether live memory is the state of ``step``, together with the own copy of what the step itself changes."""
    if report is None or step not in report.own:
        return False
    if report.step == step:
        return report.update in (Update.BEFORE, Update.ARMED)
    return not sharded and report.step + 1 == step and report.update is Update.APPLIED


def _sharded(holdings: Holdings, rank: Rank, step: Step) -> Iterator[Origin]:
    report, trusted = holdings.census.reports.get(rank), holdings.trusts(rank, rank, step)
    if trusted and is_live(report, step, sharded=True):
        yield LIVE
    if trusted and report is not None and step in report.own:
        yield OWN
    host = holdings.census.seats.host_of.get(rank)
    if _has_mirror(holdings, rank, host, step):
        yield Origin(Source.MIRROR, giver=host)
    if trusted and report is None and step in holdings.vault.get(rank, ()):
        yield OWN


def _replicated(holdings: Holdings, rank: Rank, step: Step) -> Iterator[Origin]:
    census = holdings.census
    report, trusted = census.reports.get(rank), holdings.trusts(rank, rank, step)
    if trusted and is_live(report, step, sharded=False):
        yield LIVE
        return
    peers = [
        peer
        for peer in census.seats.peers_of.get(rank, ())
        if peer != rank and holdings.trusts(peer, peer, step) and is_live(census.reports.get(peer), step, sharded=False)
    ]
    values: list[Rank | None] = []
    if trusted and report is not None and step in report.own:
        values.append(None)
    host = census.seats.host_of.get(rank)
    if _has_mirror(holdings, rank, host, step):
        values.append(host)
    if trusted and report is None and step in holdings.vault.get(rank, ()):
        values.append(None)
    for unique_from in values:
        # Start at a different peer for each rank: one giver should not serve a whole node.
        for turn in range(len(peers)):
            yield Origin(Source.PEER, peers[(rank + turn) % len(peers)], unique_from)


def _has_mirror(holdings: Holdings, rank: Rank, host: Rank | None, step: Step) -> bool:
    report = None if host is None else holdings.census.reports.get(host)
    if report is None or host is None or not holdings.trusts(host, rank, step):
        return False
    return step in report.guests.get(rank, ())


def _write_plan(
    epoch: Epoch, seats: Seats, census: Census, step: Step, origin_of: Mapping[Rank, Origin]
) -> RecoveryPlan:
    rebuild = census.rebuild()
    rebuild_at: defaultdict[Rank, list[GroupKey]] = defaultdict(list)
    for key in rebuild:
        for rank in seats.members_of[key]:
            rebuild_at[rank].append(key)
    mirror_to: defaultdict[Rank, list[Rank]] = defaultdict(list)
    state_to: defaultdict[Rank, list[Rank]] = defaultdict(list)
    for rank, origin in sorted(origin_of.items()):
        if origin.source is Source.MIRROR and origin.giver is not None:
            mirror_to[origin.giver].append(rank)
        if origin.source is Source.PEER and origin.giver is not None:
            state_to[origin.giver].append(rank)
        if origin.unique_from is not None:
            mirror_to[origin.unique_from].append(rank)
    shares_of: defaultdict[NodeId, list[Share]] = defaultdict(list)
    for rank in sorted(seats.node_of):
        origin = origin_of.get(rank, LIVE)
        share = Share(
            rank,
            origin.source,
            giver=origin.giver,
            unique_from=origin.unique_from,
            gives_mirror_to=tuple(mirror_to.get(rank, ())),
            gives_state_to=tuple(state_to.get(rank, ())),
            rebuild=tuple(rebuild_at.get(rank, ())),
            host=seats.host_of.get(rank),
            guests=tuple(seats.guests_of.get(rank, ())),
        )
        shares_of[seats.node_of[rank]].append(share)
    return RecoveryPlan(
        epoch,
        step,
        regather=bool(seats.sharded),
        rebuild=rebuild,
        kept=len(seats.members_of) - len(rebuild),
        origin_of=dict(sorted(origin_of.items())),
        shares_of={node: tuple(shares) for node, shares in sorted(shares_of.items())},
    )
