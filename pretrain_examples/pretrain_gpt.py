"""Train a GPT with megatron-core: tensor, pipeline and data parallel, on any machine.

``torchrun --nproc-per-node 8 pretrain_gpt.py`` trains the demo's configuration, over NCCL where there are GPUs and else
over gloo on CPU. The same under ``flashrecovery run`` with ``--enable-flash-recovery`` survives the loss of ranks; the
lines that this takes are the ones with ``flash`` in them.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import device_setup  # first: it makes megatron-core importable where there is no GPU
import numpy
import torch
from gpt_arguments import parse_arguments
from gpt_checkpoint import load_checkpoint, save_checkpoint
from gpt_data import Batch, ByteTokenizer, build_datasets, library_text, micro_batches, reads_data
from gpt_model import build_model, build_optimizer, build_scheduler
from gpt_records import StepRecords, StepResult, is_reporting_rank, print_step, state_sha256
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import get_num_microbatches, init_num_microbatches_calculator
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

try:
    from megatron_flashrecovery.adapters import megatron as flash_recovery
except ImportError:  # training without recovery needs nothing but megatron-core
    flash_recovery = None  # type: ignore[assignment]


@dataclass
class Training:
    """What a step works on."""

    args: argparse.Namespace
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    batches: Iterator[Batch]
    validation: GPTDataset | None


def main() -> None:
    args = parse_arguments()
    flash = flash_recovery.start() if args.enable_flash_recovery else None
    initialize(args)
    model = build_model(args, ByteTokenizer.vocab_size)
    optimizer = build_optimizer(args, model)
    scheduler = build_scheduler(args, optimizer)
    train_data, validation = build_datasets(args)
    open_batches = partial(micro_batches, train_data, args=args)
    first_step = 0
    load = args.save if flash and flash.must_load and not args.load else args.load
    if load and not (flash and flash.is_joining):
        first_step = load_checkpoint(load, model, optimizer, scheduler)
    batches = open_batches(consumed_samples=first_step * args.global_batch_size)
    if flash:
        nan = flash_recovery.NanChoice(args.flash_recovery_nan)
        choices = flash_recovery.Choices(nan, args.flash_recovery_checksum_steps)
        batches, first_step = flash.protect([model], optimizer, scheduler, open_batches, first_step, choices)
    training = Training(args, model, optimizer, scheduler, batches, validation)
    train(training, first_step, flash)
    torch.distributed.destroy_process_group()


def initialize(args: argparse.Namespace) -> None:
    """The process groups, the number of micro batches, and the random numbers."""
    if device_setup.HAS_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        device_setup.BACKEND, timeout=timedelta(minutes=args.distributed_timeout_minutes)
    )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    init_num_microbatches_calculator(
        torch.distributed.get_rank(), None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    seed_everything(args.seed)
    if not args.data_path and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        library_text(args.data_cache_path)
    # By its device: NCCL would guess one by the rank.
    torch.distributed.barrier(device_ids=[torch.cuda.current_device()] if device_setup.HAS_GPU else None)


def seed_everything(seed: int) -> None:
    """Pipeline stages draw different numbers, and where it matters tensor ranks; data-parallel peers draw the same."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def train(training: Training, first_step: int, flash: flash_recovery.Protection | None) -> None:
    """The loop. What is due between two steps is done as a part of the step that follows: whoever repeats the step, or
    joins in it, does that too."""
    args = training.args
    records = StepRecords(args)

    def one_step(step: int) -> StepResult:
        between_steps(training, step, flash)
        return train_step(training)

    for step in range(first_step, args.train_iters):
        began = time.perf_counter()
        result = flash.run_step(step, one_step) if flash else one_step(step)
        seconds = time.perf_counter() - began
        print_step(step + 1, result, seconds, args)
        records.add(step + 1, result, seconds)

    def after_last_step() -> None:
        between_steps(training, args.train_iters, flash)
        gather_parameters(training)

    if flash:
        flash.guard("after_last_step", after_last_step)
    else:
        after_last_step()
    sha256 = state_sha256(training.model, training.optimizer)
    if flash:
        flash.finish(sha256)
    else:
        records.finish(args.train_iters, sha256)


def train_step(training: Training) -> StepResult:
    """One update. The loss is reduced before it, so that nothing but the gathering of parameters comes after it."""
    training.model.zero_grad_buffer()
    training.optimizer.zero_grad()
    losses = run_pipeline(training, training.batches, get_num_microbatches(), forward_only=False)
    loss = average_loss(losses)
    updated, grad_norm, _zeros = training.optimizer.step()
    if updated:
        training.scheduler.step(increment=training.args.global_batch_size)
    return StepResult(loss, grad_norm, skipped=not updated)


def run_pipeline(training: Training, batches: Iterator[Batch], count: int, forward_only: bool) -> list[torch.Tensor]:
    """Forward (and backward) for ``count`` micro batches. Returns their losses on the last pipeline stage."""
    losses: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=training.model,
        num_microbatches=count,
        seq_length=training.args.seq_length,
        micro_batch_size=training.args.micro_batch_size,
        forward_only=forward_only,
    )
    return losses


def forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel
) -> tuple[torch.Tensor, Callable[..., object]]:
    """One micro batch through this stage; megatron-core calls the returned function with the output on the last one."""
    if not reads_data():
        return model(None, None, None), loss_of_output
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(batches).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_of_output, batch["loss_mask"])


def loss_of_output(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the tokens that count: for backward, which divides it in place, and for the report."""
    weights = mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * weights) / weights.sum()
    return loss, loss.detach().clone()


def average_loss(losses: list[torch.Tensor]) -> float | None:
    """The mean over micro batches and data-parallel peers, on every rank of the last pipeline stage."""
    if not parallel_state.is_pipeline_last_stage():
        return None
    total = torch.stack(losses).mean()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item() / int(parallel_state.get_data_parallel_world_size())


def between_steps(training: Training, step: int, flash: flash_recovery.Protection | None) -> None:
    """Evaluate and save, where they are due after ``step`` completed updates."""
    args = training.args
    if step == 0:
        return
    if args.eval_iters and step % args.eval_interval == 0:
        gather_parameters(training)
        evaluate(training, step)
    is_last = step == args.train_iters
    if args.save and (is_last or (args.save_interval and step % args.save_interval == 0)):
        gather_parameters(training)
        save_checkpoint(args.save, step, training.model, training.optimizer, training.scheduler)
        if flash:
            flash.checkpoint_written(step)


@torch.no_grad()
def evaluate(training: Training, step: int) -> None:
    args = training.args
    rounds_before = step // args.eval_interval - 1
    samples_before = rounds_before * args.eval_iters * args.global_batch_size
    batches = micro_batches(training.validation, samples_before, args)
    training.model.eval()
    losses = run_pipeline(training, batches, get_num_microbatches() * args.eval_iters, forward_only=True)
    training.model.train()
    loss = average_loss(losses)
    if is_reporting_rank():
        print(f"validation after step {step} | loss {loss:.6f}", flush=True)


def gather_parameters(training: Training) -> None:
    """With ``--overlap-param-gather`` the parameters of a step are gathered only when the next one needs them."""
    if training.args.overlap_param_gather:
        training.model.disable_forward_pre_hook()
        training.model.enable_forward_pre_hook()


if __name__ == "__main__":
    main()
