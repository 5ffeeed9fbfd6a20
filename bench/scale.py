"""One recovery of a job of 32 to 4,800 ranks: what its events cost the coordinator, and how many links a job-sized
group makes anew.

The coordinator is the real one in one process and one thread; the nodes that talk to it are simulated (``cluster``).
"With records" adds what the controller does for every event besides: messages decoded and encoded, the journal written.
The tree of links is the real one too: a thread for each member and a TCP connection for each link, all on this machine,
so its times per member are CPU times and the number of links is the point.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from bench.cluster import Cluster
from bench.report import Figure, write
from megatron_flashrecovery.comm import tree_links
from megatron_flashrecovery.comm.tree_links import TreeLinks
from megatron_flashrecovery.core.coordinator import Job, handle
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.messages import Command, Event
from megatron_flashrecovery.runtime.journal import Journal
from megatron_flashrecovery.runtime.node_messages import control_codec

SIZES = (32, 128, 512, 2048, 4800)
SAMPLES = 7
_LINK_TIMEOUT = 120.0
_STACK_NBYTES = 256 << 10
_MOST_LINKS = 3 * 2
"""A member has a parent and two children at most, and both ends of a link make it."""

Samples = dict[str, list[float]]


def main() -> None:
    samples: Samples = {}
    for size in SIZES:
        measure_coordinator(size, samples)
        measure_links(size, samples)
    write("scale", figures(samples), samples)


def figures(samples: Samples) -> list[Figure]:
    def median(what: str, size: int) -> float:
        return statistics.median(samples[f"{what}, {size} ranks"])

    def growth(what: str) -> float:
        return median(what, SIZES[-1]) / median(what, SIZES[0])

    small, large = SIZES[0], SIZES[-1]
    return [
        *(Figure(f"coordinator, one recovery of {size} ranks", median("recovery", size), "s") for size in SIZES),
        Figure(f"coordinator with records, one recovery of {large} ranks", median("recovery with records", large), "s"),
        Figure(f"coordinator, costliest event of {large} ranks", median("costliest event", large), "s"),
        Figure(f"coordinator, mean cost of an event, {large} / {small} ranks", growth("event"), "", at_most=2.0),
        Figure(
            f"coordinator with records, mean cost of an event, {large} / {small} ranks",
            growth("event with records"),
            "",
            at_most=2.0,
        ),
        Figure(
            f"tree of {large} ranks, ends of links made for one replacement",
            max(samples[f"ends of links made, {large} ranks"]),
            "",
            at_most=_MOST_LINKS,
        ),
        Figure(f"tree of {large} ranks, CPU time of a member that relinks", median("relink", large), "s"),
        Figure(f"tree, CPU time of a member that relinks, {large} / {small} ranks", growth("relink"), "", at_most=2.0),
    ]


# --- the coordinator --------------------------------------------------------------------------------------------------


def measure_coordinator(size: int, samples: Samples) -> None:
    cluster = Cluster(size)
    with tempfile.TemporaryDirectory() as directory, _no_collection():
        for name, record in (("", False), (" with records", True)):
            handler = _Handler(cluster.job(), Path(directory, f"journal{record}") if record else None)
            cluster.start(handler.tell)
            for number in range(SAMPLES):
                handler.seconds.clear()
                cluster.lose(Rank(number * size // SAMPLES), handler.tell)
                total = sum(handler.seconds)
                samples.setdefault(f"recovery{name}, {size} ranks", []).append(total)
                samples.setdefault(f"event{name}, {size} ranks", []).append(total / len(handler.seconds))
                samples.setdefault(f"costliest event{name}, {size} ranks", []).append(max(handler.seconds))


class _Handler:
    """What the controller does with an event, timed. ``seconds`` has one entry per event."""

    def __init__(self, job: Job, journal: Path | None) -> None:
        self._job = job
        self._codec = control_codec()
        self._journal = Journal(journal) if journal else None
        self.seconds: list[float] = []

    def tell(self, event: Event) -> Sequence[Command]:
        if self._journal is None:
            return self._timed(lambda: handle(self._job, event, time.monotonic()))
        journal, data = self._journal, self._codec.encode(event)
        return self._timed(lambda: self._with_records(data, journal))

    def _with_records(self, data: bytes, journal: Journal) -> Sequence[Command]:
        event, now = self._codec.decode(data), time.monotonic()
        commands = handle(self._job, event, now)  # type: ignore[arg-type]  # the codec knows events and others
        journal.handled(event, commands, self._job, time=time.time(), now=now)  # type: ignore[arg-type]
        for command in commands:
            self._codec.encode(command)
        return commands

    def _timed(self, what: Callable[[], Sequence[Command]]) -> Sequence[Command]:
        began = time.thread_time()
        commands = what()
        self.seconds.append(time.thread_time() - began)
        return commands


@contextmanager
def _no_collection() -> Iterator[None]:
    """The simulated nodes make far more objects than the coordinator: collecting theirs is not its cost."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- the tree ---------------------------------------------------------------------------------------------------------


def measure_links(size: int, samples: Samples) -> None:
    """Replaces an inner member, again and again, each time at another place of the tree."""
    store = dist.HashStore()
    members = [TreeLinks(member, size, _LINK_TIMEOUT) for member in range(size)]
    with _rarely_looking_at_the_store():
        _relink(members, dist.PrefixStore("0", store), 0)
        for number in range(1, SAMPLES + 1):
            lost = 1 + number * (size // 2 - 2) // SAMPLES
            members[lost].close()
            members[lost] = TreeLinks(lost, size, _LINK_TIMEOUT)
            before = sum(links.made for links in members)
            seconds = _relink(members, dist.PrefixStore(str(number), store), number)
            made = sum(links.made for links in members) - before
            samples.setdefault(f"ends of links made, {size} ranks", []).append(made)
            samples.setdefault(f"relink, {size} ranks", []).append(sum(seconds) / size)
    for links in members:
        links.close()


def _relink(members: Sequence[TreeLinks], store: dist.Store, epoch: int) -> list[float]:
    """All members at once; CPU seconds of each."""
    seconds = [0.0] * len(members)

    def relink(member: int) -> None:
        began = time.thread_time()
        members[member].relink(store, epoch)
        seconds[member] = time.thread_time() - began

    before = threading.stack_size(_STACK_NBYTES)
    try:
        threads = [threading.Thread(target=relink, args=(member,)) for member in range(len(members))]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(before)
    for thread in threads:
        thread.join()
    return seconds


@contextmanager
def _rarely_looking_at_the_store() -> Iterator[None]:
    """Whoever waits for a neighbour looks into the store every 50 ms. Thousands of members on two cores wait for each
    other much longer than members with a core each, and would do nothing but look."""
    before = tree_links._LOOK_AT_STORE_EVERY
    tree_links._LOOK_AT_STORE_EVERY = 5.0
    try:
        yield
    finally:
        tree_links._LOOK_AT_STORE_EVERY = before
