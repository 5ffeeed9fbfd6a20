"""The command line of the example: Megatron-LM's own names, with the demo's configuration as defaults."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import device_setup


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Exits with status 2 and one line for whatever cannot be trained. Reads the sizes that torchrun sets."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    args.devices_here = device_setup.DEVICES
    problem = find_problem(args)
    if problem:
        parser.error(problem)
    model_parallel_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    args.data_parallel_size = args.world_size // model_parallel_size
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(description="Train a small GPT with megatron-core.", allow_abbrev=False)
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_parallelism(parser.add_argument_group("parallelism"))
    _add_data(parser.add_argument_group("data"))
    _add_checkpoints(parser.add_argument_group("checkpoints and records"))
    return parser


def find_problem(args: argparse.Namespace) -> str:
    """What cannot be trained, and the remedy, or nothing."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if 0 < args.devices_here < args.ranks_here:
        return (
            f"{args.ranks_here} ranks and {args.devices_here} GPUs on this node, and NCCL puts no two ranks on one: "
            f"start {args.devices_here} processes, or train on CPU with CUDA_VISIBLE_DEVICES="
        )
    if args.world_size % (tensor * pipeline):
        return (
            f"{args.world_size} ranks do not divide into tensor parallel {tensor} x pipeline parallel {pipeline}: "
            f"start a multiple of {tensor * pipeline} processes, or give other sizes"
        )
    data = args.world_size // (tensor * pipeline)
    if args.global_batch_size % (args.micro_batch_size * data):
        return (
            f"--global-batch-size {args.global_batch_size} is no multiple of --micro-batch-size "
            f"{args.micro_batch_size} x data parallel {data}"
        )
    if args.num_layers % pipeline:
        return f"--num-layers {args.num_layers} is no multiple of --pipeline-model-parallel-size {pipeline}"
    if args.num_attention_heads % tensor:
        return (
            f"--num-attention-heads {args.num_attention_heads} is no multiple of --tensor-model-parallel-size {tensor}"
        )
    if args.hidden_size % args.num_attention_heads:
        return f"--hidden-size {args.hidden_size} is no multiple of --num-attention-heads {args.num_attention_heads}"
    if args.seq_length > args.max_position_embeddings:
        return f"--seq-length {args.seq_length} exceeds --max-position-embeddings {args.max_position_embeddings}"
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        return "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce"
    if args.sequence_parallel and tensor == 1:
        return "--sequence-parallel needs --tensor-model-parallel-size above 1"
    if args.sequence_parallel and importlib.util.find_spec("apex") is None:
        return "--sequence-parallel needs the layer norm of Apex: install it, or leave the flag out"
    if args.save_interval and not args.save:
        return "--save-interval needs --save DIR"
    return ""


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of sixty flags above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{Path(sys.argv[0]).name}: {message}\n")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-layers", type=int, default=4)
    group.add_argument("--hidden-size", type=int, default=64)
    group.add_argument("--ffn-hidden-size", type=int, help="default: four times the hidden size")
    group.add_argument("--num-attention-heads", type=int, default=4)
    group.add_argument("--seq-length", type=int, default=32)
    group.add_argument("--max-position-embeddings", type=int, default=32)
    group.add_argument("--attention-dropout", type=float, default=0.1)
    group.add_argument("--hidden-dropout", type=float, default=0.1)
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--use-cpu-initialization", action="store_true", help="always on where there is no GPU")
    group.add_argument("--bf16", action="store_true", help="default: fp32")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--micro-batch-size", type=int, default=2)
    group.add_argument("--global-batch-size", type=int, default=16)
    group.add_argument("--train-iters", type=int, default=15)
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--min-lr", type=float, default=1e-5)
    group.add_argument("--lr-decay-style", default="cosine", choices=["constant", "linear", "cosine"])
    group.add_argument("--lr-decay-iters", type=int, help="default: the number of iterations")
    group.add_argument("--lr-warmup-iters", type=int, default=2)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.999)
    group.add_argument("--adam-eps", type=float, default=1e-8)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument("--eval-interval", type=int, default=1000)
    group.add_argument("--eval-iters", type=int, default=0)
    group.add_argument("--log-interval", type=int, default=1)
    group.add_argument(
        "--enable-flash-recovery", action="store_true", help="survive the loss of ranks (flashrecovery run)"
    )
    group.add_argument("--flash-recovery-nan", choices=["stop", "skip", "retry"], default="stop")
    group.add_argument("--flash-recovery-checksum-steps", type=int, default=64)


def _add_parallelism(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--tensor-model-parallel-size", type=int, default=2)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=2)
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action=switch, default=True)
    group.add_argument("--overlap-grad-reduce", action=switch, default=False)
    group.add_argument("--overlap-param-gather", action=switch, default=False)
    group.add_argument("--ddp-bucket-size", type=int, help="parameters in a bucket when gradients are reduced early")
    group.add_argument("--distributed-timeout-minutes", type=int, default=10)


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data-path", nargs="+", help="[weight] prefix ...; default: the sources of Python's library")
    group.add_argument("--data-cache-path", type=Path, help="where the default text is built, once")
    group.add_argument("--split", default="95,5,0")


def _add_checkpoints(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save", type=Path, metavar="DIR")
    group.add_argument("--load", type=Path, metavar="DIR")
    group.add_argument("--save-interval", type=int, default=0)
    group.add_argument("--dump-dir", type=Path, metavar="DIR", help="write steps.jsonl and summary.json here")
