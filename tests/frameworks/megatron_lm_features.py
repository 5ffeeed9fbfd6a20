"""What of Megatron-LM is shown by kills, one feature after the other; the last ones need a GPU and libraries for it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.frameworks.megatron_lm_job import BY_SAMPLES, SHARDED
from tests.processes.conftest import Equal, Undisturbed
from tests.processes.launcher import Job, run
from tests.processes.layouts import MAIN, Layout
from tests.processes.matrix import kill

EXPERTS = (
    *("--num-experts", "4", "--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "1"),
    *("--moe-router-topk", "2", "--moe-aux-loss-coeff", "0.01", "--moe-token-dispatcher-type", "allgather"),
)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
CONTEXT = ("--context-parallel-size", "2", "--tensor-model-parallel-size", "1")
ALLTOALL = (*EXPERTS, "--moe-token-dispatcher-type", "alltoall")
SHARED_EXPERTS = ("--moe-shared-expert-intermediate-size", "64", "--disable-bias-linear")
MTP = ("--mtp-num-layers", "1", "--position-embedding-type", "rope")
FEATURES: dict[str, tuple[str, ...]] = {
    "distributed": SHARDED,
    "overlap": (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"),
    "bf16": (*SHARDED, "--bf16"),
    "fp16": (*SHARDED, "--fp16", "--initial-loss-scale", "65536"),
    "dropout": (*SHARDED, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
    "untied": (*SHARDED, "--untie-embeddings-and-output-weights"),
    "recompute": (
        *SHARDED,
        *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
    "evaluation": (*SHARDED, "--eval-interval", "2", "--eval-iters", "1"),
    "evaluation-overlap": (
        *SHARDED,
        *("--eval-interval", "2", "--eval-iters", "1", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "fp16-overlap": (
        *(*SHARDED, "--fp16", "--initial-loss-scale", "4294967296", "--hysteresis", "1"),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "log-interval-3": (*SHARDED, "--log-interval", "3"),
    "interleaved": (
        *(*SHARDED, "--num-layers", "8", "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "4"),
        # With its communication overlapped, the interleaved schedule of upstream races over gloo without us as well.
        *("--num-layers-per-virtual-pipeline-stage", "1", "--no-overlap-p2p-communication"),
    ),
    "instances": (
        *(*SHARDED, "--tensor-model-parallel-size", "1", "--num-distributed-optimizer-instances", "2"),
        *("--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "duration": (*SHARDED, "--exit-duration-in-mins", "60"),
    "workers": (*SHARDED, "--num-workers", "2"),
    "tp-only": (*SHARDED, "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "1"),
    "pp-only": (*SHARDED, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "4"),
    "dp-only": (*SHARDED, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
    # Three steps of 8 samples, and six of 16: the number of micro batches changes in the middle.
    "ramp-up": (*SHARDED, "--rampup-batch-size", "8", "8", "24", BY_SAMPLES, "120"),
    "rerun-disabled": (*SHARDED, "--rerun-mode", "disabled"),
    "experts": (*SHARDED, *EXPERTS),
    "experts-overlap-log-3": (
        *(*SHARDED, *EXPERTS, "--overlap-grad-reduce", "--overlap-param-gather", "--log-interval", "3"),
        *("--moe-aux-loss-coeff", "0.01", "--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"),
    ),
    "plain": (),
    "alltoall": (*SHARDED, *ALLTOALL),
    "alltoall-shared": (*SHARDED, *ALLTOALL, *OVERLAP, *SHARED_EXPERTS),
    "alltoall-tensor-sequence": (
        *(*SHARDED, *ALLTOALL, *SHARED_EXPERTS, "--moe-shared-expert-overlap"),
        # Split over the tensor group, experts would gather tensors of unequal sizes, which gloo cannot.
        *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"),
    ),
    "alltoall-context": (*SHARDED, *ALLTOALL, *CONTEXT, *OVERLAP),
    "allgather-tensor-sequence": (
        *(*SHARDED, *EXPERTS, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--disable-bias-linear"),
    ),
    "interleaved-sequence": (
        *(*SHARDED, "--num-layers", "8", "--sequence-parallel", "--pipeline-model-parallel-size", "4"),
        *("--num-layers-per-virtual-pipeline-stage", "1", "--no-overlap-p2p-communication"),
    ),
    "mtp": (*SHARDED, *MTP, "--log-interval", "3"),
    "mtp-plain": MTP,
    "sequence": (*SHARDED, "--sequence-parallel"),
    "sequence-plain": ("--sequence-parallel",),
    "sequence-overlap": (*SHARDED, "--sequence-parallel", *OVERLAP),
    "sequence-rms": (*SHARDED, "--sequence-parallel", "--normalization", "RMSNorm", "--bf16"),
    "context": (*SHARDED, *CONTEXT),
    "context-plain": CONTEXT,
    "context-overlap": (*SHARDED, *CONTEXT, *OVERLAP, "--calculate-per-token-loss"),
}
_FP8 = (*SHARDED, "--bf16", "--fp8-format", "hybrid", "--fp8-amax-compute-algo", "max", "--fp8-amax-history-len", "16")
_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
ON_GPUS_ONLY: dict[str, tuple[str, ...]] = {
    "fp8": _FP8,
    "fp8-recompute": (*_FP8, *_RECOMPUTE),
    "fp8-current-scaling": (*_FP8, "--fp8-recipe", "tensorwise"),
    "te-bf16-overlap": (*SHARDED, "--bf16", "--overlap-grad-reduce", "--overlap-param-gather"),
}
_FIRST_WITH_FP8 = (8, 9)
_DEGREES = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
_OF_LIBRARIES = {"--sequence-parallel", "--context-parallel-size"}
"""Upstream's own layers refuse them."""
# (rank of the main job, step, moment)
_LOSSES = ((5, 3, "backward"), (7, 5, "optimizer"), (0, 6, "grad_sync"), (2, 8, "forward"))
KILLS = tuple(kill(*loss) for loss in _LOSSES)


@dataclass(frozen=True)
class Machine:
    """The layout that its GPUs make, the libraries that it has, and what its devices can do."""

    layout: Layout
    libraries: Collection[str]
    capability: tuple[int, int]


def kills_with(feature: str, layout: Layout = MAIN) -> tuple[str, ...]:
    # Where the loss scale overflows, there is no optimizer step to die in.
    no_optimizer = feature == "fp16-overlap"
    return tuple(
        kill(layout.rank(rank), step, "backward" if no_optimizer and at == "optimizer" else at)
        for rank, step, at in _LOSSES
    )


def why_not(feature: str, machine: Machine) -> str:
    """Why this feature cannot be run on this machine, or nothing."""
    flags = {**FEATURES, **ON_GPUS_ONLY}[feature]
    degree_of = dict(zip(_DEGREES, (machine.layout.tensor, machine.layout.pipeline, 1), strict=True))
    degree_of |= {flag: int(value) for flag, value in pairwise(flags) if flag in _DEGREES}
    product = math.prod(degree_of.values())
    if machine.layout.ranks % product:
        return f"needs a multiple of {product} GPUs"
    if (feature in ON_GPUS_ONLY or _OF_LIBRARIES & set(flags)) and "transformer_engine" not in machine.libraries:
        return "needs Transformer Engine"
    if feature.startswith("fp8") and machine.capability < _FIRST_WITH_FP8:
        return "the device has no FP8"
    return ""


def assert_feature_changes_no_bit(
    job: Job, log_dir: Path, assert_equal: Equal, undisturbed: Undisturbed, timeout: float
) -> None:
    outcome = run(job, log_dir, timeout=timeout)
    assert_equal(job, outcome)
    assert all(recovery.steps_recomputed <= 1 for recovery in outcome.recoveries)
    # A recovered step is logged once, and as it is without a recovery.
    assert losses(outcome.said) == losses(undisturbed(job).said)


def losses(said: str) -> list[str]:
    lines = [line.partition("learning rate: ")[2] for line in said.splitlines() if "lm loss: " in line]
    return [line.rstrip() for line in lines] + [line for line in said.splitlines() if "lm loss value: " in line]
