"""Where the ranks of a recorded job sit, and what they hang on: by a description, by the record, or by neither."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.diagnose.assembly import assemble
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Place, Placement
from megatron_flashrecovery.diagnose.communicators import communicators_of
from megatron_flashrecovery.diagnose.topology import Topology
from megatron_flashrecovery.runtime.dossier import Dossier


@dataclass(frozen=True, eq=False)
class Surroundings:
    """``source`` says in words where the topology is from."""

    topology: Topology
    source: str


def surroundings_of(dossier: Dossier, file: Path | None, environment: Mapping[str, str]) -> Surroundings:
    """Raises ``ConfigError`` if the file is no description."""
    cluster, source = _recorded(dossier)
    groups = {str(key): ranks for key, ranks in dossier.groups.items()}
    return Surroundings(assemble(cluster, placement_of(dossier), communicators_of(groups)), source)


def placement_of(dossier: Dossier) -> Placement:
    return Placement(tuple(Place(dossier.host_of[rank], dossier.local[rank]) for rank in sorted(dossier.host_of)))


def _recorded(dossier: Dossier) -> tuple[Cluster, str]:
    """By what SLURM told the nodes: ``spine0.leaf3.n17``, the outermost switch first."""
    hosts, above = [], {}
    for host, address in dossier.switches.items():
        *switches, _ = address.split(".")
        if switches:
            hosts.append(HostWiring(host, leaves=(switches[-1],)))
        for upper, lower in itertools.pairwise(switches):
            above[lower] = (upper,)
    if not hosts:
        return Cluster(), "nothing is known of switches and power: give --topology"
    return Cluster(tuple(hosts), above), "switches by SLURM_TOPOLOGY_ADDR of the nodes"
