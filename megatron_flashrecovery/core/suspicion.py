"""Devices that the driver has complained of: one that does so again, or is gone, is not used any more."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Loss
from megatron_flashrecovery.core.policy import Action, Fault, History, decide

_OF_A_DEVICE = frozenset({Fault.DEVICE_ERROR, Fault.DEVICE_POISONED, Fault.DEVICE_LOST})


def why_to_replace_node(job: Job, node: NodeId, losses: Iterable[Loss]) -> str | None:
    """Because of what is behind these losses, which are counted with this."""
    for loss in losses:
        if loss.fault not in _OF_A_DEVICE:
            continue
        if not _is_of_the_script(loss):
            job.suspicions[node, loss.rank] += 1
        rule = decide(loss.fault, History(suspicions=job.suspicions[node, loss.rank]))
        if rule.action is Action.REPLACE_NODE:
            when = "" if rule.when == "always" else f" ({rule.when})"
            return f"the device of rank {loss.rank} is of no more use{when}: {loss.cause}"
    return None


def _is_of_the_script(loss: Loss) -> bool:
    """An access to memory that does not exist is as often a bug as a broken device: as long as the driver itself does
    not complain, it is judged by how often the seat is lost."""
    return loss.raised is not None and loss.fault is Fault.DEVICE_ERROR
