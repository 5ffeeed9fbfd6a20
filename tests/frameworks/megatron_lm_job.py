"""Runs of the checkout that ``MEGATRON_LM`` names, small enough for two cores; the same model on GPUs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from pathlib import Path

from tests.processes.launcher import ROOT, Job
from tests.processes.layouts import MAIN, Layout

SCRIPT = ROOT / "tests" / "frameworks" / "pretrain_megatron_lm.py"
CHECKOUT = os.environ.get("MEGATRON_LM", "")
RECOVERY = "--enable-flash-recovery"
STEPS = 9
BY_SAMPLES = "--train-samples"
_MODEL = {
    "--num-layers": "4",
    "--hidden-size": "64",
    "--num-attention-heads": "4",
    "--seq-length": "32",
    "--max-position-embeddings": "32",
    "--micro-batch-size": "2",
    "--global-batch-size": "16",
    "--train-iters": str(STEPS),
    "--lr": "1e-3",
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": "255",
    "--log-interval": "1",
    "--eval-iters": "0",
    "--eval-interval": "1000",
}
_ON_CPU = (
    *("--distributed-backend", "gloo"),
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--use-cpu-initialization",
)
_LIBRARIES = ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")
SHARDED = ("--use-distributed-optimizer",)


def version() -> tuple[int, int]:
    """Of the checkout."""
    text = (Path(CHECKOUT) / "megatron" / "core" / "package_info.py").read_text()
    numbers = dict(line.split(" = ") for line in text.splitlines() if line.startswith(("MAJOR", "MINOR")))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def pretrain(
    *arguments: str,
    injections: tuple[str, ...] = (),
    recovery: bool = True,
    layout: Layout = MAIN,
    device_flags: tuple[str, ...] | None = None,
) -> Job:
    """``arguments`` come last, so they overrule what stands here; ``--mock-data`` unless they name others.

    ``device_flags``: those of a GPU (see ``gpu_flags``); else it trains on CPU.
    """
    model = {flag: value for flag, value in _MODEL.items() if flag != "--train-iters" or BY_SAMPLES not in arguments}
    base = [part for flag, value in model.items() for part in (flag, value)]
    data = () if "--data-path" in arguments or "--train-data-path" in arguments else ("--mock-data",)
    on = cpu_flags() if device_flags is None else device_flags
    flags = (*base, *layout.arguments, *on, *data, *arguments, *((RECOVERY,) if recovery else ()))
    return Job(SCRIPT, layout.ranks, flags, injections, environment={"MEGATRON_LM": CHECKOUT})


def cpu_flags() -> tuple[str, ...]:
    # Where it is still known, without it tensor parallelism makes an asynchronous reduction that CPU cannot overlap.
    old = ("--no-async-tensor-model-parallel-allreduce",) if version() < (0, 17) else ()
    return (*_ON_CPU, *old)


def gpu_flags(libraries: Collection[str]) -> tuple[str, ...]:
    """Upstream's own defaults, as far as the installed libraries have what they need."""
    has_te, has_apex = "transformer_engine" in libraries, "apex" in libraries
    accumulates = "fused_weight_gradient_mlp_cuda" in libraries
    return (
        *("--distributed-backend", "nccl"),
        *("--transformer-impl", "transformer_engine" if has_te else "local"),
        *(() if accumulates else ("--no-gradient-accumulation-fusion",)),
        *(() if has_te or has_apex else ("--no-persist-layer-norm",)),
        *(() if has_te else ("--no-masked-softmax-fusion", "--no-rope-fusion")),
    )


def installed_libraries() -> frozenset[str]:
    return frozenset(name for name in _LIBRARIES if importlib.util.find_spec(name) is not None)
