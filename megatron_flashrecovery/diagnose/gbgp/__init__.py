"""Graph Block-structured Gradient Projection: which connected parts of several networks are anomalous together.

A library of its own: nothing here knows of ranks or clusters. Needs the extra ``diagnose``. See docs/gbgp.md for what
goes in, what comes out, what it costs and why it is a heuristic.

    problem = evolving(Network.of(vertices, edges), scores, strength=0.01)
    solution = solve(problem, Settings(sparsity=150))
    found = regions(problem, solution.x)
"""

from __future__ import annotations

from megatron_flashrecovery.diagnose.gbgp.applications import evolving, layered, network_of_networks
from megatron_flashrecovery.diagnose.gbgp.coupling import Coupling, in_succession
from megatron_flashrecovery.diagnose.gbgp.limits import Limits
from megatron_flashrecovery.diagnose.gbgp.network import Blocks, Cut, Network, cut
from megatron_flashrecovery.diagnose.gbgp.objective import Objective, OneRatio, Scored, SumOfRatios, WithStart
from megatron_flashrecovery.diagnose.gbgp.projection import Model, Projection, best_available
from megatron_flashrecovery.diagnose.gbgp.projector import Projector, in_processes
from megatron_flashrecovery.diagnose.gbgp.region import Region, regions
from megatron_flashrecovery.diagnose.gbgp.significance import Calibration, Found, Trial, detect, exchange
from megatron_flashrecovery.diagnose.gbgp.solver import Ended, Problem, Settings, Solution, Variant, solve

__all__ = [
    "Blocks",
    "Calibration",
    "Coupling",
    "Cut",
    "Ended",
    "Found",
    "Limits",
    "Model",
    "Network",
    "Objective",
    "OneRatio",
    "Problem",
    "Projection",
    "Projector",
    "Region",
    "Scored",
    "Settings",
    "Solution",
    "SumOfRatios",
    "Trial",
    "Variant",
    "WithStart",
    "best_available",
    "cut",
    "detect",
    "evolving",
    "exchange",
    "in_processes",
    "in_succession",
    "layered",
    "network_of_networks",
    "regions",
    "solve",
]
