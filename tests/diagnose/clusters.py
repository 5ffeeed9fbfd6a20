"""Small clusters whose every element is known."""

from __future__ import annotations

from megatron_flashrecovery.core.layout import megatron_layout
from megatron_flashrecovery.diagnose.assembly import assemble
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Nic, Placement
from megatron_flashrecovery.diagnose.communicators import communicators_of, groups_of
from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.topology import Topology


def cluster_of(hosts: int, nics: int = 4, hosts_per_leaf: int = 4, leaves_per_spine: int = 2) -> Cluster:
    """Two hosts in turn share a power domain that no switch knows of."""
    return Cluster(
        hosts=tuple(
            HostWiring(
                name=f"n{k}",
                leaves=(f"leaf{k // hosts_per_leaf}",),
                power=(f"pdu{k % (hosts // 2)}",),
                nics=tuple(Nic(f"mlx5_{device // 2}") for device in range(nics * 2)),
            )
            for k in range(hosts)
        ),
        above={f"leaf{leaf}": (f"spine{leaf // leaves_per_spine}",) for leaf in range(-(-hosts // hosts_per_leaf))},
    )


def topology_of(hosts: int = 16, devices: int = 8, tensor: int = 4, pipeline: int = 4) -> Topology:
    cluster = cluster_of(hosts, devices // 2)
    placement = Placement.regular([host.name for host in cluster.hosts], devices)
    layout = megatron_layout(hosts * devices, tensor=tensor, pipeline=pipeline)
    return assemble(cluster, placement, communicators_of(groups_of(layout)))


def number_of(topology: Topology, kind: Kind, name: str) -> int:
    return topology.elements.index(Element(kind, name))


def reach_of(topology: Topology, kind: Kind, name: str) -> list[int]:
    return topology.ranks_of(number_of(topology, kind, name)).tolist()
