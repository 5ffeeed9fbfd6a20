"""Real text that every machine has: the sources of Python's standard library, byte by byte, as Megatron reads data.

The text is built once into Megatron's own indexed dataset. Every rank that needs data reads it for itself; what a step
is computed from depends on nothing but how many samples came before it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

Batch = dict[str, torch.Tensor]


class ByteTokenizer:
    """Text as its bytes. Byte 0 is in no text, and ends a document."""

    vocab_size = 256
    eod = 0
    unique_identifiers: ClassVar = OrderedDict({"class": "ByteTokenizer"})


def build_datasets(args: argparse.Namespace) -> tuple[GPTDataset | None, GPTDataset | None]:
    """Training and validation samples, where any are read: on the first and the last stage. All ranks call it."""
    evaluations = args.train_iters // args.eval_interval + 1
    sizes = (args.train_iters * args.global_batch_size, evaluations * args.eval_iters * args.global_batch_size, 0)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_from_list(args.data_path or [str(library_text(args.data_cache_path))]),
        split=args.split,
        # No files: building the sample order takes milliseconds, and two jobs that share a cache can meet half a file.
        path_to_cache="",
        tokenizer=ByteTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, _test = BlendedMegatronDatasetBuilder(GPTDataset, sizes, reads_data, config).build()
    return train, valid


def reads_data() -> bool:
    return bool(parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage())


def micro_batches(dataset: GPTDataset | None, consumed_samples: int, args: argparse.Namespace) -> Iterator[Batch]:
    """This rank's micro batches from a position on, in Megatron's order: samples are dealt out to the ranks in turn."""
    if dataset is None:
        return
    rank = parallel_state.get_data_parallel_rank()
    width = args.micro_batch_size * args.data_parallel_size
    for start in range(consumed_samples, len(dataset) - width + 1, width):
        first = start + rank * args.micro_batch_size
        samples = [dataset[index] for index in range(first, first + args.micro_batch_size)]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def library_text(cache: Path | None = None) -> Path:
    """The prefix of the indexed dataset of this Python's sources, which is built if it is not there.

    Any number of processes may do so at once: each builds in a directory of its own, the first to rename it wins, and a
    process that dies half-way leaves nothing that could be taken for a dataset.
    """
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    target = (cache or _default_cache()) / f"python-library-{_fingerprint(sources)}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as building:
            _write_indexed_dataset(sources, Path(building) / "text")
            complete = Path(shutil.copytree(building, f"{building}-complete"))
            try:
                complete.rename(target)
            except OSError:  # another process was first, with the same bytes
                shutil.rmtree(complete)
    return target / "text"


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_flashrecovery"


def _fingerprint(sources: Sequence[Path]) -> str:
    listing = "".join(f"{source.name} {source.stat().st_size}\n" for source in sources)
    return hashlib.sha256(listing.encode()).hexdigest()[:12]


def _write_indexed_dataset(sources: Sequence[Path], prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for source in sources:
        text = source.read_bytes().replace(b"\0", b"") + b"\0"
        builder.add_document(numpy.frombuffer(text, dtype=numpy.uint8), [len(text)])
    builder.finalize(f"{prefix}.idx")
