"""What a seat leaves to whoever takes it on another node: posted for all, because its agent may be gone with its node.

The record of its start, which reports are out already, and which faults have been inflicted. Without spare nodes the
agent alone keeps these, and nothing is posted.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from megatron_flashrecovery.comm.startup_record import StartupRecord
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.runtime.bulletin import Bulletin
from megatron_flashrecovery.runtime.dialogue import InjectionOrder, Seat
from megatron_flashrecovery.runtime.injection import is_always

_NONE = Step(-1)
_REPORTED = msgspec.msgpack.Decoder(dict[str, Step])


class Estate:
    """``record`` is what a replacement starts by, None for anybody else. ``reported`` is the newest step of each kind
    of report that predecessors have written. ``injections`` are those that are still to be inflicted."""

    def __init__(self, seat: Seat, bulletin: Bulletin) -> None:
        self._seat = seat
        self._bulletin = bulletin
        self.reported: Mapping[str, Step] = seat.reported
        self.record: StartupRecord | None = None
        self.injections = seat.injections
        if seat.joining:
            self.record = StartupRecord.from_bytes(seat.startup or bulletin.read_newest(_startup_key(seat.rank)))
        if seat.joining and seat.may_move:
            # The agent may have been told of one that was not posted any more.
            posted = _REPORTED.decode(bulletin.read_newest(_reported_key(seat.rank)))
            names = posted.keys() | seat.reported.keys()
            self.reported = {name: max(posted.get(name, _NONE), seat.reported.get(name, _NONE)) for name in names}
        if seat.may_move:
            self.injections = tuple(each for each in seat.injections if not bulletin.has(_fired_key(seat.rank, each)))
        self._all_reported = dict(self.reported)

    def begin(self, startup: bytes) -> None:
        """Before the first step of a start of the whole job: what an earlier one has left counts no more."""
        if self._seat.may_move:
            self._bulletin.post_newest(_startup_key(self._seat.rank), self._seat.epoch, startup)
            self._post_reported({})

    def note_reported(self, name: str, step: Step) -> None:
        if self._seat.may_move:
            self._all_reported[name] = step
            self._post_reported(self._all_reported)

    def note_fired(self, order: InjectionOrder) -> None:
        """Any thread, right before it is inflicted."""
        if self._seat.may_move and not is_always(order.options):
            self._bulletin.post(_fired_key(self._seat.rank, order), b"")

    def _post_reported(self, reported: Mapping[str, Step]) -> None:
        encoded = msgspec.msgpack.encode(reported)
        self._bulletin.post_newest(_reported_key(self._seat.rank), self._seat.epoch, encoded)


def _startup_key(rank: Rank) -> str:
    return f"startup/{rank}"


def _reported_key(rank: Rank) -> str:
    return f"reported/{rank}"


def _fired_key(rank: Rank, order: InjectionOrder) -> str:
    """Agents number by themselves what is asked for later on, so the number alone would not do."""
    return f"fired/{rank}/{order.index}.{order.kind}.{order.step}.{order.at}"
