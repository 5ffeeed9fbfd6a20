"""Run on each of two data-parallel ranks: go back in a training run in every way, and see whether it changes a bit.

``python megatron_scenarios.py OUT``, with torchrun's environment, writes ``{variant: {scenario: difference or ""}}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain_examples"))

import pretrain_gpt as example
import torch
from gpt_arguments import parse_arguments

from megatron_flashrecovery.adapters.megatron.protection import Protection
from megatron_flashrecovery.comm.parking import Interrupted
from megatron_flashrecovery.runtime.moment import Moment
from megatron_flashrecovery.state.encoding import decode_values, encode_values
from megatron_flashrecovery.testing.recording_session import RecordingSession

STEPS = 4
MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--global-batch-size", "8"),
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--ddp-bucket-size", "5000"),
    *("--train-iters", str(STEPS), "--seed", "7"),
]
VARIANTS = {
    f"{optimizer}-{dtype}-{overlap}": [*optimizer_flags, *dtype_flags, *overlap_flags]
    for optimizer, optimizer_flags in {"distributed": [], "plain": ["--no-use-distributed-optimizer"]}.items()
    for dtype, dtype_flags in {"fp32": [], "bf16": ["--bf16"]}.items()
    for overlap, overlap_flags in {
        "apart": [],
        "grads": ["--overlap-grad-reduce"],
        "params": ["--overlap-grad-reduce", "--overlap-param-gather"],
    }.items()
    if (optimizer, overlap) != ("plain", "params") and (optimizer, dtype, overlap) != ("distributed", "bf16", "grads")
}


class Run:
    """A training run from its first step on."""

    def __init__(self, flags: list[str], seed: int = 7) -> None:
        self.args = parse_arguments([*MODEL, *flags])
        example.seed_everything(seed)
        self.model = example.build_model(self.args, example.ByteTokenizer.vocab_size)
        self.optimizer = example.build_optimizer(self.args, self.model)
        self.scheduler = example.build_scheduler(self.args, self.optimizer)
        train_data, _ = example.build_datasets(self.args)
        self.session = RecordingSession()
        self.flash = Protection(self.session)
        open_batches = partial(example.micro_batches, train_data, args=self.args)
        batches, _ = self.flash.protect([self.model], self.optimizer, self.scheduler, open_batches, 0)
        self.training = example.Training(self.args, self.model, self.optimizer, self.scheduler, batches, None)
        self.framework = self.session.framework
        self.reports: dict[int, str] = {}

    def step(self, step: int) -> None:
        record = self.flash.run_step(step, lambda _step: example.train_step(self.training))
        self.framework.keep_data(step - 1)
        self.reports[step] = f"{record.loss.hex()} {record.grad_norm.hex()}"

    def steps(self, first: int, end: int = STEPS) -> Run:
        for step in range(first, end):
            self.step(step)
        return self

    def outcome(self) -> list[str]:
        example.gather_parameters(self.training)
        return [*(self.reports[step] for step in range(STEPS)), example.state_sha256(self.model, self.optimizer)]

    def capture(self) -> tuple[list[torch.Tensor], bytes]:
        pieces = self.framework.tensor_pieces()
        return [p.tensor.clone() for p in pieces if not p.gathered], encode_values(self.framework.values())

    def restore(self, captured: tuple[list[torch.Tensor], bytes], step: int) -> None:
        tensors, values = captured
        kept = [piece for piece in self.framework.tensor_pieces() if not piece.gathered]
        with torch.no_grad():
            for piece, tensor in zip(kept, tensors, strict=True):
                piece.tensor.copy_(tensor)
        self.go_back(values, step)

    def go_back(self, values: bytes, step: int) -> None:
        """What a recovery does, in its order."""
        self.framework.discard_partial_step()
        self.framework.gather_parameters()
        self.framework.restore_values(decode_values(values))
        self.framework.rewind_data(step)

    def wait_for_reductions(self) -> None:
        """A real handle sees to it that nothing that was severed still writes."""
        for group in self.model.bucket_groups:
            if group.grad_reduce_handle is not None:
                group.grad_reduce_handle.wait()


def going_back_two_steps(flags: list[str]) -> Run:
    run = Run(flags).steps(0, 1)
    captured = run.capture()
    run.steps(1, 3)
    run.restore(captured, 1)
    return run.steps(1)


def before_the_first_step(flags: list[str]) -> Run:
    run = Run(flags)
    captured = run.capture()
    run.steps(0, 2)
    run.restore(captured, 0)
    return run.steps(0)


def one_replaced(flags: list[str]) -> Run:
    """The last rank is replaced, and the other one goes on with what it has: also in the order of its reductions."""
    run = Run(flags).steps(0, 2)
    captured = run.capture()
    replacement = Run(flags, seed=99)
    assert names(replacement) == names(run)
    if torch.distributed.get_rank() == 0:
        run.go_back(captured[1], 2)
        return run.steps(2)
    replacement.reports = run.reports
    replacement.restore(captured, 2)
    return replacement.steps(2)


def cut_short(moment: str, at_step: int, flags: list[str]) -> Run:
    run = Run(flags).steps(0, at_step)
    values = encode_values(run.framework.values())
    run.session.interrupt_at(moment, first=run.wait_for_reductions)
    try:
        run.step(at_step)
    except Interrupted:
        run.go_back(values, at_step)
        return run.steps(at_step)
    raise AssertionError(f"{moment} was not passed")


def seams_in_order(flags: list[str]) -> Run:
    run = Run(flags)
    run.session.calls.clear()
    run.step(0)
    calls = [call for index, call in enumerate(run.session.calls) if call != run.session.calls[index - 1] or index == 0]
    expected = ["forward", "backward", "forward", "backward"]
    expected += ["grad_sync", "gate", "before_update", "optimizer", "after_update"]
    assert calls == expected, calls
    return run.steps(1)


def bad_numbers(moment: Moment, examined: bool, flags: list[str]) -> Run:
    """A value of rank 0 is no number, and no rank writes; the step that is computed again is as if nothing had been."""
    if moment is Moment.GRAD_SYNC and "--overlap-grad-reduce" in flags:
        return Run(flags).steps(0)  # by then they are reduced
    is_origin = torch.distributed.get_rank() == 0
    run = Run(flags).steps(0, 2)
    tensors, values = run.capture()
    refusal = run.session.refusal
    refusal.examines = examined
    run.session.damage_at(moment if is_origin else None)
    with suppress(Interrupted):
        run.step(2)
    ((what, own, finding),) = refusal.refused
    assert what == "the gradient norm is nan", what
    assert bool(own) == is_origin, own
    assert (finding is not None) == (examined and is_origin), finding
    assert all(map(torch.equal, run.capture()[0], tensors)), "something was written"
    run.session.damage_at(None)
    refusal.examines = False
    run.go_back(values, 2)
    return run.steps(2)


def bad_loss(flags: list[str]) -> Run:
    """The loss of rank 0 is no number although all gradients are, and still no rank writes."""
    if "--no-use-distributed-optimizer" in flags:
        return Run(flags).steps(0)  # here nobody asks the peers at the gate, as a session would
    is_origin = torch.distributed.get_rank() == 0
    run = Run(flags).steps(0, 2)
    tensors, values = run.capture()
    numbers = run.framework.partial_step.numbers
    loss = torch.tensor(float("inf") if is_origin else 1.0)

    def one_step(_step: int) -> example.StepResult:
        numbers.watch_losses(lambda: [{"a loss": loss}])()
        return example.train_step(run.training)

    with suppress(Interrupted):
        run.flash.run_step(2, one_step)
    ((what, own, _),) = run.session.refusal.refused
    assert (what, own) == (("the loss is not finite", "loss") if is_origin else ("the gradient norm is nan", "")), what
    assert all(map(torch.equal, run.capture()[0], tensors)), "something was written"
    run.go_back(values, 2)
    return run.steps(2)


def left_out(flags: list[str]) -> Run:
    """A step whose update is left out changes nothing but counters."""
    run = Run(flags).steps(0, 2)
    tensors, values = run.capture()
    run.session.refusal.skips_update = True
    record = run.flash.run_step(2, lambda _step: example.train_step(run.training))
    assert (record.skipped, record.grad_norm) == (True, None)
    assert all(map(torch.equal, run.capture()[0], tensors)), "something was written"
    run.session.refusal.skips_update = False
    run.go_back(values, 2)
    return run.steps(2)


def names(run: Run) -> list[tuple[str, bool, bool]]:
    return [(piece.name, piece.unique, piece.gathered) for piece in run.framework.tensor_pieces()]


SCENARIOS: dict[str, Callable[[list[str]], Run]] = {
    "going back two steps": going_back_two_steps,
    "before the first step": before_the_first_step,
    "one replaced": one_replaced,
    "cut short in forward": partial(cut_short, "forward", 2),
    "cut short in backward": partial(cut_short, "backward", 2),
    "cut short in grad_sync": partial(cut_short, "grad_sync", 2),
    "cut short at the gate": partial(cut_short, "gate", 2),
    "the first step cut short": partial(cut_short, "grad_sync", 0),
    "seams in order": seams_in_order,
    "bad numbers in forward": partial(bad_numbers, Moment.FORWARD, True),
    "bad numbers in backward": partial(bad_numbers, Moment.BACKWARD, True),
    "bad gradients": partial(bad_numbers, Moment.GRAD_SYNC, False),
    "an update left out": left_out,
    "a bad loss": bad_loss,
}


def main() -> None:
    args = parse_arguments(MODEL)
    example.initialize(args)
    differences: dict[str, dict[str, str]] = {}
    for variant, flags in VARIANTS.items():
        expected = unprotected(flags)
        differences[variant] = {"protection alone": difference(expected, Run(flags).steps(0).outcome())}
        for name, scenario in SCENARIOS.items():
            differences[variant][name] = difference(expected, scenario(flags).outcome())
    rank = torch.distributed.get_rank()
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(differences))
    torch.distributed.destroy_process_group()


def unprotected(flags: list[str]) -> list[str]:
    run = Run.__new__(Run)
    run.args = parse_arguments([*MODEL, *flags])
    example.seed_everything(7)
    run.model = example.build_model(run.args, example.ByteTokenizer.vocab_size)
    run.optimizer = example.build_optimizer(run.args, run.model)
    run.scheduler = example.build_scheduler(run.args, run.optimizer)
    train_data, _ = example.build_datasets(run.args)
    batches = example.micro_batches(train_data, 0, run.args)
    run.training = example.Training(run.args, run.model, run.optimizer, run.scheduler, batches, None)
    results = [example.train_step(run.training) for _ in range(STEPS)]
    run.reports = {step: f"{result.loss.hex()} {result.grad_norm.hex()}" for step, result in enumerate(results)}
    return run.outcome()


def difference(expected: list[str], actual: list[str]) -> str:
    for step, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        if wanted != got:
            what = f"step {step}" if step < STEPS else "the final state"
            return f"{what}: {got} in place of {wanted}"
    return ""


if __name__ == "__main__":
    main()
