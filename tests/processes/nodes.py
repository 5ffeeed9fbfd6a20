"""A job of several nodes on one machine, each in a network of its own where that is permitted, and a router between
them that can be told to forward nothing."""

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
    places: tuple[Place, ...]
    router: str

    def cut(self) -> None:
        """Nobody hears of it: what is sent is lost."""
        _ip("netns", "exec", self.router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=0")

    def join(self) -> None:
        _ip("netns", "exec", self.router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")

    def cut_off(self, node: int) -> None:
        """One from all others, in both directions."""
        self._forward_of(node, "0")
        _ip("-n", self.router, "route", "add", "blackhole", f"{self.places[node].address}/32")

    def join_again(self, node: int) -> None:
        _ip("-n", self.router, "route", "del", "blackhole", f"{self.places[node].address}/32")
        self._forward_of(node, "1")

    def _forward_of(self, node: int, on: str) -> None:
        setting = f"net.ipv4.conf.{_far_end(self.places[node].interface)}.forwarding={on}"
        _ip("netns", "exec", self.router, "sysctl", "-q", "-w", setting)


@contextmanager
def routed(nodes: int = 2) -> Iterator[Network]:
    """Skips the test where network namespaces are not permitted."""
    base = f"fr{os.getpid() % 100000}"
    router = f"{base}r"
    with ExitStack() as undo:
        try:
            for name in (router, *(f"{base}n{node}" for node in range(nodes))):
                _ip("netns", "add", name)
                undo.callback(_ip, "netns", "del", name)
            places = tuple(_connect(router, f"{base}n{node}", f"{base}v{node}", node) for node in range(nodes))
            network = Network(places, router)
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
def two_nodes(job: Job, log_dir: Path, places: tuple[Place, ...] = (LOCAL, LOCAL)) -> Iterator[TwoNodes]:
    """``job.ranks`` are those of each node."""
    with several_nodes(job, log_dir, places=places) as several:
        yield TwoNodes(several.start(0), several.start(1), several.port)


class SeveralNodes:
    """Two nodes with seats, and spare ones; each begins when it is started. ``port`` is that of the controller."""

    def __init__(self, job: Job, log_dir: Path, spares: int, places: tuple[Place, ...], stack: ExitStack) -> None:
        self._job = job
        self._log_dir = log_dir
        self._places = places
        self._stack = stack
        self.port = free_port() if places[0] is LOCAL else 29517
        where = ("--master-addr", places[0].address, "--master-port", str(self.port))
        self._flags = ("--nnodes", "2", "--spare-nodes", str(spares), *where)

    def start(self, node: int) -> Running:
        place = self._places[node]
        environment = {"FLASHRECOVERY_TOKEN": "secret", "GLOO_SOCKET_IFNAME": place.interface}
        its_own = replace(
            self._job,
            flags=(*self._job.flags, *self._flags, "--node-rank", str(node)),
            environment={**self._job.environment, **environment},
        )
        return self._stack.enter_context(started(its_own, self._log_dir / str(node), place.prefix))


@contextmanager
def several_nodes(
    job: Job, log_dir: Path, spares: int = 0, places: tuple[Place, ...] | None = None
) -> Iterator[SeveralNodes]:
    """``job.ranks`` are those of each node. Numbers of spare nodes begin with 2."""
    with ExitStack() as stack:
        yield SeveralNodes(job, log_dir, spares, places or (LOCAL,) * (2 + spares), stack)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _connect(router: str, name: str, link: str, node: int) -> Place:
    """A cable between a node's namespace and the router."""
    ours, theirs, subnet = f"{link}a", _far_end(f"{link}a"), f"10.213.{node}"
    _ip("-n", name, "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", router)
    for namespace, end, address in ((name, ours, f"{subnet}.2"), (router, theirs, f"{subnet}.1")):
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", end)
        _ip("-n", namespace, "link", "set", end, "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", name, "route", "add", "default", "via", f"{subnet}.1")
    return Place(("ip", "netns", "exec", name), f"{subnet}.2", ours)


def _far_end(interface: str) -> str:
    """Of its cable, at the router."""
    return interface.removesuffix("a") + "b"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
