"""A fake session for handles: lets everything pass until a test decides, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from megatron_flashrecovery.comm.parking import Proceed, Verdict
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.reports import Spot

Decide = Callable[[Spot], Verdict]
DecideFailed = Callable[[Spot, Exception], Verdict]


class FakeParking:
    """``entering`` and ``failing`` decide; what they do not decide proceeds, or raises the operation's own error.

    ``entered``, ``failures`` and ``results`` keep what the handles reported. Safe to read from any thread.
    """

    def __init__(self, *, entering: Decide | None = None, failing: DecideFailed | None = None) -> None:
        self.entering = entering
        self.failing = failing
        self.entered: list[Spot] = []
        self.failures: list[tuple[Spot, Exception]] = []
        self.results: list[tuple[Spot, tuple[bytes, ...] | None]] = []
        self.gone: list[Rank] = []
        self._lock = threading.Lock()

    def before(self, spot: Spot) -> Verdict:
        with self._lock:
            self.entered.append(spot)
        return Proceed() if self.entering is None else self.entering(spot)

    def failed(self, spot: Spot, error: Exception) -> Verdict:
        with self._lock:
            self.failures.append((spot, error))
        if self.failing is None:
            raise error
        return self.failing(spot, error)

    def completed(self, spot: Spot, results: Sequence[bytes] | None) -> None:
        with self._lock:
            self.results.append((spot, None if results is None else tuple(results)))

    def blocked_by(self, rank: Rank) -> None:
        self.gone.append(rank)
