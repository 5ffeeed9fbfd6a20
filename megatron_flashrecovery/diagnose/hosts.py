"""A topology whose ranks are hosts, for what is measured of a host as a whole.

One number for each rank of a host would count eight times what was measured once, and noise of one host would look
like a fault of it. What is inside of a host, and communicators, no such measurement can tell apart.
"""

from __future__ import annotations

import numpy as np

from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.topology import Indices, Topology

_KINDS = frozenset({Kind.HOST, Kind.LEAF, Kind.SPINE, Kind.POWER})


def of_hosts(topology: Topology, hosts: Indices) -> Topology:
    """``hosts``: (world,) the number of the host of each rank, from 0 on without gaps. Its elements are hosts and what
    is above them; an element reaches a host if it reaches one of its ranks."""
    kept = [k for k, element in enumerate(topology.elements) if element.kind in _KINDS]
    reach = [np.unique(hosts[topology.ranks_of(k)]) for k in kept]
    number = np.full(len(topology.elements), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    edges = number[topology.edges.reshape(-1, 2)]
    itself = np.full(int(hosts.max(initial=-1)) + 1, -1, dtype=np.int64)
    for k, element in enumerate(kept):
        if topology.elements[element].kind is Kind.HOST:
            itself[reach[k]] = k
    return Topology(
        elements=tuple(topology.elements[k] for k in kept),
        start=np.cumsum([0, *(each.size for each in reach)], dtype=np.int64),
        ranks=np.concatenate(reach) if reach else np.empty(0, dtype=np.int64),
        edges=edges[(edges >= 0).all(axis=1)],
        device_of=itself,
    )
