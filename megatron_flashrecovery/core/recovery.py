"""The record of one recovery: from the loss that began it until everybody trains again, over any number of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_flashrecovery.core.ids import Epoch, GroupKey, Rank, Step
from megatron_flashrecovery.core.planner import RecoveryPlan


@dataclass(frozen=True)
class Recovery:
    """``source_of`` names whoever did not go on from live memory. ``seconds`` are those that the core sees: ``park``
    until nobody moved any more, ``replace`` until the last replacement was ready, ``execute`` from the plan until
    everybody had executed it, and the ``total``; all but ``execute`` count from the first event of the recovery."""

    epoch: Epoch
    cause: str
    lost_ranks: tuple[Rank, ...]
    resume_step: Step
    rebuilt: Mapping[GroupKey, str]
    kept: int
    source_of: Mapping[Rank, str]
    seconds: Mapping[str, float]


@dataclass
class Timeline:
    """The recovery that is under way. Later epochs of the same recovery overwrite the moments of earlier ones."""

    opened: float
    causes: list[str] = field(default_factory=list)
    lost: set[Rank] = field(default_factory=set)
    parked: float = 0.0
    staffed: float = 0.0
    planned: float = 0.0

    def close(self, plan: RecoveryPlan, now: float) -> Recovery:
        return Recovery(
            plan.epoch,
            "; ".join(self.causes),
            tuple(sorted(self.lost)),
            plan.resume_step,
            plan.rebuild,
            plan.kept,
            {rank: str(origin) for rank, origin in plan.origin_of.items()},
            {
                "park": self.parked - self.opened,
                "replace": self.staffed - self.opened,
                "execute": now - self.planned,
                "total": now - self.opened,
            },
        )
