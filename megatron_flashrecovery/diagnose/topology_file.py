"""The topology file: wiring as people write it down, in JSON. Its format is in ``docs/diagnose.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring, Nic
from megatron_flashrecovery.diagnose.host_names import expand

VERSION = 1
_SEE = "see 'topology file' in docs/diagnose.md"
_Names = str | list[str]


class _Nic(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    leaf: _Names = []


class _Hosts(msgspec.Struct, forbid_unknown_fields=True):
    names: _Names
    leaf: _Names = []
    power: _Names = []
    nics: list[str | _Nic | None] = []


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    hosts: list[_Hosts]
    switches: dict[str, _Names] = {}


def parse_topology_file(text: str, source: str) -> Cluster:
    """Raises ``ConfigError``, with the line or the field and what to do about it."""
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
        file = msgspec.convert(content, _File)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} line {error.lineno} column {error.colno} is no JSON ({error.msg}): correct it there or before"
        ) from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        field = path.strip("`").removeprefix("$").lstrip(".") or "the file"
        raise ConfigError(f"{source}: {field}: {message[:1].lower()}{message[1:]}: {_SEE}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if file.version != VERSION:
        raise ConfigError(f"{source}: version {file.version} is not known here, write version {VERSION}: {_SEE}")
    try:
        return _cluster(file)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def write_topology_file(cluster: Cluster) -> str:
    """What ``parse_topology_file`` reads, one line for each host: a beginning for who wants to write down more."""
    hosts = ",\n".join(f"    {json.dumps(_host_content(host))}" for host in cluster.hosts)
    switches = json.dumps({switch: list(upper) for switch, upper in cluster.above.items()})
    return f'{{\n  "version": {VERSION},\n  "hosts": [\n{hosts}\n  ],\n  "switches": {switches}\n}}\n'


def _cluster(file: _File) -> Cluster:
    hosts = tuple(host for k, each in enumerate(file.hosts) for host in _hosts(each, f"hosts[{k}]"))
    above: dict[str, tuple[str, ...]] = {}
    for names, upper in file.switches.items():
        for switch in expand(names):
            above[switch] = (*above.get(switch, ()), *_expanded(upper))
    cluster = Cluster(hosts, above)
    reached = {*cluster.leaves(), *cluster.all_above(tuple(cluster.leaves()))}
    for switch in above:
        if switch not in reached:
            raise ConfigError(f"switches: {switch} has nothing below it: name it as the leaf of a host, or take it out")
    return cluster


def _hosts(each: _Hosts, field: str) -> Iterator[HostWiring]:
    try:
        leaves, power = _expanded(each.leaf), _expanded(each.power)
        nics = tuple(_nic(nic) for nic in each.nics)
        for name in _expanded(each.names):
            yield HostWiring(name, leaves, power, nics)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None


def _nic(nic: str | _Nic | None) -> Nic | None:
    if isinstance(nic, _Nic):
        return Nic(nic.name, _expanded(nic.leaf))
    return None if nic is None else Nic(nic)


def _expanded(names: _Names) -> tuple[str, ...]:
    return tuple(each for part in ([names] if isinstance(names, str) else names) for each in expand(part))


def _host_content(host: HostWiring) -> dict[str, object]:
    nics = [nic and ({"name": nic.name, "leaf": list(nic.leaves)} if nic.leaves else nic.name) for nic in host.nics]
    parts = {"leaf": list(host.leaves), "power": list(host.power), "nics": nics}
    return {"names": host.name} | {key: value for key, value in parts.items() if value}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice!r} is there twice in one object: keep one of them")
    return found
