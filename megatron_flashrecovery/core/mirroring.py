"""Which rank keeps whose second copy.

A *domain* is what fails at once: a node, or a process where copies of one node are accepted. Guests are placed so that
  1. a host is in another domain than its guest,
  2. the fullest host has as few guests as that allows: one, unless a node holds more than half of all ranks,
  3. the host is a data-parallel peer where possible: it can compare what it gets with what it has.

Where no domain holds more than half of a data-parallel group, the group is a ring: sorted by domain, and shifted by the
size of its largest one, every member lands in another domain. This needs only the group (``ring``), so a rank can
compute its own host. What is left over (peers all on one node, no peers) forms rings across groups; when one domain
dominates even the left-overs, it trades places with finished pairs outside of it. That needs the whole map:
``place_mirrors`` costs O(n log n) for n ranks and is for start-up and ``flashrecovery plan``, not for a recovery.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron_flashrecovery.core.ids import NodeId, Rank

FailureDomain: TypeAlias = Literal["node", "process"]
Domain: TypeAlias = "NodeId | Rank"


@dataclass(frozen=True)
class Placement:
    """``warnings`` are one line each, for whoever started the job."""

    host_of: Mapping[Rank, Rank]
    warnings: tuple[str, ...] = ()

    def guests_of(self) -> dict[Rank, tuple[Rank, ...]]:
        guests: dict[Rank, list[Rank]] = defaultdict(list)
        for guest, host in self.host_of.items():
            guests[host].append(guest)
        return {host: tuple(sorted(ranks)) for host, ranks in guests.items()}


@dataclass(frozen=True)
class NoHost:
    """There is nowhere to put a second copy, and why; not an exception, because a job may be run without one."""

    reason: str


def place_mirrors(
    peers: Mapping[Rank, tuple[Rank, ...]], node_of: Mapping[Rank, NodeId], failure_domain: FailureDomain = "node"
) -> Placement | NoHost:
    """``peers[rank]`` are the data-parallel peers of a rank, itself included; the same for each of them.

    ``failure_domain="process"`` accepts a host on the same node where another node would get more than its share.
    """
    if len(node_of) < 2:
        return NoHost("the job has one rank: its state has no second copy, use at least two ranks")
    sizes = Counter(node_of.values())
    largest_node, largest = max(sizes.items(), key=lambda item: (item[1], item[0]))
    lopsided = 2 * largest > len(node_of)
    groups = sorted({tuple(sorted(group)) for group in peers.values()})
    if len(sizes) == 1 or (lopsided and failure_domain == "process"):
        by_process: Callable[[Rank], Domain] = lambda rank: rank  # noqa: E731
        host_of = _one_guest_each(groups, by_process)
    elif lopsided:
        host_of = _crowded(peers, node_of, largest_node)
    else:
        host_of = _one_guest_each(groups, node_of.__getitem__)
    return Placement(host_of, warnings_of(host_of, peers, node_of))


def warnings_of(
    host_of: Mapping[Rank, Rank], peers: Mapping[Rank, tuple[Rank, ...]], node_of: Mapping[Rank, NodeId]
) -> tuple[str, ...]:
    """What is poor about these hosts, one line each."""
    found = []
    if beside := [rank for rank, host in host_of.items() if node_of[rank] == node_of[host]]:
        ranks = f"{len(beside)} of {len(host_of)} ranks have" if len(beside) > 1 else f"rank {beside[0]} has"
        found.append(
            f"{ranks} the second copy on the node of the first: the loss of that node is not survived, use more nodes"
        )
    if alone := sum(len(group) == 1 for group in peers.values()):
        found.append(
            f"{alone} of {len(host_of)} ranks have no data-parallel peer: their whole state is mirrored every step"
        )
    if (most := max(Counter(host_of.values()).values())) > 1:
        found.append(
            f"some hosts keep {most} guests, as one node holds more than half of all ranks: use nodes of equal size"
        )
    return tuple(found)


def ring(members: Sequence[Rank], domain_of: Callable[[Rank], Domain]) -> dict[Rank, Rank] | None:
    """A host in another domain for each member, one guest each; None if one domain holds more than half of them.

    Within a group that gets a ring this is what ``place_mirrors`` chooses too, unless left-overs had to trade places.
    """
    by_domain = _sorted_by_domain(members, domain_of)
    shift = max(Counter(domain_of(rank) for rank in members).values())
    if 2 * shift > len(by_domain):
        return None
    return {guest: by_domain[(at + shift) % len(by_domain)] for at, guest in enumerate(by_domain)}


def _one_guest_each(groups: Sequence[tuple[Rank, ...]], domain_of: Callable[[Rank], Domain]) -> dict[Rank, Rank]:
    """For jobs in which no domain holds more than half of all ranks."""
    host_of: dict[Rank, Rank] = {}
    left_over: list[Rank] = []
    for group in groups:
        paired, alone = _within_group(group, domain_of)
        host_of.update(paired)
        left_over.extend(alone)
    rest = left_over and ring(left_over, domain_of)
    if rest:
        host_of.update(rest)
    elif left_over:
        _trade_places(host_of, left_over, domain_of)
    return host_of


def _within_group(
    group: Sequence[Rank], domain_of: Callable[[Rank], Domain]
) -> tuple[dict[Rank, Rank], tuple[Rank, ...]]:
    """Pairs inside the group, and the members that can neither host nor be hosted in it: all of one domain."""
    if (whole := ring(group, domain_of)) is not None:
        return whole, ()
    crowd = Counter(domain_of(rank) for rank in group).most_common(1)[0][0]
    inside = sorted(rank for rank in group if domain_of(rank) == crowd)
    outside = sorted(rank for rank in group if domain_of(rank) != crowd)
    pairs = dict(zip(inside, outside, strict=False)) | dict(zip(outside, inside, strict=False))
    return pairs, tuple(inside[len(outside) :])


def _trade_places(host_of: dict[Rank, Rank], left_over: Sequence[Rank], domain_of: Callable[[Rank], Domain]) -> None:
    """One domain holds more than half of the left-overs: some of its ranks take over a pair outside of it.

    ``a -> b`` and the left-over ``x`` become ``a -> x`` and ``x -> b``. There are enough such pairs, as the domain
    holds at most half of all ranks; the other left-overs find their partners among the crowd.
    """
    crowd = Counter(domain_of(rank) for rank in left_over).most_common(1)[0][0]
    inside = sorted(rank for rank in left_over if domain_of(rank) == crowd)
    outside = sorted(rank for rank in left_over if domain_of(rank) != crowd)
    pairs = [(a, b) for a, b in sorted(host_of.items()) if crowd not in (domain_of(a), domain_of(b))]
    host_of.update(zip(inside, outside, strict=False))
    host_of.update(zip(outside, inside, strict=False))
    for x, (a, b) in zip(inside[len(outside) :], pairs, strict=False):
        host_of[a] = x
        host_of[x] = b


def _crowded(
    peers: Mapping[Rank, tuple[Rank, ...]], node_of: Mapping[Rank, NodeId], crowded_node: NodeId
) -> dict[Rank, Rank]:
    """One node holds more than half of all ranks: the others share its guests as evenly as can be."""
    inside = sorted(rank for rank in node_of if node_of[rank] == crowded_node)
    outside = sorted(rank for rank in node_of if node_of[rank] != crowded_node)
    most = -(-len(inside) // len(outside))
    return {
        **_spread(inside, outside, peers, most),
        **_spread(outside, inside, peers, 1),
    }


def _spread(
    guests: Sequence[Rank], hosts: Sequence[Rank], peers: Mapping[Rank, tuple[Rank, ...]], most: int
) -> dict[Rank, Rank]:
    """Peers first, then whoever has room; ``most`` guests for a host, and enough room for all."""
    room = dict.fromkeys(hosts, most)
    host_of: dict[Rank, Rank] = {}
    for guest in guests:
        candidates = [peer for peer in peers[guest] if room.get(peer, 0)]
        if candidates:
            host_of[guest] = max(candidates, key=lambda rank: (room[rank], -rank))
            room[host_of[guest]] -= 1
    free = [host for host in hosts for _ in range(room[host])]
    unplaced = [guest for guest in guests if guest not in host_of]
    return host_of | dict(zip(unplaced, free, strict=False))


def _sorted_by_domain(members: Sequence[Rank], domain_of: Callable[[Rank], Domain]) -> list[Rank]:
    members_of: dict[Domain, list[Rank]] = defaultdict(list)
    for rank in sorted(members):
        members_of[domain_of(rank)].append(rank)
    return [rank for ranks in members_of.values() for rank in ranks]
