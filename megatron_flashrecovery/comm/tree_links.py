"""The links of one member of a tree, at most three: made through the store, kept over a recovery where both ends can.

A member does not know whether its neighbour was replaced. Each end of a link that looks whole sends a marker of the new
epoch over it and waits for the other's; each end that has no link says so in the store. So a link is either seen to be
whole
from both ends, or made again, and replacing one member makes its own links again and no others.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterable

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_flashrecovery.comm.tree_link import Kind, LinkBroken, LinkTimeout, TreeLink, Wake

_LOOK_AT_STORE_EVERY = 0.05
_TOKEN_NBYTES = 16
_CONNECT_TIMEOUT, _TOKEN_TIMEOUT = 5.0, 2.0
"""Seconds in which nobody could be woken: a machine that is gone answers nothing, and a stranger may say nothing."""


def parent_of(member: int) -> int:
    return (member - 1) // 2


def children_of(member: int, size: int) -> list[int]:
    return [child for child in (2 * member + 1, 2 * member + 2) if child < size]


class TreeLinks:
    """Keyed by the neighbour's position in the group. ``made`` counts the links that were made, not kept."""

    def __init__(self, member: int, size: int, timeout: float) -> None:
        self.member = member
        self.children = children_of(member, size)
        self.parent = parent_of(member) if member else None
        self.wake = Wake()
        self.made = 0
        self._timeout = timeout
        self._links: dict[int, TreeLink] = {}

    def __getitem__(self, neighbour: int) -> TreeLink:
        link = self._links.get(neighbour)
        if link is None:
            raise LinkBroken(f"member {self.member} has no link to member {neighbour} of its tree")
        return link

    def relink(self, store: Store, epoch: int) -> None:
        """On the main thread of every member. Raises ``Severed`` when the tree is severed meanwhile."""
        deadline = time.monotonic() + self._timeout
        whole = {neighbour for neighbour, link in self._links.items() if self._mark(link, epoch, deadline)}
        listener = _Listener(store, self.member, self.children)
        try:
            self._say_missing(set(self._neighbours()) - whole, store, listener)
            kept = {n for n in sorted(whole) if self._is_kept(n, store, epoch, deadline)}
            missing = [neighbour for neighbour in self._neighbours() if neighbour not in kept]
            self._say_missing(missing, store, listener)
            for neighbour in missing:
                if neighbour in self._links:
                    self._links.pop(neighbour).close()
            # The parent first: it has published its address before it waits for anybody, so nobody waits in a circle.
            for neighbour in missing:
                connection = (
                    _connect(store, neighbour, self.member, self.wake, deadline)
                    if neighbour == self.parent
                    else listener.accept(neighbour, self.wake, deadline)
                )
                self._links[neighbour] = TreeLink(connection, self.wake)
                self.made += 1
        finally:
            listener.close()

    def close(self) -> None:
        """For good."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self.wake.close()

    def _neighbours(self) -> list[int]:
        return ([] if self.parent is None else [self.parent]) + self.children

    def _mark(self, link: TreeLink, epoch: int, deadline: float) -> bool:
        try:
            link.send(Kind.MARKER, epoch, b"", deadline)
        except LinkBroken:
            return False
        return True

    def _say_missing(self, neighbours: Iterable[int], store: Store, listener: _Listener) -> None:
        for neighbour in neighbours:
            if neighbour == self.parent:
                store.set(_wanted(neighbour, self.member), "")
            else:
                listener.publish(neighbour)

    def _is_kept(self, neighbour: int, store: Store, epoch: int, deadline: float) -> bool:
        """Until its marker comes, or its end of the link, or its word in the store that it has none."""
        link = self._links[neighbour]
        key = _address(neighbour, self.member) if neighbour == self.parent else _wanted(self.member, neighbour)
        while time.monotonic() < deadline:
            try:
                return link.try_marker(epoch, min(deadline, time.monotonic() + _LOOK_AT_STORE_EVERY))
            except LinkTimeout:
                if store.check([key]):
                    return False
        return False


class _Listener:
    """Accepts children; opened only when one has to be linked. Nobody is accepted without the token from the store."""

    def __init__(self, store: Store, member: int, children: list[int]) -> None:
        self._store = store
        self._member = member
        self._socket: socket.socket | None = None
        self._token_of = {child: secrets.token_bytes(_TOKEN_NBYTES) for child in children}
        self._accepted: dict[int, socket.socket] = {}
        self._published: set[int] = set()

    def publish(self, child: int) -> None:
        if child in self._published:
            return
        if self._socket is None:
            host = local_address(self._store)
            self._socket = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        host, port = self._socket.getsockname()[:2]
        self._store.set(_address(self._member, child), f"{port} {self._token_of[child].hex()} {host}")
        self._published.add(child)

    def accept(self, child: int, wake: Wake, deadline: float) -> socket.socket:
        assert self._socket is not None, "published before"
        while child not in self._accepted:
            wake.wait(self._socket, deadline)
            connection, _ = self._socket.accept()
            connection.settimeout(_TOKEN_TIMEOUT)
            try:
                token = connection.recv(_TOKEN_NBYTES, socket.MSG_WAITALL)
            except OSError:
                token = b""
            known = next((each for each, expected in self._token_of.items() if expected == token), None)
            if known is None:
                connection.close()
            else:
                self._accepted[known] = connection
        return self._accepted.pop(child)

    def close(self) -> None:
        for held in (*self._accepted.values(), *([self._socket] if self._socket else [])):
            held.close()


def _connect(store: Store, parent: int, member: int, wake: Wake, deadline: float) -> socket.socket:
    key = _address(parent, member)
    while not store.check([key]):
        _pause(wake, deadline)
    port, token, host = bytes(store.get(key)).decode().split(" ", 2)
    wake.check()
    try:
        connection = socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT)
    except OSError as error:
        raise LinkBroken(f"member {parent} of the tree is not there any more: {error}") from None
    try:
        connection.sendall(bytes.fromhex(token))
    except OSError as error:
        connection.close()
        raise LinkBroken(f"member {parent} of the tree has gone: {error}") from None
    return connection


def _pause(wake: Wake, deadline: float) -> None:
    """A short wait for the store, cut short when the tree is severed."""
    try:
        wake.wait(None, min(deadline, time.monotonic() + _LOOK_AT_STORE_EVERY / 5))
    except LinkTimeout:
        if time.monotonic() >= deadline:
            raise


def _address(parent: int, child: int) -> str:
    return f"tree/{parent}-{child}"


def _wanted(parent: int, child: int) -> str:
    return f"tree/wanted/{parent}-{child}"


def local_address(store: Store) -> str:
    """The address of the interface that leads to the store: the one by which the other members can reach this one."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    host = getattr(store, "host", "127.0.0.1")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, getattr(store, "port", 9)))
        return str(probe.getsockname()[0])
