"""The sign of life of an agent, by which its node is known not to have vanished."""

from __future__ import annotations

import threading

from megatron_flashrecovery.comm.control import ControlClient
from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.runtime.injections import Injections
from megatron_flashrecovery.runtime.node_messages import Heartbeat


class Heart:
    """Beats on a thread of its own: the agent may be busy with allocating memory, and is not dead for that."""

    def __init__(self, node: NodeId, control: ControlClient, interval: float, injections: Injections) -> None:
        self._node = node
        self._control = control
        self._interval = interval
        self._injections = injections
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, name="flashrecovery-heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval):
            if not self._injections.are_heartbeats_dropped():
                self._control.send(Heartbeat(self._node))
