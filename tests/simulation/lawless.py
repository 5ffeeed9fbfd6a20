"""Protections switched off: members and a coordinator without epochs, a census without counts."""

from __future__ import annotations

from dataclasses import replace

from megatron_flashrecovery.core.census import Census
from megatron_flashrecovery.core.coordinator import Job
from megatron_flashrecovery.core.ids import GroupKey, OrderNumber, Rank
from megatron_flashrecovery.core.member import Action, Member, Mode, Order
from megatron_flashrecovery.core.messages import (
    CheckpointWritten,
    ClockTicked,
    Event,
    NodeJoined,
    NodeLost,
    Park,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Draining


class LawlessMember(Member):
    """Obeys whatever comes, whenever it comes."""

    def __init__(self, member: Member) -> None:
        super().__init__(member.rank, member.epoch, member.is_first)

    def receive(self, order: Order) -> Action | None:
        if isinstance(order, Park) and self.mode is not Mode.LEFT:
            self.epoch = type(self.epoch)(min(self.epoch, order.epoch - 1))
        self.number = OrderNumber(-1)
        if not isinstance(order, Park):
            order = replace(order, epoch=self.epoch)
        return super().receive(order)


class BlindCensus(Census):
    """Without invariant 7: keeps every group that lost no member and that nobody says is broken."""

    def rebuild(self) -> dict[GroupKey, str]:
        return {key: reason for key, reason in super().rebuild().items() if not self.is_whole(key)}


class CarelessCensus(Census):
    """Void contents may go to anybody, also to whoever is in the middle of its update."""

    def is_before_update(self, rank: Rank) -> bool:
        return True


def care_for_no_update(job: Job) -> None:
    if isinstance(job.phase, Draining):
        job.phase.census.__class__ = CarelessCensus


def trust_blindly(job: Job) -> None:
    if isinstance(job.phase, Draining):
        job.phase.census.__class__ = BlindCensus


def without_epochs(event: Event, job: Job) -> Event:
    if isinstance(event, WorkersLost | NodeLost | NodeJoined | CheckpointWritten | ClockTicked):
        return event
    return replace(event, epoch=job.epoch)
