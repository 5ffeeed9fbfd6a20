"""Keeps this rank's snapshots and its guests' mirrors: a thread seals what the main thread has captured and brings it
to the host, while the main thread computes the next step.

The thread touches committed host memory and its own link, nothing else (invariant 5). It always works on the newest
job; an older one that was overtaken is dropped, and whatever belongs to an epoch that is over fails by itself.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_flashrecovery.comm.mirror_hello import Request
from megatron_flashrecovery.comm.mirror_link import Link, SocketLinks, fetch_snapshot
from megatron_flashrecovery.comm.mirror_memory import Lent
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.runtime.bulletin import Bulletin
from megatron_flashrecovery.runtime.dialogue import Seat
from megatron_flashrecovery.runtime.injector import Injector
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.runtime.seat import end_with
from megatron_flashrecovery.runtime.settling import Berth, Memories
from megatron_flashrecovery.state.content import read_content
from megatron_flashrecovery.state.copying import copier_for
from megatron_flashrecovery.state.encoding import decode_values, encode_values
from megatron_flashrecovery.state.fingerprint import fingerprint
from megatron_flashrecovery.state.guest_store import GuestStore
from megatron_flashrecovery.state.live import live_offer, read_live, write_live
from megatron_flashrecovery.state.pieces import TensorPiece, Value
from megatron_flashrecovery.state.snapshot import Snapshots

_ATTEMPTS = 5
_PAUSE = 0.2
_CLOSE_TIMEOUT = 2.0
_DIGEST_NBYTES = 16
_BROKEN_EXIT = 19
_NOTHING = Step(-1)


@dataclass(frozen=True)
class _Job:
    """Bring the snapshot of ``step`` to the host in ``epoch``; ``captured`` ones are sealed first."""

    step: Step
    epoch: Epoch
    captured: bool


class Keeper:
    """``on_change`` is called whenever a mirror was acknowledged, or cannot be delivered."""

    def __init__(
        self,
        seat: Seat,
        bulletin: Bulletin,
        berth: Berth,
        memories: Memories,
        unique: Sequence[TensorPiece],
        on_change: Callable[[], None],
        injector: Injector,
    ) -> None:
        self._seat = seat
        self._bulletin = bulletin
        self.host = berth.host
        self._on_change = on_change
        self._injector = injector
        self._unique = list(unique)
        self._own = Snapshots(seat.rank, memories.own.slots, copier_for(piece.tensor for piece in unique))
        self._lent = Lent(memories.own_fd, memories.own.view)
        self._guests = GuestStore(seat.rank)
        for guest, memory in memories.guests.items():
            self._guests.add(guest, memory.slots)
        self._links = SocketLinks(seat.token.encode(), _address_towards(seat.store_host))
        self._server = self._links.serve(seat.rank, self._guests)
        bulletin.post_newest(_server_key(seat.rank), seat.epoch, self._server.address.encode())
        self._epoch = seat.epoch
        self._link: Link | None = None
        self._acknowledged = _NOTHING
        self._trouble: LinkLost | SnapshotMismatch | None = None
        self._changed = threading.Condition()
        self._job: _Job | None = None
        self._closed = False
        self.before_delivery: Callable[[Step, Epoch], None] = _nothing_to_do
        """On the mirror thread, with the step of the mirror that is delivered next."""
        self._thread = threading.Thread(target=self._deliver, name="flashrecovery-mirror", daemon=True)
        self._thread.start()

    # --- while nothing fails ------------------------------------------------------------------------------------------

    def capture(self, step: Step, values: Mapping[str, Value]) -> None:
        """Main thread: copy the unique pieces and these values, and leave the rest to the mirror thread."""
        self._own.capture(step, self._epoch, self._unique, values)
        self._give_job(_Job(step, self._epoch, captured=True))

    def has_acknowledged(self, step: Step) -> bool:
        """Raises ``LinkLost`` if the mirror cannot be delivered although its host is not known to be lost, and
        ``SnapshotMismatch`` if it is not what was captured."""
        if self._trouble is not None:
            raise self._trouble
        return self._acknowledged >= step

    def own_steps(self) -> tuple[Step, ...]:
        return self._own.steps()

    def guest_steps(self) -> dict[Rank, tuple[Step, ...]]:
        return self._guests.steps()

    # --- in a recovery ------------------------------------------------------------------------------------------------

    def enter_epoch(self, epoch: Epoch, step: Step, gives_mirror_to: Sequence[Rank]) -> None:
        """Nothing newer than ``step`` exists any more, no link of an older epoch is listened to, and the replacements
        of these guests get back their mirrors of ``step``."""
        with self._changed:
            self._epoch, self._job, self._trouble = epoch, None, None
            self._acknowledged = _NOTHING
            link, self._link = self._link, None
        if link is not None:
            link.close()
        self._guests.open_epoch(epoch)
        self._server.open_epoch(epoch)
        self._own.discard_newer_than(step)
        self._guests.discard_newer_than(step)
        for guest in gives_mirror_to:
            threading.Thread(target=self._give_mirror, args=(guest, step, epoch), daemon=True).start()

    def end_transfers(self, epoch: Epoch) -> None:
        """From any thread, when a newer epoch begins: whoever gives or takes state by a plan of an older one raises
        ``LinkLost``. By ``enter_epoch`` the main thread could not be freed, for it is in there itself."""
        self._server.end_requests(epoch)
        self._links.end_fetches(epoch)

    def restore(self, step: Step, tensors: Sequence[TensorPiece]) -> dict[str, Value]:
        """From the own snapshot. Raises ``SnapshotMismatch``."""
        return self._own.restore(step, tensors)

    def fetch_mirror(self, host: Rank, step: Step) -> None:
        """Into the own slots. Raises ``SnapshotMismatch`` and ``LinkLost``."""
        request = Request(self._seat.rank, step, self._epoch, "mirror")
        fetch_snapshot(self._links, self._address_of(host), request, self._own.intake(), self._seat.execute_timeout)

    def fetch_state(self, peer: Rank, step: Step, pieces: Sequence[TensorPiece]) -> dict[str, Value]:
        """A data-parallel peer's live state, straight into ``pieces``. Returns the peer's values."""
        request = Request(self._seat.rank, step, self._epoch, "state")
        timeout = self._seat.execute_timeout
        self._links.fetch(self._address_of(peer), request, lambda offer: write_live(pieces, offer), timeout)
        sealed = self._bulletin.read(_values_key(self._epoch, self._seat.rank))
        digest, encoded = sealed[:_DIGEST_NBYTES], sealed[_DIGEST_NBYTES:]
        if fingerprint(encoded) != digest:
            raise SnapshotMismatch(f"the values that rank {peer} gave of step {step} arrived damaged")
        return decode_values(encoded)

    def give_state(
        self, ranks: Sequence[Rank], step: Step, pieces: Sequence[TensorPiece], values: Mapping[str, Value]
    ) -> None:
        """Main thread: send live state to data-parallel peers that lost theirs."""
        encoded = encode_values(values)
        for rank in ranks:
            self._bulletin.post(_values_key(self._epoch, rank), fingerprint(encoded) + encoded)
            offer = live_offer(self._seat.rank, step, self._epoch, pieces)
            request = Request(rank, step, self._epoch, "state")
            self._server.give(request, offer, read_live(pieces), self._seat.execute_timeout)

    def mirror_again(self, step: Step) -> None:
        """The host may be new, or may never have got it: bring it what is sealed already."""
        self._give_job(_Job(step, self._epoch, captured=False))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            link = self._link
            self._changed.notify_all()
        if link is not None:
            link.close()
        self._server.close()
        self._thread.join(_CLOSE_TIMEOUT)

    # --- the mirror thread --------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closed)
                if self._closed:
                    return
                assert self._job is not None
                job, self._job = self._job, None
            try:
                self._deliver_one(job)
            except (LinkLost, SnapshotMismatch) as error:
                with self._changed:
                    # In another epoch it was discarded meanwhile, or its host was lost: a recovery brings it again.
                    if job.epoch == self._epoch:
                        self._trouble = error
                self._on_change()
            except Exception as error:
                # Without this thread every gate would wait for ever, and nobody would know why.
                end_with(error, _BROKEN_EXIT)

    def bodies(self, step: Step) -> tuple[memoryview, dict[Rank, memoryview]] | None:
        """The tensors of the own snapshot of a step and of the guests' mirrors of it, as far as there are any."""
        try:
            own = read_content(self._own.content(step)[1]).body
        except SnapshotMismatch:
            return None
        return own, {guest: body for guest in self._guests.guests() if (body := self._guests.body(guest, step))}

    def _deliver_one(self, job: _Job) -> None:
        self.before_delivery(job.step, job.epoch)
        if job.captured:
            self._own.seal(job.step)
        order = self._injector.pending(Moment.MIRROR, job.step)
        offer, content = self._own.content(job.step)
        if order is not None:
            self._injector.fire(order, job.step)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._linked(job).offer(offer, content, self._seat.execute_timeout)
                break
            except LinkLost:
                with self._changed:
                    if self._epoch == job.epoch:
                        self._link = None
                if self._overtaken_within(job, _PAUSE * attempt):
                    return
                if attempt == _ATTEMPTS:
                    raise
        with self._changed:
            if job.epoch == self._epoch:
                self._acknowledged = job.step
        self._on_change()

    def _linked(self, job: _Job) -> Link:
        if self._link is not None:
            return self._link
        address = self._address_of(self.host)
        link = self._links.connect(address, self._seat.rank, job.epoch, self._seat.execute_timeout, self._lent)
        with self._changed:
            if self._epoch == job.epoch:
                self._link = link
        return link  # of an epoch that is over, it fails at its first use

    def _overtaken_within(self, job: _Job, seconds: float) -> bool:
        """Whether this delivery is over: usually the host was lost, and a new epoch brings a new one."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or self._job is not None or self._epoch != job.epoch, seconds
            )

    def _give_mirror(self, guest: Rank, step: Step, epoch: Epoch) -> None:
        try:
            offer, content = self._guests.content(guest, step)
            request = Request(guest, step, epoch, "mirror")
            self._server.give(request, offer, [content], self._seat.execute_timeout)
        except (LinkLost, SnapshotMismatch) as error:
            # The guest's replacement notices by itself, and says what it could not do.
            print(f"flashrecovery: the mirror of rank {guest}, step {step} could not be given: {error}", flush=True)

    def _give_job(self, job: _Job) -> None:
        with self._changed:
            self._job = job
            self._changed.notify_all()

    def _address_of(self, rank: Rank) -> str:
        """Of the worker that sits there now: it says so before it is ready, and overwrites what its predecessor
        said."""
        return self._bulletin.read_newest(_server_key(rank)).decode()


def _nothing_to_do(_step: Step, _epoch: Epoch) -> None:
    """Nobody asked to be called."""


def _server_key(rank: Rank) -> str:
    return f"mirror/{rank}"


def _values_key(epoch: Epoch, rank: Rank) -> str:
    return f"values/{epoch}/{rank}"


def _address_towards(host: str) -> str:
    """The address of this node by which others reach it: that of the interface that leads to the store. Recovery
    traffic over the wrong network card has cost others minutes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address
