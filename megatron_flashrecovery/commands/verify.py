"""`flashrecovery verify DIR_A DIR_B`: are two runs equal, bit for bit?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records

PURPOSE = "compare the losses, gradient norms and final state of two runs, bit for bit"


def add_arguments(parser: Arguments) -> None:
    parser.add_argument("dir_a", type=directory_of_records, metavar="DIR_A")
    parser.add_argument("dir_b", type=directory_of_records, metavar="DIR_B")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from megatron_flashrecovery.runtime.summary import read_summary

    difference = first_difference(arguments.dir_a, arguments.dir_b)
    if difference is not None:
        print(difference)
        return 1
    summary = read_summary(arguments.dir_a)
    print(f"equal bit for bit: {summary.steps} steps, the final state of {summary.world_size} ranks")
    return 0


def first_difference(dir_a: Path, dir_b: Path) -> str | None:
    """One line, or None. A run that has not finished is equal to nothing. Raises ``RecordDamaged``."""
    from megatron_flashrecovery.runtime.summary import read_steps, read_summary

    summary_a, summary_b = read_summary(dir_a), read_summary(dir_b)
    if summary_a.world_size != summary_b.world_size:
        return f"{dir_a} has {summary_a.world_size} ranks, {dir_b} has {summary_b.world_size}"
    steps_a, steps_b = read_steps(dir_a), read_steps(dir_b)
    for a, b in zip(steps_a, steps_b, strict=False):
        if a.step != b.step:
            return f"{dir_a} has step {a.step} where {dir_b} has step {b.step}"
        if a.loss_hex != b.loss_hex:
            return f"step {a.step}: loss {a.loss_hex} in {dir_a}, {b.loss_hex} in {dir_b}"
        if a.grad_norm_hex != b.grad_norm_hex:
            return f"step {a.step}: grad norm {a.grad_norm_hex} in {dir_a}, {b.grad_norm_hex} in {dir_b}"
    if len(steps_a) != len(steps_b):
        return f"{dir_a} has {len(steps_a)} steps, {dir_b} has {len(steps_b)}"
    for directory, summary in ((dir_a, summary_a), (dir_b, summary_b)):
        if missing := set(range(summary.world_size)) - summary.state_sha256.keys():
            return f"{directory} has no final state of rank {min(missing)}: that run did not finish"
    for rank, state in sorted(summary_a.state_sha256.items()):
        if state != summary_b.state_sha256[rank]:
            return f"rank {rank}: final state {state} in {dir_a}, {summary_b.state_sha256[rank]} in {dir_b}"
    return None
