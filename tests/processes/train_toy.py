"""A training script around the toy framework: ``flashrecovery run ... train_toy.py --steps 10``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.session import Session
from megatron_flashrecovery.testing.toy import Toy, ToyShape


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--numel", type=int, default=64)
    parser.add_argument("--replicated", action="store_true")
    parser.add_argument("--fail-once", type=Path, help="rank 1 exits before its first step, unless this file exists")
    parser.add_argument("--fail-always", action="store_true")
    parser.add_argument("--join-delay", type=float, default=0.0, help="seconds by which a replacement is late")
    args = parser.parse_args()
    session = Session.from_environment()
    session.install_groups()
    dist.init_process_group("gloo")
    toy = Toy(ToyShape(numel=args.numel, sharded=not args.replicated))
    if session.rank == 1 and (args.fail_always or _is_first(args.fail_once)):
        sys.exit(1)
    if session.is_joining:
        time.sleep(args.join_delay)
    session.attach(toy)
    for step in range(session.first_step(Step(0)), args.steps):
        record = session.run_step(Step(step), lambda: toy.step(session))
        print(f"rank {dist.get_rank()} step {step + 1} loss {record.loss} norm {record.grad_norm}", flush=True)
    session.finish(toy.sha256())
    dist.destroy_process_group()


def _is_first(path: Path | None) -> bool:
    if path is None or path.exists():
        return False
    path.touch()
    return True


if __name__ == "__main__":
    main()
