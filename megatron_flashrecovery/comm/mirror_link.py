"""The data plane: a guest offers its snapshots to its host, and a replacement fetches its state from who has it.

This is the guest's end; ``mirror_server`` is the host's. Errors are ``LinkLost`` (the connection, a deadline, an epoch
that is over) and ``SnapshotMismatch`` (the bytes: damaged, or not wanted).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol, TypeAlias

import xxhash

from megatron_flashrecovery.comm.mirror_hello import (
    CODEC,
    Acknowledged,
    Fingerprint,
    Hello,
    OfferInPlace,
    Refused,
    Request,
    Welcome,
    heard,
    introduce,
)
from megatron_flashrecovery.comm.mirror_memory import Lent
from megatron_flashrecovery.comm.mirror_server import MirrorServer
from megatron_flashrecovery.comm.mirror_sockets import Address, connect, connect_nearby
from megatron_flashrecovery.comm.mirror_stream import Deadline, Stream
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.core.snapshot import Offer, Sink

Into: TypeAlias = "Callable[[Offer], Iterable[memoryview]]"
"""Where the bytes of an offer go: each view is filled before the next one is asked for. It may raise
``SnapshotMismatch`` to refuse."""

_SCRATCH_NBYTES = 1 << 20
_BEGIN_TIMEOUT = 10.0
"""Seconds for a connection and the first words, which are few: a machine that is gone does not answer."""


class Link(Protocol):
    """From a guest to its host, in one epoch."""

    def offer(self, offer: Offer, content: memoryview, timeout: float) -> None:
        """Returns once the host has the snapshot, verified and committed. ``SnapshotMismatch``: it does not take it,
        another offer may follow; ``LinkLost``: the link is of no further use."""

    def close(self) -> None:
        """From any thread; an ``offer`` under way raises ``LinkLost``."""


class Server(Protocol):
    """One per worker: takes in its guests' offers, and gives what it is told to give."""

    address: str

    def open_epoch(self, epoch: Epoch) -> None:
        """Ends every connection of an older epoch, and lets no more of them in."""

    def end_requests(self, epoch: Epoch) -> None:
        """From any thread: whoever gives, or waits to be asked, in an older epoch raises ``LinkLost``. Guests go on.

        ``open_epoch`` would be too late, for it is called by the thread that waits here."""

    def give(self, request: Request, offer: Offer, chunks: Iterable[memoryview], timeout: float) -> None:
        """Waits for whoever makes this request, and sends ``chunks`` on the calling thread. Returns once they have
        arrived undamaged."""

    def close(self) -> None: ...


class Links(Protocol):
    """A way to make links: ``SocketLinks``, or ``testing.memory_link``."""

    def serve(self, rank: Rank, sink: Sink) -> Server: ...

    def connect(self, address: str, rank: Rank, epoch: Epoch, timeout: float, lent: Lent | None = None) -> Link:
        """``lent``: the memory of all that will be offered. A host on the same machine copies it from there."""

    def fetch(self, address: str, request: Request, into: Into, timeout: float) -> Offer:
        """Returns what was given, with its fingerprint, once all bytes are where ``into`` said."""

    def end_fetches(self, epoch: Epoch) -> None:
        """From any thread: each ``fetch`` of an older epoch raises ``LinkLost``, and none begins any more."""


class SocketLinks:
    """``token`` is the job's: nobody else is listened to. ``host`` is the address of this node for the others. Without
    ``nearby`` two ranks on one machine talk as if they were on two, over TCP."""

    def __init__(self, token: bytes, host: str = "127.0.0.1", nearby: bool = True) -> None:
        self._token = token
        self._host = host
        self._nearby = nearby
        self._lock = threading.Lock()
        self._fetching: dict[Stream, Epoch] = {}
        self._fetches_from = Epoch(0)

    def serve(self, rank: Rank, sink: Sink) -> MirrorServer:
        return MirrorServer(rank, self._token, sink, self._host, self._nearby)

    def connect(self, address: str, rank: Rank, epoch: Epoch, timeout: float, lent: Lent | None = None) -> MirrorLink:
        deadline = Deadline(min(timeout, _BEGIN_TIMEOUT))
        where = Address.parse(address)
        near = connect_nearby(where, CODEC) if self._nearby and lent is not None else None
        if near is not None and lent is not None:
            with suppress(_NotLent):
                return self._begin(near, rank, epoch, lent, deadline)
        return self._begin(connect(where, CODEC, deadline), rank, epoch, None, deadline)

    def _begin(self, stream: Stream, rank: Rank, epoch: Epoch, lent: Lent | None, deadline: Deadline) -> MirrorLink:
        try:
            introduce(stream, self._token, Hello(rank, epoch, lends=lent is not None), deadline)
            if lent is not None:
                stream.send_descriptor(lent.fd, deadline)
                _hear_whether_it_is_taken(stream, deadline)
        except BaseException:
            stream.close()
            raise
        return MirrorLink(stream, rank, epoch, lent)

    def fetch(self, address: str, request: Request, into: Into, timeout: float) -> Offer:
        soon = Deadline(min(timeout, _BEGIN_TIMEOUT))
        where = Address.parse(address)
        stream = (connect_nearby(where, CODEC) if self._nearby else None) or connect(where, CODEC, soon)
        with self._fetched(stream, request.epoch):
            introduce(stream, self._token, Hello(request.rank, request.epoch, request), soon)
            return _take(stream, into, Deadline(timeout))

    def end_fetches(self, epoch: Epoch) -> None:
        with self._lock:
            self._fetches_from = max(self._fetches_from, epoch)
            over = [stream for stream, of in self._fetching.items() if of < self._fetches_from]
        for stream in over:
            stream.close()

    @contextmanager
    def _fetched(self, stream: Stream, epoch: Epoch) -> Iterator[None]:
        try:
            with self._lock:
                if epoch < self._fetches_from:
                    raise LinkLost(f"a request of epoch {epoch}, and it is {self._fetches_from}")
                self._fetching[stream] = epoch
            yield
        finally:
            with self._lock:
                self._fetching.pop(stream, None)
            stream.close()


class MirrorLink:
    """A ``Link`` over a connection, which carries the content unless that lies in memory that is ``lent``."""

    def __init__(self, stream: Stream, rank: Rank, epoch: Epoch, lent: Lent | None = None) -> None:
        self._stream = stream
        self._rank = rank
        self._epoch = epoch
        self._lent = lent

    def offer(self, offer: Offer, content: memoryview, timeout: float) -> None:
        assert len(content) == offer.nbytes, f"{len(content)} bytes for an offer of {offer.nbytes}"
        offer = replace(offer, id=replace(offer.id, epoch=self._epoch))
        deadline = Deadline(timeout)
        try:
            if self._lent is None:
                self._stream.say(offer, deadline, content)
            else:
                self._stream.say(OfferInPlace(offer, self._lent.offset_of(content)), deadline)
            answer = heard(self._stream.hear(deadline), Acknowledged)
        except LinkLost as lost:
            self.close()
            raise LinkLost(f"mirror of rank {self._rank}, step {offer.id.step}: {lost}") from None
        if answer != Acknowledged(offer.id.step, offer.id.epoch):
            self.close()
            raise LinkLost(f"rank {self._rank} offered step {offer.id.step}, and its host answers {answer}")

    def close(self) -> None:
        self._stream.close()


def fetch_snapshot(links: Links, address: str, request: Request, sink: Sink, timeout: float) -> Offer:
    """Fetch a mirror into a sink (the replacement's own slots), which has it committed when this returns."""
    begun: list[Offer] = []

    def into(offer: Offer) -> Iterator[memoryview]:
        room = sink.begin(offer)
        if room is None:
            yield from _scratch(offer.nbytes)
        else:
            begun.append(offer)
            yield room

    try:
        offer = links.fetch(address, request, into, timeout)
    except BaseException:
        for abandoned in begun:
            sink.abandon(abandoned)
        raise
    for complete in begun:
        sink.commit(complete)
    return offer


class _NotLent(Exception):
    """The host cannot read the memory that was lent."""


def _hear_whether_it_is_taken(stream: Stream, deadline: Deadline) -> None:
    answer = stream.hear(deadline)
    if isinstance(answer, Refused) and not answer.over:
        raise _NotLent(answer.reason)
    heard(answer, Welcome)


def _take(stream: Stream, into: Into, deadline: Deadline) -> Offer:
    offer = heard(stream.hear(deadline), Offer)
    assert isinstance(offer, Offer)
    digest, left, ended = xxhash.xxh3_128(), offer.nbytes, False
    try:
        for view in into(offer):
            if len(view) > left:
                raise SnapshotMismatch(f"{offer.nbytes} bytes of {offer.id} were announced, more are expected here")
            stream.receive_into(view, deadline, digest)
            left -= len(view)
        if left:
            raise SnapshotMismatch(f"{offer.nbytes} bytes of {offer.id} were announced, {left} fewer are expected here")
        stated, ended = heard(stream.hear(deadline), Fingerprint), True
        if stated != Fingerprint(digest.digest()) or offer.fingerprint not in (b"", digest.digest()):
            raise SnapshotMismatch(f"{offer.id} arrived damaged, or was damaged where it came from")
    except SnapshotMismatch as mismatch:
        # The giver hears this only once it has sent everything, and closing with unread bytes would destroy it.
        stream.drain(left, deadline)
        if not ended:
            stream.hear(deadline)
        stream.say(Refused(str(mismatch)), deadline)
        raise
    stream.say(Acknowledged(offer.id.step, offer.id.epoch), deadline)
    return replace(offer, fingerprint=digest.digest())


def _scratch(nbytes: int) -> Iterator[memoryview]:
    scratch = memoryview(bytearray(min(nbytes, _SCRATCH_NBYTES)))
    for start in range(0, nbytes, _SCRATCH_NBYTES):
        yield scratch[: nbytes - start]
