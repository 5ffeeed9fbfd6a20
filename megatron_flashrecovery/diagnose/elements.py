"""The parts of a cluster and of a job that can be to blame."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The first six are hardware, the others communicators."""

    DEVICE = "device"
    NIC = "NIC"
    HOST = "host"
    LEAF = "leaf switch"
    SPINE = "spine switch"
    POWER = "power domain"
    TENSOR = "tensor-parallel group"
    PIPELINE = "pipeline"
    DATA = "data-parallel group"
    GROUP = "group"

    @property
    def is_hardware(self) -> bool:
        return self in _HARDWARE


_HARDWARE = frozenset({Kind.DEVICE, Kind.NIC, Kind.HOST, Kind.LEAF, Kind.SPINE, Kind.POWER})


@dataclass(frozen=True, order=True)
class Element:
    """``name`` is unique among those of its kind; a device is named after its host, ``node7/3``."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"
