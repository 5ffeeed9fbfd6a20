"""Small corpora for the data loaders of Megatron-LM."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_corpus(prefix: Path, documents: int, seed: int) -> Path:
    """Documents of random tokens, in upstream's format."""
    numbers = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in numbers.integers(20, 90, documents):
        tokens = torch.from_numpy(numbers.integers(0, 255, length).astype(numpy.int64))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix
