"""Whether the controller's machine can still be reached, from a node that it does not run on.

A node that the controller does not hear is given up there, and its seats may be taken by others: its workers must end,
also where no message can tell them to. An agent sends a heartbeat all the time, so it knows by what is acknowledged.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_flashrecovery.detect.acknowledgements import Acknowledgements
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_messages import Dismiss

_EVERY = 0.2


class Vigil:
    def __init__(self, config: LaunchConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._acknowledgements = Acknowledgements(config.master_port) if config.node_rank else None
        self._patience = config.deadlines.heartbeat_timeout
        self._clock = clock
        self._next_look = clock()

    def look(self) -> Dismiss | None:
        """What to end this node with."""
        now = self._clock()
        if self._acknowledgements is None or now < self._next_look:
            return None
        self._next_look = now + _EVERY
        silence = self._acknowledgements.silence(now)
        if silence < self._patience:
            return None
        reason = f"the controller's machine has acknowledged nothing for {silence:.1f} s, so it has given up this node"
        return Dismiss(f"{reason}: its workers end here", 1, at_once=True)
