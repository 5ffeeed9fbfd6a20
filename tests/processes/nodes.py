"""A job of two nodes on one machine, each in a network of its own where that is permitted, and a router between them
that can be told to forward nothing."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.processes.launcher import Job, Running, started


@dataclass(frozen=True)
class Place:
    """Where a node is: what its commands begin with, and its address and interface."""

    prefix: tuple[str, ...]
    address: str
    interface: str


LOCAL = Place((), "127.0.0.1", "lo")


@dataclass(frozen=True)
class Network:
    """Of two nodes."""

    places: tuple[Place, Place]
    router: str

    def cut(self) -> None:
        """Nobody hears of it: what is sent is lost."""
        _ip("netns", "exec", self.router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=0")

    def join(self) -> None:
        _ip("netns", "exec", self.router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")


@contextmanager
def routed() -> Iterator[Network]:
    """Skips the test where network namespaces are not permitted."""
    base = f"fr{os.getpid() % 100000}"
    router = f"{base}r"
    with ExitStack() as undo:
        try:
            for name in (router, f"{base}n0", f"{base}n1"):
                _ip("netns", "add", name)
                undo.callback(_ip, "netns", "del", name)
            places = tuple(_connect(router, f"{base}n{node}", f"{base}v{node}", node) for node in (0, 1))
            network = Network((places[0], places[1]), router)
            network.join()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and iproute2: {error}")
        yield network


@dataclass(frozen=True)
class TwoNodes:
    """``port`` is that of the controller."""

    first: Running
    second: Running
    port: int


@contextmanager
def two_nodes(job: Job, log_dir: Path, places: tuple[Place, Place] = (LOCAL, LOCAL)) -> Iterator[TwoNodes]:
    """``job.ranks`` are those of each node."""
    port = free_port() if places[0] is LOCAL else 29517
    flags = ("--nnodes", "2", "--master-addr", places[0].address, "--master-port", str(port))
    with ExitStack() as stack:
        nodes = []
        for node, place in enumerate(places):
            environment = {"FLASHRECOVERY_TOKEN": "secret", "GLOO_SOCKET_IFNAME": place.interface}
            its_own = replace(
                job,
                flags=(*job.flags, *flags, "--node-rank", str(node)),
                environment={**job.environment, **environment},
            )
            nodes.append(stack.enter_context(started(its_own, log_dir / str(node), place.prefix)))
        yield TwoNodes(nodes[0], nodes[1], port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _connect(router: str, name: str, link: str, node: int) -> Place:
    """A cable between a node's namespace and the router."""
    ours, theirs, subnet = f"{link}a", f"{link}b", f"10.213.{node}"
    _ip("-n", name, "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", router)
    for namespace, end, address in ((name, ours, f"{subnet}.2"), (router, theirs, f"{subnet}.1")):
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", end)
        _ip("-n", namespace, "link", "set", end, "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", name, "route", "add", "default", "via", f"{subnet}.1")
    return Place(("ip", "netns", "exec", name), f"{subnet}.2", ours)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
