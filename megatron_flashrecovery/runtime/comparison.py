"""A host compares what its guests say of the parameters that they share with what it says itself."""

from __future__ import annotations

from collections.abc import Collection

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.runtime.checksum import Checksum, differing
from megatron_flashrecovery.runtime.dialogue import GuestDiffers
from megatron_flashrecovery.runtime.keeper import Keeper


class Comparison:
    """On the mirror thread, before it delivers a mirror: then those of the step before are all there, and whoever would
    overwrite them waits for this one."""

    def __init__(self, keeper: Keeper, channel: Channel, checksum: Checksum | None, peers: Collection[Rank]) -> None:
        self._keeper = keeper
        self._channel = channel
        self._checksum = checksum
        self._peers = frozenset(peers)

    def __call__(self, delivered: Step, epoch: Epoch) -> None:
        if self._checksum is None or (bodies := self._keeper.bodies(Step(delivered - 1))) is None:
            return
        own, of_guests = bodies
        step, guests = differing(own, {guest: body for guest, body in of_guests.items() if guest in self._peers})
        for guest in guests:
            part = self._checksum.part_of(step)
            self._channel.send(GuestDiffers(epoch, step, guest, len(self._peers), part))
