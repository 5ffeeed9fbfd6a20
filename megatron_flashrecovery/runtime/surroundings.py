"""Where the ranks of a recorded job sit, and what they hang on: by a description, by the record, or by neither."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.assembly import assemble
from megatron_flashrecovery.diagnose.cluster import Cluster, Place, Placement
from megatron_flashrecovery.diagnose.communicators import communicators_of
from megatron_flashrecovery.diagnose.description import read_description
from megatron_flashrecovery.diagnose.host_names import guess_racks
from megatron_flashrecovery.diagnose.slurm import cluster_of_addresses, parse_topology
from megatron_flashrecovery.diagnose.topology import Topology
from megatron_flashrecovery.runtime.dossier import Dossier

_ASK = ("scontrol", "show", "topology")
_ANSWERS_WITHIN = 10.0


@dataclass(frozen=True, eq=False)
class Surroundings:
    """``source`` says in words where the topology is from."""

    topology: Topology
    source: str


def surroundings_of(dossier: Dossier, file: Path | None, environment: Mapping[str, str]) -> Surroundings:
    """The first that knows a host of the job: the file, the SLURM whose allocation this is, what SLURM told the nodes
    when the job ran, the names of hosts. Raises ``ConfigError`` if the file is no description, or knows no host."""
    hosts = tuple(dict.fromkeys(dossier.host_of.values()))
    cluster, source = _described(file, hosts) if file is not None else _found(dossier, hosts, environment)
    groups = {str(key): ranks for key, ranks in dossier.groups.items()}
    return Surroundings(assemble(cluster, placement_of(dossier), communicators_of(groups)), source)


def placement_of(dossier: Dossier) -> Placement:
    return Placement(tuple(Place(dossier.host_of[rank], dossier.local[rank]) for rank in sorted(dossier.host_of)))


def _described(file: Path, hosts: tuple[str, ...]) -> tuple[Cluster, str]:
    cluster = read_description(file)
    known = _known(cluster, hosts)
    if not known:
        raise ConfigError(f"--topology {file} knows none of the hosts of this job, as {hosts[0]}: name them as they do")
    left_out = len(hosts) - known
    return cluster, f"topology from {file}" + (f", which does not have {left_out} of the hosts" if left_out else "")


def _found(dossier: Dossier, hosts: tuple[str, ...], environment: Mapping[str, str]) -> tuple[Cluster, str]:
    if "SLURM_JOB_ID" in environment and (cluster := _of_slurm()) is not None and _known(cluster, hosts):
        return cluster, f"switches by `{' '.join(_ASK)}`"
    try:
        recorded = cluster_of_addresses(dossier.switches)
    except ConfigError:
        recorded = Cluster()
    if recorded.leaves():
        return recorded, "switches by what SLURM told the nodes (SLURM_TOPOLOGY_ADDR)"
    guessed = guess_racks(hosts)
    if guessed.leaves():
        return guessed, "racks guessed by the names of hosts: give --topology if these are not what hosts share"
    return guessed, "nothing is known of switches and power: give --topology"


def _known(cluster: Cluster, hosts: tuple[str, ...]) -> int:
    names = cluster.by_name()
    return sum(host in names or host.partition(".")[0] in names for host in hosts)


def _of_slurm() -> Cluster | None:
    """None if it does not answer, or has no tree."""
    try:
        said = subprocess.run(_ASK, capture_output=True, text=True, timeout=_ANSWERS_WITHIN, check=True).stdout
        return parse_topology(said, " ".join(_ASK))
    except (OSError, subprocess.SubprocessError, ConfigError):
        return None
