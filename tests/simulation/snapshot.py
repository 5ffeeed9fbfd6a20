"""Simulated snapshots: what is captured, with a fingerprint by its owner."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.simulation.fabric import mix


@dataclass(frozen=True)
class Snapshot:
    """``timeline`` is a running hash of the epochs in which the steps were computed: it tells apart two computations of
    the same step. ``master`` is 0 with a replicated optimizer, of which only values are captured."""

    step: int
    master: int
    values: int
    timeline: int
    fingerprint: int
    is_poisoned: bool = False
    """Its keeper's memory may have been wrong: nothing may be restored from it, whatever its fingerprint says."""

    @classmethod
    def take(cls, step: int, master: int, values: int, timeline: int) -> Snapshot:
        return cls(step, master, values, timeline, mix(step, master, values, timeline))

    def is_sound(self) -> bool:
        return self.fingerprint == mix(self.step, self.master, self.values, self.timeline)

    def corrupted(self) -> Snapshot:
        return replace(self, values=mix(self.values, 1))

    def poisoned(self) -> Snapshot:
        return replace(self, is_poisoned=True)


def keep(slots: dict[int, Snapshot], snapshot: Snapshot) -> None:
    """Two slots: the newest two steps."""
    slots[snapshot.step] = snapshot
    while len(slots) > 2:
        del slots[min(slots)]
