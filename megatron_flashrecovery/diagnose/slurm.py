"""Wiring as SLURM knows it: the tree in ``topology.conf`` or ``scontrol show topology``, and where one node is in it.

Sources: slurm.schedmd.com/topology.conf.html, and SLURM_TOPOLOGY_ADDR and SLURM_TOPOLOGY_ADDR_PATTERN in
slurm.schedmd.com/sbatch.html.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring
from megatron_flashrecovery.diagnose.host_names import expand

_REMEDY = "only the tree plugin is read, write a topology file instead (docs/diagnose.md)"
_NOBODY = ("", "(null)")


def parse_topology(text: str, source: str = "topology.conf") -> Cluster:
    """Either of the two: the second names at each switch also all nodes below it, which says nothing new.

    Raises ``ConfigError``, with the line, for what is no such text."""
    leaves: dict[str, list[str]] = {}
    above: dict[str, list[str]] = {}
    for number, line in _lines(text):
        where = f"{source} line {number}"
        fields = _fields(line, where)
        try:
            switches, below = _names(fields, "switchname"), _names(fields, "switches")
            nodes = () if below else _names(fields, "nodes")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if len(switches) != 1:
            raise ConfigError(f"{where}: SwitchName has to be one name, write one line for each switch")
        if not below and not nodes:
            raise ConfigError(f"{where}: switch {switches[0]} has neither Nodes nor Switches, add what is below it")
        for node in nodes:
            leaves.setdefault(node, []).append(switches[0])
        for switch in below:
            above.setdefault(switch, []).append(switches[0])
    if not leaves:
        raise ConfigError(f"{source} names no nodes: {_REMEDY}")
    return Cluster(
        tuple(HostWiring(node, tuple(dict.fromkeys(switches))) for node, switches in leaves.items()),
        {switch: tuple(dict.fromkeys(upper)) for switch, upper in above.items()},
    )


def cluster_of_addresses(addresses: Mapping[str, tuple[str, str]]) -> Cluster:
    """By host, what its node was told: SLURM_TOPOLOGY_ADDR (``spine0.leaf1.node7``) and its pattern
    (``switch.switch.node``), which is just ``node`` where SLURM knows of no topology. A level may be a list.

    Raises ``ConfigError`` where the two do not go together."""
    hosts, above = [], dict[str, tuple[str, ...]]()
    for host, (address, pattern) in addresses.items():
        kinds = pattern.split(".")
        levels = address.split(".", len(kinds) - 1)
        if len(levels) != len(kinds) or kinds[-1] != "node":
            raise ConfigError(f"SLURM_TOPOLOGY_ADDR {address!r} of {host} is not of its pattern {pattern!r}: {_REMEDY}")
        switches = [expand(level) for level, kind in zip(levels, kinds, strict=True) if kind == "switch" and level]
        hosts.append(HostWiring(host, switches[-1] if switches else ()))
        for upper, lower in itertools.pairwise(switches):
            for switch in lower:
                above[switch] = tuple(dict.fromkeys((*above.get(switch, ()), *upper)))
    return Cluster(tuple(hosts), above)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """With the number of the first line of each; without comments, and joined where a line ends in a backslash."""
    begun, waiting = 0, ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].rstrip()
        begun = begun if waiting else number
        if line.endswith("\\"):
            waiting += line[:-1] + " "
            continue
        if whole := (waiting + line).strip():
            yield begun, whole
        waiting = ""
    if waiting.strip():
        yield begun, waiting.strip()


def _fields(line: str, where: str) -> dict[str, str]:
    fields = {}
    for word in line.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{where}: {word!r} is not of the form key=value, without spaces in a list")
        fields[key.lower()] = value
    if "switchname" not in fields:
        raise ConfigError(f"{where}: no SwitchName, it begins with {line.split()[0]}: {_REMEDY}")
    return fields


def _names(fields: Mapping[str, str], key: str) -> tuple[str, ...]:
    value = fields.get(key, "")
    return () if value in _NOBODY else expand(value)
