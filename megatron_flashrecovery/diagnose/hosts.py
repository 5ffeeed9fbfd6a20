"""A topology whose ranks are hosts, for what is measured of a host as a whole.

One number for each rank of a host would count eight times what was measured once, and noise of one host would look
like a fault of it. What is inside of a host, and communicators, no such measurement can tell apart.
"""

from __future__ import annotations

import numpy as np

from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.topology import Indices, Topology

_KINDS = frozenset({Kind.HOST, Kind.LEAF, Kind.SPINE, Kind.POWER})
_INSIDE = frozenset({Kind.DEVICE, Kind.NIC})


def of_hosts(topology: Topology, hosts: Indices) -> Topology:
    """``hosts``: (world,) the number of the host of each rank, from 0 on without gaps. Its elements are hosts and what
    is above them; an element reaches a host if it reaches one of its ranks. Wires of what is inside of a host become
    its own."""
    kept = [k for k, element in enumerate(topology.elements) if element.kind in _KINDS]
    reach = [np.unique(hosts[topology.ranks_of(k)]) for k in kept]
    itself = np.full(int(hosts.max(initial=-1)) + 1, -1, dtype=np.int64)
    for k, element in enumerate(kept):
        if topology.elements[element].kind is Kind.HOST:
            itself[reach[k]] = k
    number = np.full(len(topology.elements), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    for k, each in enumerate(topology.elements):
        if each.kind in _INSIDE:
            number[k] = itself[hosts[topology.ranks_of(k)[0]]]
    edges = np.unique(np.sort(number[topology.edges.reshape(-1, 2)], axis=1), axis=0)
    edges = edges[(edges[:, 0] >= 0) & (edges[:, 0] < edges[:, 1])]
    return Topology(
        elements=tuple(topology.elements[k] for k in kept),
        start=np.cumsum([0, *(each.size for each in reach)], dtype=np.int64),
        ranks=np.concatenate(reach) if reach else np.empty(0, dtype=np.int64),
        edges=edges,
        device_of=itself,
    )
