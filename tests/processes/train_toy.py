"""A training script around the toy framework: ``flashrecovery run ... train_toy.py --steps 10``."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.policy import NanChoice
from megatron_flashrecovery.runtime import settling
from megatron_flashrecovery.runtime.broken_device import break_device
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.runtime.session import Session
from megatron_flashrecovery.testing.cpu_device import device_error
from megatron_flashrecovery.testing.toy import Toy, ToyShape


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--numel", type=int, default=64)
    parser.add_argument("--replicated", action="store_true")
    parser.add_argument("--fail-once", type=Path, help="rank 1 exits before its first step, unless this file exists")
    parser.add_argument("--fail-always", action="store_true")
    parser.add_argument("--join-delay", type=float, default=0.0, help="seconds by which a replacement is late")
    parser.add_argument("--start-delay", type=float, default=0.0, help="and by which everybody else is")
    parser.add_argument("--late", type=float, default=0.0, help="seconds between its setup and its first step")
    parser.add_argument("--fail-at-end", action="store_true", help="rank 1 fails when everything is done")
    parser.add_argument("--leave-at", type=int, default=-1, help="exit with 0 before this step")
    parser.add_argument("--only-rank", type=int, help="and only this rank")
    parser.add_argument("--raise-at", type=int, default=-1, help="an exception in this step, again and again")
    parser.add_argument("--raise-code", type=int, help="and that of a device, by this number of cudaError_t")
    parser.add_argument("--break-device", choices=("illegal access", "assert", "memory"), help="of a real device")
    parser.add_argument("--raise-in-plan", type=int, help="that of a device, or of a connection without --raise-code")
    parser.add_argument("--pretend-devices", action="store_true", help="each rank has one, at 0000:f0:0RANK of the bus")
    parser.add_argument("--cut-mirror-at", type=int, default=-1, help="reset the connection to the host in this step")
    parser.add_argument("--mismatch-at", type=int, default=-1, help="it waits in this step for who never comes")
    parser.add_argument("--nap-at", type=int, default=-1, help="something long in this step, before any operation")
    parser.add_argument("--nap", type=float, default=8.0, help="how long, in seconds")
    parser.add_argument("--once", type=Path, help="not again when this file exists")
    parser.add_argument("--compute", type=float, default=0.0, help="seconds that every rank computes in a step")
    parser.add_argument("--slow-from", type=int, default=-1, help="from this step on --only-rank computes much longer")
    parser.add_argument("--slow-for", type=int, default=1 << 30, help="so many steps long, and not again before ...")
    parser.add_argument("--slow-every", type=int, default=1 << 30, help="... so many steps have passed")
    parser.add_argument("--slow-first", type=float, default=0.0, help="seconds that the first step takes longer")
    parser.add_argument("--evaluate-every", type=int, default=0, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="rank 0 alone, and all others wait")
    parser.add_argument("--report", action="store_true", help="two guarded collectives behind every step")
    parser.add_argument("--on-sigterm", choices=("leave", "ignore"), help="leave: all ranks, after the same step")
    parser.add_argument("--enable-flash-recovery", action="store_true", help="as every script that is launched has it")
    parser.add_argument("--nan", choices=("stop", "skip", "retry"), default="stop")
    parser.add_argument("--checksum-steps", type=int, default=64)
    parser.add_argument("--child", action="store_true", help="every rank starts a process that outlives it")
    args = parser.parse_args()
    told: list[int] = []
    went_on: set[int] = set()
    if args.on_sigterm:
        signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    session = Session.from_environment()
    if args.pretend_devices:
        settling.place_of = lambda _device: f"0000:f0:{session.rank:02x}"
    session.install_groups()
    dist.init_process_group("gloo")
    toy = Toy(ToyShape(numel=args.numel, sharded=not args.replicated))
    everybody = dist.new_group() if args.mismatch_at >= 0 else None
    if session.rank == 1 and (args.fail_always or _is_first(args.fail_once)):
        sys.exit(1)
    time.sleep(args.join_delay if session.is_joining else args.start_delay)
    session.attach(toy, Choices(NanChoice(args.nan), args.checksum_steps))
    if session.rank == args.raise_in_plan:
        toy.discard_partial_step = lambda: fail_once(args.raise_code, args.once)  # type: ignore[method-assign]
    if args.child:
        subprocess.Popen(["sleep", "60"])
    was_joining = session.is_joining
    if args.only_rank in (None, session.rank) and not was_joining:
        time.sleep(args.late)
    first = session.first_step(Step(0))
    early = (
        was_joining and (args.report or args.on_sigterm == "leave") and first > 0
    )  # what follows the resume step is done by everybody

    def compute(step: int) -> StepRecord:
        is_slow = 0 <= args.slow_from <= step and (step - args.slow_from) % args.slow_every < args.slow_for
        time.sleep(args.compute * (4 if is_slow and args.only_rank in (None, session.rank) else 1))
        if step == 0:
            time.sleep(args.slow_first)
        if args.only_rank in (None, session.rank):
            if step == args.cut_mirror_at:
                session._keeper._link._stream._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
            if step == args.raise_at and (args.once is None or _is_first(args.once)):
                if args.break_device is not None:
                    break_real_device(args.break_device)
                if args.raise_code is None:
                    raise ValueError("the batch is empty")
                atexit.register(time.sleep, 300 if args.once else 0)  # it waits for a device that answers no more
                raise device_error(args.raise_code)
            if step == args.nap_at and (args.once is None or _is_first(args.once)):
                time.sleep(args.nap)
            if step == args.mismatch_at and (args.once is None or _is_first(args.once)):
                dist.barrier(everybody)
        return toy.step(session)

    for step in range(first - early, args.steps):
        if step == args.leave_at and args.only_rank in (None, session.rank):
            sys.exit(0)
        record = session.run_step(Step(step), lambda step=step: compute(step))
        print(f"rank {dist.get_rank()} step {step + 1} loss {record.loss} norm {record.grad_norm}", flush=True)
        if args.evaluate_every and (step + 1) % args.evaluate_every == 0:
            session.guard("evaluate", lambda: evaluate(toy))
        if args.save_every and (step + 1) % args.save_every == 0:
            session.guard("save_checkpoint", lambda: save(session))
        if args.report:
            report(session, toy, step + 1, was_joining)
        if args.on_sigterm == "leave":
            if session.guard("told", lambda step=step: all_agree(somebody_was(told) and step not in went_on)):
                print(f"rank {session.rank} leaves after step {step + 1}", flush=True)
                sys.exit(0)
            went_on.add(step)
    session.finish(toy.sha256())
    dist.destroy_process_group()
    if args.fail_at_end and session.rank == 1:
        sys.exit(1)


def report(session: Session, toy: Toy, step: int, is_replacement: bool) -> None:
    """``TOY_DIES=RANK:STEP:CALL`` in the environment ends a rank in one of the two calls."""
    doomed = os.environ.get("TOY_DIES", "")

    def die_in(call: int) -> None:
        if doomed == f"{session.rank}:{step}:{call}" and not is_replacement:
            os.kill(os.getpid(), signal.SIGKILL)

    def total() -> float:
        summed = toy.parameters.double().sum()
        die_in(0)
        dist.all_reduce(summed)
        return float(summed)

    def meet() -> None:
        dist.barrier()
        die_in(1)

    print(f"rank {session.rank} total after step {step}: {session.guard('total', total).hex()}", flush=True)
    session.guard("meet", meet)


def evaluate(toy: Toy) -> float:
    """Takes as long as some steps, and its own randomness is not the model's."""
    total = torch.zeros(())
    for _ in range(20):
        time.sleep(0.01)
        total += toy.parameters.mean()
        dist.all_reduce(total)
    return float(total)


def save(session: Session) -> None:
    if session.rank == 0:
        time.sleep(0.3)
    dist.barrier()


def somebody_was(told: list[int]) -> bool:
    number = torch.tensor(len(told))
    dist.all_reduce(number)
    return bool(number)


def all_agree(leave: bool) -> bool:
    """Asked again after a recovery, the answer may be another one; but who had stayed has gone on."""
    least = torch.tensor(int(leave))
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least)


def break_real_device(error: str) -> None:
    """As a script would that has such a bug, or a device too small for it."""
    if error == "memory":
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    elif error == "assert":
        torch.zeros(1, device="cuda")[torch.tensor([1000], device="cuda")].sum().item()
    else:
        break_device()


def fail_once(code: int | None, once: Path) -> None:
    if _is_first(once):
        raise dist.DistNetworkError("Connection reset by peer") if code is None else device_error(code)


def _is_first(path: Path | None) -> bool:
    if path is None or path.exists():
        return False
    path.touch()
    return True


if __name__ == "__main__":
    main()
