"""A cluster of hosts with eight devices, the job on it, and what can be known of both.

A host has eight NICs, one for each device, all on one leaf switch. Leaves hang below spine switches, and a power domain
has two hosts of each of two neighbouring leaves. The scheduler has given the hosts out in no order: what is next to
each other in the job is not in the racks. Tensor parallelism fills a host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.core.layout import ParallelLayout, megatron_layout
from megatron_flashrecovery.diagnose.elements import Element, Kind
from megatron_flashrecovery.diagnose.topology import Topology

Indices = npt.NDArray[np.int64]
PER_HOST = 8


@dataclass(frozen=True)
class Shape:
    """``leaf``: hosts below a leaf switch. ``pipeline``: stages of the job. ``rails``: NIC k of the hosts of a whole
    block of leaves is on leaf k of that block, instead of all NICs of a host on the leaf of its rack."""

    devices: int
    pipeline: int
    leaf: int
    spines: int
    rails: bool = False

    @property
    def hosts(self) -> int:
        return self.devices // PER_HOST


SHAPES = (
    Shape(256, pipeline=4, leaf=4, spines=2),
    Shape(2_048, pipeline=8, leaf=8, spines=4),
    Shape(16_384, pipeline=16, leaf=16, spines=8),
)


@dataclass(frozen=True, eq=False)
class Cluster:
    """``place_of``: (hosts,) the place in the racks of each host, in the order of its ranks."""

    shape: Shape
    place_of: Indices

    @staticmethod
    def of(shape: Shape, seed: int) -> Cluster:
        return Cluster(shape, np.random.default_rng(seed).permutation(shape.hosts).astype(np.int64))

    @cached_property
    def layout(self) -> ParallelLayout:
        return megatron_layout(self.shape.devices, tensor=PER_HOST, pipeline=self.shape.pipeline)

    @cached_property
    def strata(self) -> Indices:
        """(ranks,) the pipeline stage: who computes the same."""
        return np.arange(self.shape.devices) * self.shape.pipeline // self.shape.devices

    @cached_property
    def topology(self) -> Topology:
        """As it is."""
        return self.known(frozenset(Kind))

    def known(self, kinds: frozenset[Kind]) -> Topology:
        """As one who knows of these kinds only sees it."""
        hardware, groups = self._hardware(), self._groups()
        labels = {kind: of for kind, of in {**hardware, **groups}.items() if kind in kinds}
        return _topology(labels, self.shape.devices)

    def with_swapped_hosts(self, share: float, rng: np.random.Generator) -> Cluster:
        """A list of places that is out of date: of so many hosts each is believed to be where another one is."""
        wrong = rng.choice(self.shape.hosts, size=max(2, round(share * self.shape.hosts)), replace=False)
        place_of = self.place_of.copy()
        place_of[wrong] = np.roll(place_of[wrong], 1)
        return replace(self, place_of=place_of)

    def _hardware(self) -> dict[Kind, Indices]:
        """For each kind the element of each rank."""
        shape, rank = self.shape, np.arange(self.shape.devices, dtype=np.int64)
        place = self.place_of[rank // PER_HOST]
        rack, pair = place // shape.leaf, place // (2 * shape.leaf)
        leaf = place // (PER_HOST * shape.leaf) * PER_HOST + rank % PER_HOST if shape.rails else rack
        return {
            Kind.DEVICE: rank,
            Kind.NIC: rank,
            Kind.HOST: rank // PER_HOST,
            Kind.LEAF: leaf,
            Kind.SPINE: place * shape.spines // shape.hosts,
            Kind.POWER: pair * (shape.leaf // 2) + place % (shape.leaf // 2),
        }

    def _groups(self) -> dict[Kind, Indices]:
        found = {}
        for kind, axis in ((Kind.TENSOR, "tp"), (Kind.PIPELINE, "pp"), (Kind.DATA, "dp")):
            of = np.empty(self.shape.devices, dtype=np.int64)
            for number, group in enumerate(self.layout.groups(axis)):
                of[list(group)] = number
            found[kind] = of
        return found


_NEXT_TO: Mapping[Kind, Sequence[Kind]] = {
    Kind.DEVICE: (Kind.HOST, Kind.NIC),
    Kind.NIC: (Kind.HOST, Kind.LEAF),
    Kind.HOST: (Kind.POWER,),
    Kind.LEAF: (Kind.SPINE,),
}


def _topology(labels: Mapping[Kind, Indices], world: int) -> Topology:
    elements: list[Element] = []
    element_of: dict[Kind, Indices] = {}
    sizes: list[Indices] = []
    ranks: list[Indices] = []
    for kind, of in labels.items():
        element_of[kind] = len(elements) + of
        counts = np.bincount(of)
        elements += [Element(kind, _name(kind, number)) for number in range(counts.size)]
        sizes.append(counts)
        ranks.append(np.argsort(of, kind="stable"))
    near = [
        np.unique(np.stack((element_of[kind], element_of[other]), axis=1), axis=0)
        for kind, others in _NEXT_TO.items()
        for other in others
        if kind in labels and other in labels
    ]
    return Topology(
        elements=tuple(elements),
        start=np.concatenate(([0], np.cumsum(np.concatenate(sizes)))).astype(np.int64),
        ranks=np.concatenate(ranks).astype(np.int64),
        edges=np.concatenate([np.empty((0, 2), dtype=np.int64), *near]),
        device_of=element_of.get(Kind.DEVICE, np.full(world, -1, dtype=np.int64)),
    )


def _name(kind: Kind, number: int) -> str:
    if kind in (Kind.DEVICE, Kind.NIC):
        return f"node{number // PER_HOST}/{number % PER_HOST}"
    return f"node{number}" if kind is Kind.HOST else str(number)
