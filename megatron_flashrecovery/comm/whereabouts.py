"""Inside which operation each thread of this process is blocked right now, and since when."""

from __future__ import annotations

import threading
import time

from megatron_flashrecovery.core.messages import Spot


class Whereabouts:
    """Each thread writes its own entry only, and single dictionary operations are atomic, so there is no lock."""

    def __init__(self) -> None:
        self._inside: dict[int, tuple[Spot, float]] = {}

    def enter(self, spot: Spot) -> None:
        self._inside[threading.get_ident()] = (spot, time.monotonic())

    def leave(self) -> None:
        self._inside.pop(threading.get_ident(), None)

    def standing(self) -> tuple[Spot, float] | None:
        """The one that has been blocked for longest."""
        return min(self._inside.copy().values(), key=lambda entry: entry[1], default=None)
