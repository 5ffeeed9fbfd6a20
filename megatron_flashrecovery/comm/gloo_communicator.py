"""Gloo as a transport that can be severed: shut exactly the TCP connections of one communicator, and everybody wakes.

``ProcessGroupGloo.abort()`` returns at once and unblocks nobody; a shut connection fails every pair that uses it, here
and at the other end, within milliseconds. Which connections are ours? Other threads (mirror links, RPC, the store) open
sockets at any time, so comparing the descriptors of the process before and after proves nothing. But a gloo device has
an epoll set of its own, and all its connections are in it: we make one device per communicator, recognise its epoll set
(it appears while the device is made, before anything is connected, and holds nothing but a new listening socket), and
read the set's members from ``/proc/self/fdinfo`` when we sever. Members carry their inodes, so that a descriptor that
was reused in between is left alone.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_flashrecovery.comm.communicator import TRANSPORTS, GroupIdentity

_MEMBER = re.compile(r"^tfd:\s*(\d+)\s.*\bino:([0-9a-f]+)\b", re.MULTILINE)
_CONNECT = timedelta(seconds=30)
_ATTEMPTS = 20
_DEVICE_LOCK = threading.Lock()
_seen: set[int] = set()
"""Inodes of everything that was in an event loop when a device was made; numbers are not given twice in a lifetime."""


class GlooTransport:
    """One gloo context: a device, its connections, its threads."""

    host_synchronous = True

    def __init__(self, identity: GroupIdentity, store: Store) -> None:
        self.backend_type = dist.ProcessGroup.BackendType.GLOO
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stub
        devices, self._epolls = _create_devices()
        options._devices = devices
        options._threads = 2 * len(devices)
        # All members are at this place already (rendezvous), so connecting may not take as long as an operation may.
        options._timeout = min(identity.timeout, _CONNECT)
        options.global_ranks_in_group = [int(rank) for rank in identity.ranks]
        options.group_name = str(identity.key)
        self._lock = threading.Lock()
        self.backend: Any = dist.ProcessGroupGloo(store, identity.rank, identity.size, options)
        self.backend._set_default_timeout(identity.timeout)
        self.backend._set_sequence_number_for_group()

    def connect(self) -> None:
        """Gloo connects everybody when it is created."""

    def mark(self) -> None:
        """Whoever is behind is inside of an operation, and says so."""

    def wait(self, work: dist.Work, timeout: timedelta | None) -> None:
        work.wait() if timeout is None else work.wait(timeout)

    def finish(self, work: dist.Work) -> None:
        work.wait()

    def succeeded(self, work: dist.Work) -> bool:
        return work.is_success()

    def error(self) -> str | None:
        """Whoever waits is told."""
        return None

    def cut_a_connection(self) -> bool:
        """As a network might. Whether there was one."""
        with self._lock:
            return any(_shut(descriptor, inode) for epoll in self._epolls for descriptor, inode in _members(epoll))

    def sever(self) -> None:
        # The lock: once the device is closed, its epoll descriptor may belong to somebody else.
        with self._lock:
            for epoll in self._epolls:
                for descriptor, inode in _members(epoll):
                    _shut(descriptor, inode)

    def settle(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Severing is done when ``sever`` returns."""

    def close(self, gently: bool) -> None:
        if not gently:
            self.sever()
        with self._lock:
            self._epolls = ()
        # Gloo's loop takes 10 to 20 ms to notice that it shall end. Nobody needs to wait for that, least of all a
        # recovery, once for each of its groups; the destructor does not hold the interpreter's lock while it waits.
        backend, self.backend = [self.backend], None
        threading.Thread(target=backend.clear, name="flashrecovery-close").start()


def _create_devices() -> tuple[list[dist.ProcessGroupGloo.Device], tuple[int, ...]]:
    """One device per interface of ``GLOO_SOCKET_IFNAME``, as torch would make them, with their epoll descriptors."""
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    with _DEVICE_LOCK:
        made = [_create_device(interface) for interface in interfaces or [""]]
    return [device for device, _ in made], tuple(epoll for _, epoll in made)


def _create_device(interface: str) -> tuple[dist.ProcessGroupGloo.Device, int]:
    make = dist.ProcessGroupGloo
    for _ in range(_ATTEMPTS):
        before = set(os.listdir("/proc/self/fd"))
        device = make.create_device(interface=interface) if interface else make.create_default_device()
        after = set(os.listdir("/proc/self/fd"))
        # Among the new numbers, unless somebody closed a descriptor meanwhile, whose number the loop may have now.
        found = _fresh_loops(after - before) or _fresh_loops(after)
        if len(found) == 1:
            return device, found[0]
        # Somebody made such an event loop in the same microseconds: it is known the next time.
    raise RuntimeError(f"cannot tell the event loop of a new gloo device from {len(found)} candidates")


def _fresh_loops(names: Iterable[str]) -> list[int]:
    members_of = {epoll: _members(epoll) for epoll in _epolls(names)}
    fresh = [epoll for epoll, members in members_of.items() if _is_new_device(members)]
    _seen.update(inode for members in members_of.values() for _, inode in members)
    return fresh


def _epolls(names: Iterable[str]) -> list[int]:
    found = []
    for name in names:
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.append(int(name))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself, or closed by another thread meanwhile
    return found


def _is_new_device(members: list[tuple[int, int]]) -> bool:
    """One listening TCP socket and no other, a pipe (by which gloo wakes its loop; others have an eventfd or a socket),
    and nothing that an event loop had before: a number may have belonged to a device that is being closed."""
    if any(inode in _seen for _, inode in members):
        return False
    sockets = [held for descriptor, inode in members if (held := _hold(descriptor, inode)) is not None]
    try:
        return len(sockets) == 1 and _is_tcp(sockets[0]) and _is_listening(sockets[0]) and _has_pipe(members)
    finally:
        for held in sockets:
            held.close()


def _has_pipe(members: list[tuple[int, int]]) -> bool:
    for descriptor, inode in members:
        try:
            status = os.fstat(descriptor)
        except OSError:
            continue
        if stat.S_ISFIFO(status.st_mode) and status.st_ino == inode:
            return True
    return False


def _members(epoll: int) -> list[tuple[int, int]]:
    try:
        with open(f"/proc/self/fdinfo/{epoll}") as lines:
            return [(int(descriptor), int(inode, 16)) for descriptor, inode in _MEMBER.findall(lines.read())]
    except FileNotFoundError:
        return []


def _hold(descriptor: int, inode: int) -> socket.socket | None:
    """A socket object over a duplicate, if the descriptor is (still) this socket. The caller closes it."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    # First duplicate, then compare: what has been compared can no longer change hands.
    try:
        if os.fstat(copy).st_ino == inode:
            return socket.socket(fileno=copy)
    except OSError:
        pass  # a pipe or an eventfd: part of the loop, no connection
    os.close(copy)
    return None


def _is_tcp(held: socket.socket) -> bool:
    return held.family in (socket.AF_INET, socket.AF_INET6) and held.type == socket.SOCK_STREAM


def _is_listening(held: socket.socket) -> bool:
    return bool(held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _shut(descriptor: int, inode: int) -> bool:
    held = _hold(descriptor, inode)
    if held is None:
        return False
    with held:
        # Never the listening socket: gloo ends the process when it is gone.
        if not _is_tcp(held) or _is_listening(held):
            return False
        try:
            held.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False  # the peer was faster
        return True


TRANSPORTS["gloo"] = GlooTransport
