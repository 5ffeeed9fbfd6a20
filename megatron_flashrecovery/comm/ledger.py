"""What a member has issued and completed on one communicator: by these counts it is kept, or is not."""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Protocol

from megatron_flashrecovery.comm.counterpart import Trace, form_of
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.reports import GroupCount, PairCount

_MASK = (1 << 63) - 1
_OUTSTANDING_BEFORE_POLL = 64
_TRACES_KEPT = 8
"""Of how many operations a peer may be told that it lacks them: as far as members run ahead of each other."""


class Pollable(Protocol):
    def poll(self) -> None:
        """Look, without blocking, whether the operation is over, and settle its entry if it is."""

    def drain(self) -> None:
        """Have somebody else wait for it, if that is the only way to learn that it is over."""


class Entry:
    """One issued operation. ``peers`` are the global ranks at the other ends, once per message."""

    __slots__ = ("collective", "peers", "period", "settled")

    def __init__(self, period: int, collective: bool, peers: tuple[Rank, ...] = ()) -> None:
        self.period = period
        self.collective = collective
        self.peers = peers
        self.settled = False


class _Pair:
    __slots__ = ("open", "received", "receives", "sends", "sent")

    def __init__(self) -> None:
        self.sent = self.received = self.open = 0
        self.sends: deque[Trace | None] = deque(maxlen=_TRACES_KEPT)
        self.receives: deque[Trace | None] = deque(maxlen=_TRACES_KEPT)

    def count(self) -> PairCount:
        sends, receives = tuple(map(form_of, self.sends)), tuple(map(form_of, self.receives))
        return PairCount(self.sent, self.received, self.open, sends, receives)


class Ledger:
    """Written by the thread that issues operations, read by any thread. All methods are safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._token_of: dict[Hashable, int] = {}
        self._period = 0
        self._outstanding: dict[Entry, Pollable] = {}
        self._broken: str | None = None
        self._clear()

    def _clear(self) -> None:
        self._issued = self._completed = self._digest = 0
        self._pairs: dict[Rank, _Pair] = {}
        self._recent: deque[Trace | None] = deque(maxlen=_TRACES_KEPT)

    @property
    def issued(self) -> int:
        return self._issued

    @property
    def has_outstanding(self) -> bool:
        return bool(self._outstanding)

    def issue(self, signature: Hashable, trace: Trace | None = None) -> Entry:
        """Count a collective. The digest is over what every member must pass alike, in the order of issue."""
        token = self._token_of.get(signature)
        if token is None:
            # crc32, not hash(): strings hash differently in every process. Cached: the text costs more than the rest.
            token = self._token_of[signature] = zlib.crc32(repr(signature).encode())
        with self._lock:
            self._issued += 1
            self._recent.append(trace)
            self._digest = (self._digest * 1_000_003 + token) & _MASK
            return Entry(self._period, True)

    def issue_pairs(
        self, sends: tuple[Rank, ...], receives: tuple[Rank, ...], traces: Sequence[Trace | None] = ()
    ) -> Entry:
        """``traces`` are those of the sends, then those of the receives."""
        trace = iter(traces)
        with self._lock:
            for rank in sends:
                pair = self._pair(rank)
                pair.sent += 1
                pair.open += 1
                pair.sends.append(next(trace, None))
            for rank in receives:
                pair = self._pair(rank)
                pair.received += 1
                pair.open += 1
                pair.receives.append(next(trace, None))
            return Entry(self._period, False, sends + receives)

    def _pair(self, rank: Rank) -> _Pair:
        pair = self._pairs.get(rank)
        if pair is None:
            pair = self._pairs[rank] = _Pair()
        return pair

    def watch(self, entry: Entry, pending: Pollable) -> None:
        """Remember an operation that may complete without anybody waiting for it."""
        self._outstanding[entry] = pending
        if len(self._outstanding) > _OUTSTANDING_BEFORE_POLL:
            self.refresh()

    def under_way(self) -> list[Pollable]:
        """Operations that nobody has seen the end of, the oldest first. From any thread."""
        return list(self._outstanding.values())

    def received_from(self, rank: Rank) -> None:
        """A receive from anybody turned out to be from this rank."""
        with self._lock:
            pair = self._pair(rank)
            pair.received += 1
            pair.receives.append(None)

    def complete(self, entry: Entry) -> None:
        """Repeating it changes nothing, nor does completing what was issued before the counts began again."""
        with self._lock:
            self._outstanding.pop(entry, None)
            if entry.settled:
                return
            entry.settled = True
            if entry.period != self._period:
                return
            self._completed += entry.collective
            for rank in entry.peers:
                self._pairs[rank].open -= 1

    def fail(self, entry: Entry, reason: str) -> None:
        """The operation will never complete: it stays open, and the communicator is broken."""
        with self._lock:
            self._outstanding.pop(entry, None)
            entry.settled = True
            if entry.period == self._period and self._broken is None:
                self._broken = reason

    def mark_broken(self, reason: str) -> None:
        with self._lock:
            self._broken = self._broken or reason

    def reset(self) -> None:
        """Begin again at zero; operations of before neither count nor are watched any longer. A broken communicator
        stays broken, whatever is counted."""
        with self._lock:
            self._period += 1
            self._outstanding.clear()
            self._clear()

    def begin(self) -> None:
        """Count for a new communicator."""
        self.reset()
        self._broken = None

    def refresh(self) -> None:
        for pending in list(self._outstanding.values()):
            pending.poll()

    def drain(self) -> None:
        for pending in list(self._outstanding.values()):
            pending.drain()

    def count(self) -> GroupCount:
        with self._lock:
            pairs = {rank: pair.count() for rank, pair in self._pairs.items()}
            recent = tuple(map(form_of, self._recent))
            return GroupCount(self._issued, self._completed, self._digest, pairs, self._broken, recent)
