"""A topology from a description of the hardware, where the ranks sit, and the communicators of the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Place, Placement, wiring_of
from megatron_flashrecovery.diagnose.communicators import Communicator
from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.topology import Topology

_KINDS = (Kind.DEVICE, Kind.NIC, Kind.HOST, Kind.LEAF, Kind.SPINE, Kind.POWER)
_DEVICE, _NIC, _HOST, _LEAF, _SPINE, _POWER = range(len(_KINDS))
# While a large topology is built, a kind is a number: hashing an enum takes twenty times as long.
_Part = tuple[int, str]
_Link = tuple[_Part, _Part | None]


def assemble(cluster: Cluster, placement: Placement, communicators: Sequence[Communicator] = ()) -> Topology:
    """Only what a rank of the job depends on becomes an element: first the hardware, from devices up to power domains,
    each kind in the order of the ranks, then the communicators as they are given. O(world * elements of a rank).

    A host without a description is there with its devices and nothing above. Elements that reach the same ranks (a host
    with one device, a switch with one host) are all there: whether they can be told apart is for a diagnosis to say.
    Raises ``ConfigError`` if a communicator holds a rank that has no place."""
    for each in communicators:
        if each.ranks[-1] >= len(placement.places):
            raise ConfigError(
                f"{each.kind} {each.name} holds rank {each.ranks[-1]}, but only {len(placement.places)} ranks have a "
                "place: give the host of every rank"
            )
    reach, links = _reach_and_links(cluster, placement)
    parts = sorted(reach, key=lambda part: part[0])
    number = {part: k for k, part in enumerate(parts)}
    lists = [reach[part] for part in parts] + [list(each.ranks) for each in communicators]
    hardware = tuple(Element(_KINDS[kind], name) for kind, name in parts)
    return Topology(
        elements=hardware + tuple(Element(each.kind, each.name) for each in communicators),
        start=np.cumsum([0, *(len(ranks) for ranks in lists)], dtype=np.int64),
        ranks=np.array([rank for ranks in lists for rank in ranks], dtype=np.int64),
        edges=np.array([(number[a], number[b]) for a, b in links if b is not None], dtype=np.int64).reshape(-1, 2),
        device_of=np.array([number.get((_DEVICE, str(place)), -1) for place in placement.places], dtype=np.int64),
    )


def _reach_and_links(cluster: Cluster, placement: Placement) -> tuple[dict[_Part, list[int]], dict[_Link, None]]:
    """The ranks of each part, sorted, and what is next to what."""
    wiring, leaves = wiring_of(cluster, placement), cluster.leaves()
    reach: dict[_Part, list[int]] = {}
    links: dict[_Link, None] = {}
    for rank, place in enumerate(placement.places):
        own = list(_links(cluster, leaves, wiring[place.host], place))
        for part in dict.fromkeys(end for link in own for end in link if end is not None):
            reach.setdefault(part, []).append(rank)
        links.update(dict.fromkeys(own))
    return reach, links


def _links(cluster: Cluster, leaf_names: AbstractSet[str], wiring: HostWiring, place: Place) -> Iterator[_Link]:
    """Everything that a rank at this place depends on, by what it is next to."""
    host, device = (_HOST, place.host), (_DEVICE, str(place))
    yield host, None
    if place.device >= 0:
        yield device, host
    nic = wiring.nic_of(place.device)
    leaves = (nic.leaves if nic is not None else ()) or wiring.leaves
    port = host
    if nic is not None:
        port = _NIC, f"{place.host}/{nic.name}"
        yield device, port
        yield port, host
    for leaf in leaves:
        yield port, (_LEAF, leaf)
    for switch in (*leaves, *cluster.all_above(leaves)):
        for upper in cluster.above.get(switch, ()):
            yield _switch(switch, leaf_names), _switch(upper, leaf_names)
    for domain in wiring.power:
        yield host, (_POWER, domain)


def _switch(name: str, leaf_names: AbstractSet[str]) -> _Part:
    return (_LEAF if name in leaf_names else _SPINE), name
