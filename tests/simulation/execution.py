"""How a simulated rank executes its share of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.reports import Update
from megatron_flashrecovery.core.shares import Share, Source
from tests.simulation.fabric import Communicator, mix
from tests.simulation.program import Collective, Pause, Program, _int
from tests.simulation.snapshot import Snapshot

if TYPE_CHECKING:
    from tests.simulation.worker import Worker


class Failure(Exception):
    """The share cannot be executed."""


class ConnectionLost(Failure):
    """While a communicator was made, and nobody was lost."""


@dataclass(frozen=True)
class Connect:
    """Wait until every member has joined the new communicator."""

    communicator: Communicator


@dataclass(frozen=True)
class News:
    """Wait for a mirror, a peer's state, or the acknowledgement of the own mirror."""

    what: str


def execute(me: Worker, resume_step: Step, regather: bool, share: Share) -> Program:
    """Discard, rebuild, give, restore, gather, agree, capture, mirror."""
    me.told = []
    me.is_void = False
    was_live = _is_live(me, resume_step)
    me.discard(resume_step)
    yield Pause()
    comms = [me.rejoin(key) for key in share.rebuild]
    try:
        for comm in comms:
            yield Connect(comm)  # type: ignore[misc]
    except ConnectionLost as lost:
        if share.source is Source.LIVE:
            raise
        raise Failure(str(lost)) from lost
    if share.source is Source.LIVE:
        _stay(me, resume_step, was_live)
    _give(me, resume_step, share)
    if share.source is not Source.LIVE:
        me.is_half_restored = True
        yield Pause()
        if share.source is Source.PEER:
            state = yield News("state")  # type: ignore[misc]
            me.params, me.master, timeline = state  # type: ignore[misc]
        held: object
        if share.source is Source.MIRROR or share.unique_from is not None:
            held = yield News("mirror")  # type: ignore[misc]
        else:
            held = me.own.get(resume_step)
        snapshot = _checked(me, held, resume_step)
        if share.source is Source.PEER and snapshot.timeline != timeline:
            me.world.monitor.blame(f"rank {me.rank} got values and state of different timelines of step {resume_step}")
        if share.source is not Source.PEER:
            me.master = snapshot.master
        me.values, me.timeline, me.step, me.update = snapshot.values, snapshot.timeline, resume_step, Update.BEFORE
        me.is_half_restored = False
    if regather:
        me.params = _int((yield Collective("dp", "gather", me.master)))
    members = me.model.groups[me.keys["dp"]]
    seen = _int((yield Collective("dp", "check", mix(me.params))))
    if seen != mix(*(mix(me.params) for _ in members)):
        me.world.monitor.blame(f"rank {me.rank}: data-parallel peers disagree at step {resume_step}")
    me.capture(me.step, me.master if me.model.sharded else 0, me.timeline)
    yield News("acknowledged")  # type: ignore[misc]
    me.executed()


def _is_live(me: Worker, step: Step) -> bool:
    if me.step == step:
        return me.update in (Update.BEFORE, Update.ARMED)
    return not me.model.sharded and me.step + 1 == step and me.update is Update.APPLIED


def _stay(me: Worker, step: Step, was_live: bool) -> None:
    """Live memory is the state already; early pieces come from the own copy."""
    if not was_live:
        me.world.monitor.blame(f"rank {me.rank} is to stay at step {step}, but is {me.update.value} at {me.step}")
    if step not in me.own:
        me.world.monitor.blame(f"rank {me.rank} is to stay at step {step} and has no copy of it")
        return
    if me.own[step].is_poisoned:
        me.world.monitor.blame(f"rank {me.rank} takes values from a poisoned snapshot of step {step}")
    if me.update is Update.APPLIED:
        me.params = mix(me.master)
    me.values, me.timeline, me.step, me.update = me.own[step].values, me.own[step].timeline, step, Update.BEFORE


def _give(me: Worker, step: Step, share: Share) -> None:
    for rank in share.gives_mirror_to:
        held = me.guests.get(rank, {}).get(step)
        if held is None:
            me.world.monitor.blame(f"rank {me.rank} has no mirror of rank {rank} at step {step}")
        else:
            me.world.transfer(me, rank, "mirror", held)
    for rank in share.gives_state_to:
        me.world.transfer(me, rank, "state", (me.params, me.master, me.timeline))


def _checked(me: Worker, held: object, step: Step) -> Snapshot:
    """Invariant 8: a state whose fingerprint does not match does not exist."""
    if not isinstance(held, Snapshot):
        raise Failure(f"there is no snapshot of step {step}")
    if held.is_poisoned:
        me.world.monitor.blame(f"rank {me.rank} is restored from a poisoned snapshot of step {step}")
    if not held.is_sound() and "fingerprint" not in me.world.off:
        raise Failure(f"the snapshot of step {step} is not what its owner sent")
    return held
