"""Runs of the checkout that ``MEGATRON_LM`` names, small enough for two cores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.processes.launcher import ROOT, Job

SCRIPT = ROOT / "tests" / "frameworks" / "pretrain_megatron_lm.py"
CHECKOUT = os.environ.get("MEGATRON_LM", "")
RECOVERY = "--enable-flash-recovery"
STEPS = 9
BY_SAMPLES = "--train-samples"
_MODEL = {
    "--distributed-backend": "gloo",
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
    "--transformer-impl": "local",
    "--log-interval": "1",
    "--eval-iters": "0",
    "--eval-interval": "1000",
    "--tensor-model-parallel-size": "2",
    "--pipeline-model-parallel-size": "2",
}
_SWITCHES = (
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--use-cpu-initialization",
)
SHARDED = ("--use-distributed-optimizer",)


def version() -> tuple[int, int]:
    """Of the checkout."""
    text = (Path(CHECKOUT) / "megatron" / "core" / "package_info.py").read_text()
    numbers = dict(line.split(" = ") for line in text.splitlines() if line.startswith(("MAJOR", "MINOR")))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def pretrain(*arguments: str, injections: tuple[str, ...] = (), ranks: int = 8, recovery: bool = True) -> Job:
    """``arguments`` come last, so they overrule what stands here; ``--mock-data`` unless they name others."""
    model = {flag: value for flag, value in _MODEL.items() if flag != "--train-iters" or BY_SAMPLES not in arguments}
    base = [part for flag, value in model.items() for part in (flag, value)]
    data = () if "--data-path" in arguments or "--train-data-path" in arguments else ("--mock-data",)
    # Where it is still known, without it tensor parallelism makes an asynchronous reduction that CPU cannot overlap.
    old = ("--no-async-tensor-model-parallel-allreduce",) if version() < (0, 17) else ()
    flags = (*base, *_SWITCHES, *data, *old, *arguments, *((RECOVERY,) if recovery else ()))
    return Job(SCRIPT, ranks, flags, injections, environment={"MEGATRON_LM": CHECKOUT})


def write_corpus(prefix: Path, documents: int, seed: int) -> Path:
    """Documents of random tokens, in upstream's format."""
    numbers = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in numbers.integers(20, 90, documents):
        tokens = torch.from_numpy(numbers.integers(0, 255, length).astype(numpy.int64))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def kill(rank: int, step: int, at: str) -> str:
    return f"kill:rank={rank},step={step},at={at}"
