"""The layers of a cluster as networks: hardware that is wired together, and communicators of each kind.

A unit (a host, or a rank) is a vertex of every layer, and the only kind of vertex of which something is measured.
Elements connect: in the physical layer as they are wired, in a logical layer as hubs, one for each communicator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.gbgp import Blocks, Coupling, Network, Problem, layered
from megatron_flashrecovery.diagnose.search import Strengths
from megatron_flashrecovery.diagnose.topology import Indices, Topology

Values = npt.NDArray[np.float64]
_LOGICAL = (Kind.TENSOR, Kind.PIPELINE, Kind.DATA, Kind.GROUP)


@dataclass(frozen=True, eq=False)
class Posed:
    """``unit_of``: (size,) the place among the units of each entry of the problem, -1 for what only connects."""

    problem: Problem
    unit_of: Indices


class Layers:
    """Those of one topology, seen in ``units``: (world,) the unit of each rank, which is a rank itself or a host. What
    lies inside one unit (a device, a NIC) is that unit. Costs O(elements + reach) once, and less for every set."""

    def __init__(self, topology: Topology, units: Indices) -> None:
        self._units = int(units.max(initial=-1)) + 1
        filled = np.diff(topology.start) > 0
        reached, begins = units[topology.ranks], topology.start[:-1][filled]
        lowest = np.minimum.reduceat(reached, begins) if begins.size else begins
        inside = np.zeros(filled.size, dtype=bool)
        inside[filled] = lowest == (np.maximum.reduceat(reached, begins) if begins.size else begins)
        vertex = self._units + np.arange(filled.size)
        vertex[inside] = lowest[inside[filled]]
        owner = np.repeat(np.arange(filled.size), np.diff(topology.start))
        several = ~inside[owner]
        self._reach = np.unique(np.stack((reached[several], vertex[owner[several]]), axis=1), axis=0)
        kinds = np.array([element.kind for element in topology.elements])
        kind_of = kinds[self._reach[:, 1] - self._units]
        hardware = self._reach[np.isin(kind_of, [kind for kind in Kind if kind.is_hardware])]
        self._wires = _with_hanging(vertex[topology.edges.reshape(-1, 2)], hardware, self._units)
        members = [self._reach[kind_of == kind] for kind in _LOGICAL]
        self._members = [each for each in members if each.size]

    def posed(self, units: Indices, gains: Values, strengths: Strengths) -> Posed:
        """``units``: sorted, those that may be part of what is found, at least one. ``gains``: (moments, units) what
        each contributes; what is not finite was not measured.

        An element is left out if it connects nothing, and so is a logical layer without an edge."""
        moments, count = gains.shape
        networks = self.networks(units)
        place = np.arange(count)
        unit_of, entries, first = [], [], 0
        for network in networks:
            unit_of += [np.concatenate((place, np.full(network.vertices - count, -1)))] * moments
            entries.append(first + network.vertices * np.arange(moments)[:, None] + place)
            first += network.vertices * moments
        gain, at = np.zeros(first), np.stack(entries)
        gain[at] = np.where(np.isfinite(gains), gains, 0.0)
        counted = np.zeros(first)
        counted[at] = np.isfinite(gains)
        couplings = (
            Coupling(_pairs(np.broadcast_to(at[:1], at[1:].shape), at[1:]), strengths.sits_on),
            Coupling(_pairs(at[:, :-1], at[:, 1:]), strengths.moment_later),
        )
        blocks = Blocks(tuple(network for network in networks for _ in range(moments)))
        return Posed(layered(blocks, gain, counted, couplings), np.concatenate(unit_of))

    def networks(self, units: Indices) -> list[Network]:
        """Of the layers. The first vertices of each are these units, in their order, the others connect them."""
        physical, *logical = (_network(units, edges) for edges in self._edges(units))
        return [physical, *(network for network in logical if network.edges.size)]

    def _edges(self, units: Indices) -> Iterator[Indices]:
        chosen = np.zeros(self._units, dtype=bool)
        chosen[units] = True
        touched = np.zeros(max(self._units, *(int(each.max(initial=-1)) + 1 for each in (self._wires, self._reach))))
        touched[units] = 1
        touched[self._reach[chosen[self._reach[:, 0]], 1]] = 1
        yield self._wires[touched[self._wires].all(axis=1)]
        for members in self._members:
            yield members[chosen[members[:, 0]]]


def _pairs(first: Indices, second: Indices) -> Indices:
    return np.stack((first.reshape(-1), second.reshape(-1)), axis=1)


def _with_hanging(wires: Indices, reach: Indices, units: int) -> Indices:
    """A unit without a wire (a rank whose device is not known) hangs on the smallest hardware that reaches it."""
    wires = np.unique(wires[wires[:, 0] != wires[:, 1]], axis=0)
    hanging = np.setdiff1d(np.arange(units), wires)
    sizes = np.bincount(reach[:, 1]) if reach.size else np.zeros(0)
    among = reach[np.isin(reach[:, 0], hanging)]
    among = among[np.lexsort((sizes[among[:, 1]], among[:, 0]))]
    _, first = np.unique(among[:, 0], return_index=True)
    return np.concatenate((wires, among[first]))


def _network(units: Indices, edges: Indices) -> Network:
    """``units`` sorted; ``edges`` among them and elements, whose numbers are higher than those of all units."""
    edges = _without_dead_ends(units, edges)
    elements = np.setdiff1d(edges, units)
    vertices = np.concatenate((units, elements))
    return Network.of(vertices.size, np.searchsorted(vertices, edges))


def _without_dead_ends(units: Indices, edges: Indices) -> Indices:
    while edges.size:
        ends, degree = np.unique(edges, return_counts=True)
        dead = np.setdiff1d(ends[degree == 1], units, assume_unique=True)
        if not dead.size:
            break
        edges = edges[~np.isin(edges, dead).any(axis=1)]
    return edges
