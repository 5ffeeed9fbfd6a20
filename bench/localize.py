"""Which part of a generated cluster is to blame: what each method names, and how often it blames in a healthy job.

Clusters of 256, 2,048 and 16,384 devices, six windows, faults of every kind of element at several strengths (``mu``
standard deviations for each rank and window; every other fault harms half of what it can), causes that no topology
knows (half of the devices of five hosts), two faults at once, and topologies that are wrong, partial or nearly empty.

- threshold: ranks whose windows sum up to more than 5 % of false discoveries allow; it names no element;
- scan: all elements of the topology;
- gbgp: alone, without the scan;
- product: ``diagnose.localize``, the scan and GBGP for what it leaves.

An element counts as named if one with the same reach is: a device and its only NIC cannot be told apart by scores.
"""

from __future__ import annotations

import statistics

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import planted_faults
from bench.answers import METHODS, answers
from bench.generated_cluster import SHAPES, Cluster
from bench.planted_faults import Fault, Noise
from bench.report import Figure, write
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.topology import Topology

MUS = (1.0, 2.0, 3.0)
WINDOWS = 6
_KINDS = (
    Kind.DEVICE, Kind.NIC, Kind.HOST, Kind.LEAF, Kind.SPINE, Kind.POWER, Kind.TENSOR, Kind.PIPELINE, Kind.DATA,
)  # fmt: skip
_TRIALS = {256: 10, 2_048: 5, 16_384: 2}
"""Of each kind of element."""
_UNKNOWN_TRIALS = {256: 5, 2_048: 4, 16_384: 1}
_WRONG_TRIALS = 3
_HEALTHY, _HEALTHY_LARGE = 600, 20
"""Jobs of each kind of noise."""
_MIDDLE = SHAPES[1]
_TOPOLOGIES = ("right", "wrong", "partial", "missing")
Samples = dict[str, list[float]]


def main() -> None:
    samples: Samples = {}
    measure_known(samples)
    measure_topologies(samples)
    measure_unknown(samples)
    measure_healthy(samples)
    write("localize", figures(samples), samples)
    Console(highlight=False).print(table(samples))


def measure_known(samples: Samples) -> None:
    """Seeds count from 0. The methods are those that need no seconds: GBGP alone is no match for the scan here."""
    for shape in SHAPES:
        for kind in _KINDS:
            for mu in MUS:
                for seed in range(_TRIALS[shape.devices]):
                    cluster, rng = Cluster.of(shape, seed), np.random.default_rng((seed, int(mu)))
                    fault = planted_faults.of_kind(cluster, kind, 1.0 if seed % 2 else 0.5, rng)
                    where = f"{shape.devices}, {kind}, mu {mu:g}"
                    _try(samples, where, cluster, cluster.topology, [fault], mu, ("threshold", "scan"), rng)


def measure_topologies(samples: Samples) -> None:
    """What is believed of 2,048 devices; the fault is one of the true cluster."""
    for kind in (Kind.HOST, Kind.LEAF, Kind.POWER):
        for seed in range(_WRONG_TRIALS):
            cluster, rng = Cluster.of(_MIDDLE, 100 + seed), np.random.default_rng((seed, 100))
            fault = planted_faults.of_kind(cluster, kind, 1.0, rng)
            for name in _TOPOLOGIES:
                believed = _believed(cluster, name, rng)
                where = f"{_MIDDLE.devices}, {kind}, mu 1, {name} topology"
                _try(samples, where, cluster, believed, [fault], 1.0, ("scan", "product"), rng)


def measure_unknown(samples: Samples) -> None:
    for shape in SHAPES:
        for mu in MUS:
            for seed in range(_UNKNOWN_TRIALS[shape.devices]):
                cluster, rng = Cluster.of(shape, 200 + seed), np.random.default_rng((seed, int(mu), 200))
                pair = (Kind.HOST, Kind.LEAF, Kind.POWER, Kind.DATA)
                for name, faults in (
                    ("unknown cause, adjacent hosts", [planted_faults.unknown(cluster, True, rng)]),
                    ("unknown cause, scattered hosts", [planted_faults.unknown(cluster, False, rng)]),
                    ("two faults", [*planted_faults.two(cluster, pair, rng)]),
                ):
                    where = f"{shape.devices}, {name}, mu {mu:g}"
                    _try(samples, where, cluster, cluster.topology, faults, mu, METHODS, rng)


def measure_healthy(samples: Samples) -> None:
    for shape, jobs in ((SHAPES[0], _HEALTHY), (_MIDDLE, _HEALTHY_LARGE)):
        for number, noise in enumerate(Noise):
            for seed in range(jobs):
                cluster, rng = Cluster.of(shape, seed), np.random.default_rng((seed, 300, number))
                scores = planted_faults.scores(cluster, [], 0.0, WINDOWS, noise, rng)
                for method, answer in answers(cluster.topology, scores, ("scan", "gbgp", "product")):
                    name = f"{shape.devices}, healthy, {noise} noise, {method}"
                    samples.setdefault(f"{name}, blames", []).append(float(answer.blames))
                    samples.setdefault(f"{name}, CPU seconds", []).append(answer.seconds)


def _believed(cluster: Cluster, name: str, rng: np.random.Generator) -> Topology:
    match name:
        case "wrong":
            return cluster.with_swapped_hosts(0.1, rng).topology
        case "partial":
            return cluster.known(frozenset(Kind) - {Kind.LEAF, Kind.POWER})
        case "missing":
            return cluster.known(frozenset({Kind.DEVICE, Kind.HOST}))
        case _:
            return cluster.topology


def _try(
    samples: Samples,
    where: str,
    cluster: Cluster,
    believed: Topology,
    faults: list[Fault],
    mu: float,
    methods: tuple[str, ...],
    rng: np.random.Generator,
) -> None:
    scores = planted_faults.scores(cluster, faults, mu, WINDOWS, Noise.NORMAL, rng)
    truth = np.unique(np.concatenate([fault.ranks for fault in faults]))
    to_name = [_reach(cluster, believed, fault) for fault in faults]
    for method, answer in answers(believed, scores, methods):
        samples.setdefault(f"{where}, {method}, F", []).append(answer.f(truth))
        samples.setdefault(f"{where}, {method}, CPU seconds", []).append(answer.seconds)
        samples.setdefault(f"{where}, {method}, blames", []).append(float(answer.blames))
        if method != "threshold" and None not in to_name:
            reaches = [each for each in to_name if each is not None]
            for first in (1, 3):
                share = answer.named(reaches, first * len(reaches) if first == 1 else max(3, len(reaches)))
                samples.setdefault(f"{where}, {method}, top {first}", []).append(share)


def _reach(cluster: Cluster, believed: Topology, fault: Fault) -> bytes | None:
    """What the topology that is believed says of the element that is at fault; None if it does not know it."""
    if fault.element is None:
        return None
    element = cluster.topology.elements[fault.element]
    if element not in believed.elements:
        return None
    return believed.ranks_of(believed.elements.index(element)).tobytes()


def figures(samples: Samples) -> list[Figure]:
    found = []
    for shape in SHAPES:
        for mu in (1, 2):
            rates = [
                statistics.fmean(samples[f"{shape.devices}, {kind}, mu {mu}, scan, top 1"])
                for kind in _KINDS
                if kind not in (Kind.DEVICE, Kind.NIC)
            ]
            found.append(_figure(f"{shape.devices:,} devices, mu {mu}, scan, right element first", rates))
    for shape in SHAPES[:2]:
        for name in ("unknown cause, adjacent hosts", "two faults"):
            for method in METHODS if name != "two faults" else METHODS[1:]:
                key = f"{shape.devices}, {name}, mu 1, {method}, F"
                found.append(_figure(f"{shape.devices:,} devices, mu 1, {name}, {method}, F", samples[key]))
    for method in ("scan", "product"):
        false = [
            v for n, values in samples.items() if "healthy" in n and n.endswith(f"{method}, blames") for v in values
        ]
        rate = 1000 * sum(false) / (WINDOWS * len(false))
        name = f"localize: {method}, false alarms in 1,000 healthy windows, {WINDOWS * len(false):,} tried"
        found.append(Figure(name, rate, "", at_most=1.0))
    for method, devices in (("scan", 16_384), ("product", 2_048), ("product", 16_384)):
        taken = [
            v
            for n, values in samples.items()
            if n.startswith(f"{devices}, unknown") and n.endswith(f"{method}, CPU seconds")
            for v in values
        ]
        found.append(
            Figure(
                f"localize: {method}, {devices:,} devices, something to find, median", statistics.median(taken), "CPU s"
            )
        )
    return found


def _figure(name: str, values: list[float]) -> Figure:
    return Figure(f"localize: {name}, mean", statistics.fmean(values), "")


def table(samples: Samples) -> Table:
    """The means of everything that was tried."""
    columns = ("top 1", "top 3", "F", "blames", "CPU seconds")
    found = Table("what", *columns, "trials", title="localize: means")
    for name in [name.removesuffix(", CPU seconds") for name in samples if name.endswith(", CPU seconds")]:
        values = [samples.get(f"{name}, {column}") for column in columns]
        cells = [f"{statistics.fmean(each):.3f}" if each else "" for each in values]
        found.add_row(name, *cells, str(len(samples[f"{name}, CPU seconds"])))
    return found
