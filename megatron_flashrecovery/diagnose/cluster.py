"""The hardware of a cluster as a description has it, whoever wrote it: hosts, what is in them and what they hang on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_flashrecovery.core.errors import ConfigError


@dataclass(frozen=True)
class Nic:
    """``leaves``: the switches at its ports; none if those of its host are meant."""

    name: str
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostWiring:
    """``nics``: by number of the device that uses each; None, or missing at the end, where that is not known."""

    name: str
    leaves: tuple[str, ...] = ()
    power: tuple[str, ...] = ()
    nics: tuple[Nic | None, ...] = ()

    def nic_of(self, device: int) -> Nic | None:
        return self.nics[device] if 0 <= device < len(self.nics) else None


@dataclass(frozen=True)
class Cluster:
    """``above``: the switches over a switch. All that have a host or NIC are leaves, the others are spines.

    Raises ``ConfigError`` if a host is named twice, or a switch is above itself."""

    hosts: tuple[HostWiring, ...] = ()
    above: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [host.name for host in self.hosts]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"host {twice} is described twice: keep one of the descriptions")
        for switch in self.above:
            if switch in self.all_above((switch,)):
                raise ConfigError(f"switch {switch} is above itself: take one of its links out")

    def all_above(self, switches: tuple[str, ...]) -> tuple[str, ...]:
        """Everything that is reached from these by going up, without themselves; each once, the nearest first."""
        found: dict[str, None] = {}
        waiting = list(switches)
        while waiting:
            for upper in self.above.get(waiting.pop(0), ()):
                if upper not in found:
                    found[upper] = None
                    waiting.append(upper)
        return tuple(found)

    def leaves(self) -> frozenset[str]:
        of_nics = {leaf for host in self.hosts for nic in host.nics if nic is not None for leaf in nic.leaves}
        return frozenset(of_nics.union(*(host.leaves for host in self.hosts)))

    def by_name(self) -> Mapping[str, HostWiring]:
        """By full name, and by the name before the first dot where only one host has it."""
        short: dict[str, list[HostWiring]] = {}
        for host in self.hosts:
            short.setdefault(host.name.partition(".")[0], []).append(host)
        found = {name: hosts[0] for name, hosts in short.items() if len(hosts) == 1}
        return found | {host.name: host for host in self.hosts}


class Place(NamedTuple):
    """``device``: its number on the host, -1 where that is not known."""

    host: str
    device: int

    def __str__(self) -> str:
        return f"{self.host}/{self.device}"


@dataclass(frozen=True)
class Placement:
    """Where each rank sits, by rank."""

    places: tuple[Place, ...]

    @classmethod
    def regular(cls, hosts: Sequence[str], devices_per_host: int) -> Placement:
        """Ranks in the order of the hosts, as launchers assign them."""
        return cls(tuple(Place(host, device) for host in hosts for device in range(devices_per_host)))


def wiring_of(cluster: Cluster, placement: Placement) -> Mapping[str, HostWiring]:
    """For each host of the job what is known of it; a host that is not described has its name only."""
    known = cluster.by_name()
    found = {}
    for name in dict.fromkeys(place.host for place in placement.places):
        host = known.get(name) or known.get(name.partition(".")[0])
        found[name] = host or HostWiring(name)
    return found
