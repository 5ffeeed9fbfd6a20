"""The host's end of the data plane: one thread per listener, and one per connection."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from megatron_flashrecovery.comm.mirror_hello import (
    CODEC,
    Acknowledged,
    Fingerprint,
    Hello,
    OfferInPlace,
    Refused,
    Request,
    Stranger,
    Welcome,
    admit,
    heard,
)
from megatron_flashrecovery.comm.mirror_memory import Borrowed
from megatron_flashrecovery.comm.mirror_sockets import listen
from megatron_flashrecovery.comm.mirror_stream import Deadline, Digest, Stream
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank
from megatron_flashrecovery.core.snapshot import Offer, Sink

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT = 5.0
_CLOSE_TIMEOUT = 5.0
# From the first byte of a snapshot to its last one, on a bad day.
_TRANSFER_TIMEOUT = 600.0
_HASH_NBYTES = 4 << 20
# When there are no descriptors left, accepting fails at once, again and again.
_ACCEPT_PAUSE = 0.1


@dataclass(eq=False)
class _Connection:
    stream: Stream
    peer: str
    hello: Hello | None = None
    thread: threading.Thread | None = None
    given: threading.Event = field(default_factory=threading.Event)


class _Content(Protocol):
    """The bytes of one offer, wherever they are."""

    def fill(self, room: memoryview, digest: Digest) -> None: ...

    def skip(self) -> None: ...


@dataclass(frozen=True)
class _Sent:
    """They follow the offer on its connection, and must leave it."""

    stream: Stream
    nbytes: int
    deadline: Deadline

    def fill(self, room: memoryview, digest: Digest) -> None:
        self.stream.receive_into(room, self.deadline, digest)

    def skip(self) -> None:
        self.stream.drain(self.nbytes, self.deadline)


@dataclass(frozen=True)
class _InPlace:
    """They stay in the memory of the guest; ``check`` raises once nobody wants them any more."""

    memory: Borrowed
    offset: int
    check: Callable[[], None]

    def fill(self, room: memoryview, digest: Digest) -> None:
        self.memory.copy_into(room, self.offset, digest, self.check)

    def skip(self) -> None:
        pass


class MirrorServer:
    """A ``Server`` over sockets. ``sink`` is called on the connections' threads, for one guest on one at a time."""

    def __init__(self, rank: Rank, token: bytes, sink: Sink, host: str, nearby: bool) -> None:
        self._rank = rank
        self._token = token
        self._sink = sink
        self._epoch = self._requests_from = Epoch(0)
        self._closed = False
        self._changed = threading.Condition()
        self._connections: set[_Connection] = set()
        self._mirror_of: dict[Rank, _Connection] = {}
        self._waiting: dict[Request, _Connection] = {}
        address, self._listeners = listen(host, nearby)
        self.address = str(address)
        self._accepting = [
            threading.Thread(target=self._accept, args=(listener,), name=f"mirror-accept-{rank}", daemon=True)
            for listener in self._listeners
        ]
        for thread in self._accepting:
            thread.start()

    def open_epoch(self, epoch: Epoch) -> None:
        with self._changed:
            self._epoch = max(self._epoch, epoch)
            over = [c for c in self._connections if c.hello is not None and c.hello.epoch < self._epoch]
            self._changed.notify_all()
        for connection in over:
            connection.stream.close()
            connection.given.set()

    def end_requests(self, epoch: Epoch) -> None:
        with self._changed:
            self._requests_from = max(self._requests_from, epoch)
            over = [
                each
                for each in self._connections
                if each.hello is not None and each.hello.request is not None and each.hello.epoch < self._requests_from
            ]
            self._changed.notify_all()
        for connection in over:
            connection.stream.close()
            connection.given.set()

    def give(self, request: Request, offer: Offer, chunks: Iterable[memoryview], timeout: float) -> None:
        deadline = Deadline(timeout)
        connection = self._claim(request, deadline)
        try:
            _send_all(connection.stream, offer, chunks, deadline)
            heard(connection.stream.hear(deadline), Acknowledged)
        except LinkLost as lost:
            raise LinkLost(f"giving {request.kind} of step {request.step} to rank {request.rank}: {lost}") from None
        finally:
            connection.stream.close()
            connection.given.set()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            connections = list(self._connections)
            self._changed.notify_all()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.stream.close()
            connection.given.set()
        for thread, listener in zip(self._accepting, self._listeners, strict=True):
            thread.join(_CLOSE_TIMEOUT)
            listener.close()
        for connection in connections:
            if connection.thread is not None and connection.thread is not threading.current_thread():
                connection.thread.join(_CLOSE_TIMEOUT)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, peer = listener.accept()
            except OSError as error:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, _ACCEPT_PAUSE):
                        return
                logger.warning("rank=%s cannot take a mirror link: %s", self._rank, error.strerror)
                continue
            connection = _Connection(Stream(sock, CODEC), str(peer[0]) if peer else "this machine")
            connection.thread = threading.Thread(
                target=self._serve, args=(connection,), name=f"mirror-{self._rank}", daemon=True
            )
            with self._changed:
                if self._closed:
                    connection.stream.close()
                    return
                self._connections.add(connection)
            connection.thread.start()

    def _serve(self, connection: _Connection) -> None:
        try:
            hello = admit(connection.stream, self._token, Deadline(_HELLO_TIMEOUT))
            if not self._take_place(connection, hello):
                return
            connection.stream.say(Welcome(self._rank), Deadline(_HELLO_TIMEOUT))
            if hello.request is not None:
                self._wait_for_giver(connection, hello.request)
            else:
                self._receive(connection.stream, hello)
        except Stranger as stranger:
            logger.warning("rank=%s mirror link from %s not admitted: %s", self._rank, connection.peer, stranger)
        except LinkLost as lost:
            logger.debug("rank=%s mirror link from %s ended: %s", self._rank, connection.peer, lost)
        finally:
            self._leave(connection)

    def _take_place(self, connection: _Connection, hello: Hello) -> bool:
        """Whether this connection is the one for its rank from now on; the one that was is ended, and has ended."""
        with self._changed:
            before = self._mirror_of.get(hello.rank) if hello.request is None else None
            newest = max(self._epoch, before.hello.epoch if before is not None and before.hello is not None else 0)
            if hello.request is not None:
                newest = max(newest, self._requests_from)
            current = hello.epoch >= newest and not self._closed
            if current:
                connection.hello = hello
                if hello.request is None:
                    self._mirror_of[hello.rank] = connection
        if not current:
            reason = f"rank {hello.rank} comes in epoch {hello.epoch}, but rank {self._rank} is in epoch {newest}"
            connection.stream.say(Refused(reason, over=True), Deadline(_HELLO_TIMEOUT))
            return False
        if before is not None and before.thread is not None:
            before.stream.close()
            before.thread.join(_CLOSE_TIMEOUT)
            return not before.thread.is_alive()
        return True

    def _receive(self, stream: Stream, hello: Hello) -> None:
        """Offers, one after the other."""
        borrowed = self._borrow(stream, hello.rank) if hello.lends else None
        try:
            while True:
                # The first word may take a whole step to come: the kernel's keepalive watches meanwhile.
                said = heard(stream.hear(Deadline(None)), Offer if borrowed is None else OfferInPlace)
                deadline = Deadline(_TRANSFER_TIMEOUT)
                if borrowed is None:
                    assert isinstance(said, Offer)
                    answer = self._answer(hello, said, _Sent(stream, said.nbytes, deadline))
                else:
                    assert isinstance(said, OfferInPlace)
                    answer = self._answer(hello, said.offer, _InPlace(borrowed, said.offset, stream.check))
                stream.say(answer, deadline)
        finally:
            if borrowed is not None:
                borrowed.close()

    def _borrow(self, stream: Stream, guest: Rank) -> Borrowed:
        """The guest hears whether it may offer in place; if not, it comes again by another way."""
        deadline = Deadline(_HELLO_TIMEOUT)
        try:
            borrowed = Borrowed(stream.receive_descriptor(deadline))
        except LinkLost as lost:
            logger.warning(
                "rank=%s cannot borrow the memory of rank %s, which sends instead: %s", self._rank, guest, lost
            )
            stream.say(Refused(str(lost)), deadline)
            raise
        try:
            stream.say(Welcome(self._rank), deadline)
        except BaseException:
            borrowed.close()
            raise
        return borrowed

    def _answer(self, hello: Hello, offer: Offer, content: _Content) -> Acknowledged | Refused:
        if (offer.id.rank, offer.id.epoch) != (hello.rank, hello.epoch):
            raise LinkLost(f"rank {hello.rank} of epoch {hello.epoch} offers {offer.id}")
        try:
            self._take(offer, content)
        except SnapshotMismatch as mismatch:
            return Refused(str(mismatch))
        return Acknowledged(offer.id.step, offer.id.epoch)

    def _take(self, offer: Offer, content: _Content) -> None:
        """The whole of the offer's bytes is read, whatever becomes of it."""
        try:
            room = self._sink.begin(offer)
        except SnapshotMismatch:
            content.skip()
            raise
        if room is None:
            content.skip()
            return
        complete = False
        try:
            digest = xxhash.xxh3_128()
            content.fill(room, digest)
            if digest.digest() != offer.fingerprint:
                raise SnapshotMismatch(f"snapshot of rank {offer.id.rank}, step {offer.id.step} arrived damaged")
            self._sink.commit(offer)
            complete = True
        finally:
            if not complete:
                self._sink.abandon(offer)

    def _wait_for_giver(self, connection: _Connection, request: Request) -> None:
        with self._changed:
            self._waiting[request] = connection
            self._changed.notify_all()
        connection.given.wait(_TRANSFER_TIMEOUT)

    def _claim(self, request: Request, deadline: Deadline) -> _Connection:
        """Whoever waits with this request, now or by the deadline."""
        with self._changed:
            while True:
                if self._closed or request.epoch < max(self._epoch, self._requests_from):
                    raise LinkLost(f"{request} is of an epoch that is over, or rank {self._rank} closes")
                if (connection := self._waiting.pop(request, None)) is not None:
                    return connection
                try:
                    self._changed.wait(deadline.left())
                except LinkLost:
                    reason = f"rank {request.rank} did not ask for {request.kind} within {deadline.seconds} s"
                    raise LinkLost(reason) from None

    def _leave(self, connection: _Connection) -> None:
        connection.stream.close()
        with self._changed:
            self._connections.discard(connection)
            if connection.hello is None:
                return
            if self._mirror_of.get(connection.hello.rank) is connection:
                del self._mirror_of[connection.hello.rank]
            request = connection.hello.request
            if request is not None and self._waiting.get(request) is connection:
                del self._waiting[request]


def _send_all(stream: Stream, offer: Offer, chunks: Iterable[memoryview], deadline: Deadline) -> None:
    stream.say(offer, deadline)
    digest, sent = xxhash.xxh3_128(), 0
    for chunk in chunks:
        for start in range(0, len(chunk), _HASH_NBYTES):
            part = chunk[start : start + _HASH_NBYTES]
            digest.update(part)
            stream.send([part], deadline)
        sent += len(chunk)
    assert sent == offer.nbytes, f"{sent} bytes given of {offer.nbytes} announced"
    stream.say(Fingerprint(digest.digest()), deadline)
