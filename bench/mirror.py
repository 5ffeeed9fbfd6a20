"""How fast a snapshot is copied, fingerprinted and mirrored, beside one plain gloo stream between the same processes.

A mirror is done when its host has verified and committed it; what gloo sends is done when the receiver says so. `link`
goes through the loopback interface, as between two machines; `nearby` is what ranks of one machine do: the host copies
out of memory that the guest lends.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist

from bench.report import Figure, write
from megatron_flashrecovery.comm.mirror_link import SocketLinks
from megatron_flashrecovery.comm.mirror_memory import Lent
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.state.content import needed_bytes
from megatron_flashrecovery.state.guest_store import GuestStore
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.pieces import TensorPiece
from megatron_flashrecovery.state.snapshot import Snapshots
from megatron_flashrecovery.state.vault import Holding, Vault

NBYTES = 256 << 20
SAMPLES = 9
_PIECES = 16
_TIMEOUT = 120.0
_GIB = 1 << 30
_TOKEN = b"bench"
_LINKS = {"link": SocketLinks(_TOKEN, nearby=False), "nearby": SocketLinks(_TOKEN)}
_ORDERS = (("link", "gloo", "nearby"), ("nearby", "gloo", "link"))

_Result = TypeVar("_Result")
Seconds: TypeAlias = "dict[str, list[float]]"
"""Per thing measured, one entry per sample; ``cpu NAME`` are CPU seconds of the process, all threads."""


def main() -> None:
    guest, host = measure()
    write(
        "mirror",
        figures(guest, host),
        {f"{side} {name}": each for side, of in (("guest", guest), ("host", host)) for name, each in of.items()},
    )


def figures(guest: Mapping[str, Sequence[float]], host: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Medians. CPU seconds are of both ends together where there are two."""
    gib = NBYTES / _GIB

    def rate(name: str) -> float:
        return gib / statistics.median(guest[name])

    def cpu(name: str) -> float:
        return (statistics.median(guest[f"cpu {name}"]) + statistics.median(host.get(f"cpu {name}", [0.0]))) / gib

    # Each link sample beside the gloo sample that was taken next to it: what else the machine does meets both.
    ratio = statistics.median(plain / link for plain, link in zip(guest["gloo"], guest["link"], strict=True))
    return [
        Figure("mirror link / plain gloo, throughput", ratio, "", at_least=0.8),
        *(Figure(f"{name}, throughput", rate(name), "GiB/s") for name in ("copy", "seal", "link", "nearby", "gloo")),
        *(Figure(f"{name}, CPU time", cpu(name), "s/GiB") for name in ("copy", "seal", "link", "nearby", "gloo")),
    ]


def measure() -> tuple[Seconds, Seconds]:
    """Two fresh processes. Returns what each measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ends = [context.Pipe() for _ in range(2)]
        processes = [
            context.Process(target=run, args=(rank, str(Path(directory, "store")), there))
            for (rank, run), (_, there) in zip(enumerate((_guest, _host)), ends, strict=True)
        ]
        for process in processes:
            process.start()
        for _, there in ends:
            there.close()
        try:
            guest, host = (here.recv() for here, _ in ends)
        finally:
            for process in processes:
                process.join(_TIMEOUT)
                process.kill()
    return guest, host


def _guest(rank: int, store: str, parent: Connection) -> None:
    _set_up(rank, store)
    pieces = [TensorPiece(f"piece {n}", torch.rand(NBYTES // 4 // _PIECES), unique=True) for n in range(_PIECES)]
    vault = Vault()
    fd = vault.reserve({Holding(Rank(0)): needed_bytes(pieces, {})})[Holding(Rank(0))]
    memory = Memory(fd)
    own = Snapshots(Rank(0), memory.slots)
    plain = torch.rand(NBYTES // 4)
    addresses: list[dict[str, str]] = [{}]
    dist.broadcast_object_list(addresses, src=1)
    links = {
        name: of.connect(addresses[0][name], Rank(0), Epoch(0), _TIMEOUT, Lent(fd, memory.view))
        for name, of in _LINKS.items()
    }
    seconds: Seconds = {}
    for step in map(Step, range(-2, SAMPLES)):  # two to warm up: both slots
        with_samples = seconds if step >= 0 else {}
        _time(with_samples, "copy", partial(own.capture, step, Epoch(0), pieces, {}))
        offer = _time(with_samples, "seal", partial(own.seal, step))
        content = own.content(step)[1]
        for name in _ORDERS[step % 2]:
            dist.barrier()
            if name == "gloo":
                _time(with_samples, name, lambda: (dist.send(plain, 1), dist.recv(torch.empty(1), 1)))
            else:
                _time(with_samples, name, partial(links[name].offer, offer, content, _TIMEOUT))
            dist.barrier()
    for link in links.values():
        link.close()
    parent.send(seconds)
    dist.destroy_process_group()


def _host(rank: int, store: str, parent: Connection) -> None:
    _set_up(rank, store)
    pieces = [TensorPiece("piece", torch.empty(NBYTES // 4), unique=True)]
    vault = Vault()
    servers = {}
    for number, (name, links) in enumerate(_LINKS.items(), start=1):
        holding = Holding(Rank(0), host=Rank(number))
        memory = Memory(vault.reserve({holding: needed_bytes(pieces, {}) + (1 << 16)})[holding])
        guests = GuestStore(Rank(1))
        guests.add(Rank(0), memory.slots)
        servers[name] = links.serve(Rank(1), guests)
    dist.broadcast_object_list([{name: server.address for name, server in servers.items()}], src=1)
    seconds: Seconds = {}
    plain = torch.rand(NBYTES // 4)
    for step in range(-2, SAMPLES):
        with_samples = seconds if step >= 0 else {}
        for name in _ORDERS[step % 2]:
            dist.barrier()
            if name == "gloo":
                _time(with_samples, name, lambda: (dist.recv(plain, 0), dist.send(torch.empty(1), 0)))
                dist.barrier()
            else:
                _time(with_samples, name, dist.barrier)
    for server in servers.values():
        server.close()
    parent.send(seconds)
    dist.destroy_process_group()


def _set_up(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def _time(seconds: Seconds, name: str, what: Callable[[], _Result]) -> _Result:
    wall, cpu = time.perf_counter(), _cpu()
    result = what()
    seconds.setdefault(name, []).append(time.perf_counter() - wall)
    seconds.setdefault(f"cpu {name}", []).append(_cpu() - cpu)
    return result


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
