"""The kill matrix: who is killed at which moment with which optimizer, on any layout and over any backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.processes.conftest import Equal, assert_only_what_is_broken_is_rebuilt
from tests.processes.launcher import GPT, Job, run
from tests.processes.layouts import MAIN, Layout, order_of_losses

RECOVERY = "--enable-flash-recovery"
OPTIMIZERS = {
    "distributed": (),
    "plain": ("--no-use-distributed-optimizer",),
    "overlap": ("--overlap-grad-reduce", "--overlap-param-gather"),
    "plain-overlap-bf16": ("--no-use-distributed-optimizer", "--overlap-grad-reduce", "--bf16"),
    "log-3": ("--log-interval", "3"),
    "bf16-dropout": ("--bf16", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
}
MOMENTS = ("forward", "backward", "grad_sync", "optimizer", "mirror", "between")
# What two runs of the same job may differ in on GPUs, whoever trains: the choice of algorithms.
REPEATABLE = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def gpt(*arguments: str, injections: tuple[str, ...] = (), steps: int = 9, layout: Layout = MAIN) -> Job:
    """The main job, on our own example."""
    flags = (RECOVERY, "--train-iters", str(steps), *layout.arguments, *arguments)
    return Job(GPT, ranks=layout.ranks, arguments=flags, injections=injections)


def on_gpus(job: Job) -> Job:
    """Over NCCL, which the scripts choose by themselves where there are GPUs."""
    return replace(job, environment={**job.environment, **REPEATABLE})


def kill(rank: int, step: int, at: str) -> str:
    return f"kill:rank={rank},step={step},at={at}"


def everybody(optimizer: str, at: str, layout: Layout = MAIN) -> Job:
    """All ranks, one after another in one run, in an order in which the host of the rank lost before is hit as well."""
    kills = tuple(kill(rank, 3 + 3 * number, at) for number, rank in enumerate(order_of_losses(layout)))
    return gpt(*OPTIMIZERS[optimizer], injections=kills, steps=6 + 3 * len(kills), layout=layout)


def assert_changes_no_bit(job: Job, log_dir: Path, assert_equal: Equal, at: str, timeout: float) -> None:
    """Each loss at moment ``at`` is one recovery, which repeats one step at most and rebuilds no more than it must."""
    outcome = run(job, log_dir, timeout=timeout)
    assert_equal(job, outcome)
    assert len(outcome.recoveries) == len(job.injections)
    for recovery in outcome.recoveries:
        assert recovery.steps_recomputed <= 1
        assert_only_what_is_broken_is_rebuilt(outcome, recovery, at)
