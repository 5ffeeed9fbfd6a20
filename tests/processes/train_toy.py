"""A training script around the toy framework: ``flashrecovery run ... train_toy.py --steps 10``."""

from __future__ import annotations

import argparse

import torch.distributed as dist

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.session import Session
from megatron_flashrecovery.testing.toy import Toy, ToyShape


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--numel", type=int, default=64)
    parser.add_argument("--replicated", action="store_true")
    args = parser.parse_args()
    session = Session.from_environment()
    session.install_groups()
    dist.init_process_group("gloo")
    toy = Toy(ToyShape(numel=args.numel, sharded=not args.replicated))
    session.attach(toy)
    for step in range(session.first_step(Step(0)), args.steps):
        record = session.run_step(Step(step), lambda: toy.step(session))
        print(f"rank {dist.get_rank()} step {step + 1} loss {record.loss} norm {record.grad_norm}", flush=True)
    session.finish(toy.sha256())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
