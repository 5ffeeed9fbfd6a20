"""Inside which operation each thread of this process is blocked right now, and since when."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from megatron_flashrecovery.core.reports import Spot


class Watch(Protocol):
    """Somebody outside who wants to know, too."""

    def enter(self, group: str, operation: str) -> None: ...
    def leave(self) -> None: ...


class Whereabouts:
    """Each thread writes its own entry only, and single dictionary operations are atomic, so there is no lock."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._inside: dict[int, tuple[Spot, float]] = {}
        self._watch = watch

    def enter(self, spot: Spot) -> None:
        self._inside[threading.get_ident()] = (spot, time.monotonic())
        if self._watch is not None:
            self._watch.enter(spot.group, spot.operation)

    def leave(self) -> None:
        self._inside.pop(threading.get_ident(), None)
        if self._watch is not None:
            self._watch.leave()

    def standing(self) -> tuple[Spot, float] | None:
        """The one that has been blocked for longest."""
        return min(self._inside.copy().values(), key=lambda entry: entry[1], default=None)
