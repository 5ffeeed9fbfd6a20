"""The data plane without a network: the same ``Links`` within one process, for tests of what stands on them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import xxhash

from megatron_flashrecovery.comm.mirror_hello import Request
from megatron_flashrecovery.comm.mirror_link import Into
from megatron_flashrecovery.comm.mirror_memory import Lent
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.core.snapshot import Offer, Sink


@dataclass(eq=False)
class MemoryNetwork:
    """Where the servers of a test find each other."""

    servers: dict[str, MemoryServer] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)


class MemoryLinks:
    """``damage`` may change the bytes on their way (a copy of them), as a bad network would."""

    def __init__(self, network: MemoryNetwork, token: bytes, damage: Callable[[bytearray], None] | None = None) -> None:
        self._network = network
        self._token = token
        self._damage = damage
        self._lock = threading.Lock()
        self._fetching: dict[Request, MemoryServer] = {}
        self._fetches_from = Epoch(0)

    def serve(self, rank: Rank, sink: Sink) -> MemoryServer:
        address = f"memory:{next(self._network.numbers)}"
        server = MemoryServer(rank, self._token, sink, address)
        self._network.servers[address] = server
        return server

    def connect(self, address: str, rank: Rank, epoch: Epoch, timeout: float, lent: Lent | None = None) -> MemoryLink:
        link = MemoryLink(self._server(address), rank, epoch, self._damage)
        link.server.admit(link)
        return link

    def fetch(self, address: str, request: Request, into: Into, timeout: float) -> Offer:
        server = self._server(address)
        with self._lock:
            if request.epoch < self._fetches_from:
                raise LinkLost(f"a request of epoch {request.epoch}, and it is {self._fetches_from}")
            self._fetching[request] = server
        try:
            return server.take(request, into, timeout, self._damage)
        finally:
            with self._lock:
                del self._fetching[request]

    def end_fetches(self, epoch: Epoch) -> None:
        with self._lock:
            self._fetches_from = max(self._fetches_from, epoch)
            over = [(request, server) for request, server in self._fetching.items() if request.epoch < epoch]
        for request, server in over:
            server.forget(request)

    def _server(self, address: str) -> MemoryServer:
        server = self._network.servers.get(address)
        if server is None or server.closed:
            raise LinkLost(f"connecting to {address}: nobody listens there")
        if server.token != self._token:
            raise LinkLost("the peer closed the connection: do both ends have the token of this job")
        return server


@dataclass(eq=False)
class _Meeting:
    """A giver and a taker of one request: the giver runs the transfer, on its own thread."""

    into: Into
    damage: Callable[[bytearray], None] | None
    done: threading.Event = field(default_factory=threading.Event)
    result: Offer | BaseException | None = None


class MemoryServer:
    def __init__(self, rank: Rank, token: bytes, sink: Sink, address: str) -> None:
        self.rank = rank
        self.token = token
        self.address = address
        self.closed = False
        self._sink = sink
        self._epoch = self._requests_from = Epoch(0)
        self._changed = threading.Condition()
        self._receiving = threading.Lock()
        self._link_of: dict[Rank, MemoryLink] = {}
        self._waiting: dict[Request, _Meeting] = {}

    def open_epoch(self, epoch: Epoch) -> None:
        with self._changed:
            self._epoch = max(self._epoch, epoch)
            for link in self._link_of.values():
                if link.epoch < self._epoch:
                    link.close()
            for request, meeting in list(self._waiting.items()):
                if request.epoch < self._epoch:
                    self._refuse(request, meeting)
            self._changed.notify_all()

    def end_requests(self, epoch: Epoch) -> None:
        with self._changed:
            self._requests_from = max(self._requests_from, epoch)
            for request, meeting in list(self._waiting.items()):
                if request.epoch < self._requests_from:
                    self._refuse(request, meeting)
            self._changed.notify_all()

    def forget(self, request: Request) -> None:
        """Whoever waits with it waits no more."""
        with self._changed:
            if (meeting := self._waiting.get(request)) is not None:
                self._refuse(request, meeting)

    def admit(self, link: MemoryLink) -> None:
        with self._changed:
            before = self._link_of.get(link.rank)
            newest = max(self._epoch, before.epoch if before is not None and not before.closed else Epoch(0))
            if link.epoch < newest:
                raise LinkLost(
                    f"rank {link.rank} comes in epoch {link.epoch}, but rank {self.rank} is in epoch {newest}"
                )
            if before is not None:
                before.close()
            self._link_of[link.rank] = link

    def receive(self, offer: Offer, content: bytearray) -> None:
        with self._receiving:
            room = self._sink.begin(offer)
            if room is None:
                return
            try:
                room[:] = content
                if xxhash.xxh3_128_digest(room) != offer.fingerprint:
                    raise SnapshotMismatch(f"snapshot of rank {offer.id.rank}, step {offer.id.step} arrived damaged")
                self._sink.commit(offer)
            except SnapshotMismatch:
                self._sink.abandon(offer)
                raise

    def take(self, request: Request, into: Into, timeout: float, damage: Callable[[bytearray], None] | None) -> Offer:
        meeting = _Meeting(into, damage)
        with self._changed:
            newest = max(self._epoch, self._requests_from)
            if request.epoch < newest:
                raise LinkLost(f"rank {request.rank} comes in epoch {request.epoch}, but here it is {newest}")
            self._waiting[request] = meeting
            self._changed.notify_all()
        if not meeting.done.wait(timeout):
            raise LinkLost(f"no answer within {timeout} s")
        if isinstance(meeting.result, BaseException):
            raise meeting.result
        assert meeting.result is not None
        return meeting.result

    def give(self, request: Request, offer: Offer, chunks: Iterable[memoryview], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._over(request) or request in self._waiting, timeout):
                raise LinkLost(f"rank {request.rank} did not ask for {request.kind} within {timeout} s")
            if self._over(request):
                raise LinkLost(f"{request} is of an epoch that is over, or rank {self.rank} closes")
            meeting = self._waiting.pop(request)
        try:
            meeting.result = _transfer(offer, chunks, meeting)
        except SnapshotMismatch as mismatch:
            meeting.result = mismatch
            raise
        finally:
            meeting.result = meeting.result or LinkLost("the giver went away")
            meeting.done.set()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            for link in self._link_of.values():
                link.close()
            for request, meeting in list(self._waiting.items()):
                self._refuse(request, meeting)
            self._changed.notify_all()

    def _over(self, request: Request) -> bool:
        return self.closed or request.epoch < max(self._epoch, self._requests_from)

    def _refuse(self, request: Request, meeting: _Meeting) -> None:
        del self._waiting[request]
        meeting.result = LinkLost("the peer closed the connection")
        meeting.done.set()


class MemoryLink:
    def __init__(
        self, server: MemoryServer, rank: Rank, epoch: Epoch, damage: Callable[[bytearray], None] | None
    ) -> None:
        self.server = server
        self.rank = rank
        self.epoch = epoch
        self._changed = threading.Condition()
        self._closed = False
        self._damage = damage

    @property
    def closed(self) -> bool:
        return self._closed

    def offer(self, offer: Offer, content: memoryview, timeout: float) -> None:
        assert len(content) == offer.nbytes, f"{len(content)} bytes for an offer of {offer.nbytes}"
        if self.closed:
            raise LinkLost(f"mirror of rank {self.rank}, step {offer.id.step}: closed")
        offer = replace(offer, id=replace(offer.id, epoch=self.epoch))
        if offer.id.rank != self.rank:
            self.close()
            raise LinkLost(f"rank {self.rank} of epoch {self.epoch} offers {offer.id}")
        answers: list[SnapshotMismatch | None] = []

        def receive() -> None:
            answer = None
            try:
                self.server.receive(offer, _on_the_way(content, self._damage))
            except SnapshotMismatch as mismatch:
                answer = mismatch
            with self._changed:
                answers.append(answer)
                self._changed.notify_all()

        # A thread of its own, as a host has: whoever closes the link need not wait for the host.
        threading.Thread(target=receive, name="memory-link", daemon=True).start()
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or answers, timeout):
                self._closed = True
                raise LinkLost(f"mirror of rank {self.rank}, step {offer.id.step}: no answer within {timeout} s")
        if not answers:
            raise LinkLost(f"mirror of rank {self.rank}, step {offer.id.step}: closed")
        if answers[0] is not None:
            raise answers[0]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _transfer(offer: Offer, chunks: Iterable[memoryview], meeting: _Meeting) -> Offer:
    sent = bytearray()
    for chunk in chunks:
        sent += chunk
    assert len(sent) == offer.nbytes, f"{len(sent)} bytes given of {offer.nbytes} announced"
    stated = xxhash.xxh3_128_digest(sent)
    arrived, at = _on_the_way(sent, meeting.damage), 0
    for view in meeting.into(offer):
        if len(view) > len(arrived) - at:
            raise SnapshotMismatch(f"{offer.nbytes} bytes of {offer.id} were announced, more are expected here")
        view[:] = arrived[at : at + len(view)]
        at += len(view)
    if at < len(arrived):
        raise SnapshotMismatch(f"{offer.nbytes} bytes of {offer.id} were announced, fewer are expected here")
    if xxhash.xxh3_128_digest(arrived) != stated or offer.fingerprint not in (b"", stated):
        raise SnapshotMismatch(f"{offer.id} arrived damaged, or was damaged where it came from")
    return replace(offer, fingerprint=stated)


def _on_the_way(content: memoryview | bytearray, damage: Callable[[bytearray], None] | None) -> bytearray:
    arrived = bytearray(content)
    if damage is not None:
        damage(arrived)
    return arrived
