"""The parts of the adapter for Megatron-LM that can be shown without a checkout."""

from __future__ import annotations

import argparse
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_flashrecovery.adapters.megatron_lm import arguments, hooks, results
from megatron_flashrecovery.adapters.megatron_lm.checkpoint import newest_saved, use_newest
from megatron_flashrecovery.adapters.megatron_lm.tape import Tape
from megatron_flashrecovery.adapters.megatron_lm.told_once import ToldOnce
from megatron_flashrecovery.adapters.megatron_lm.wandb_rows import NOTED, WandbRows, use_one_run
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.policy import NanChoice
from megatron_flashrecovery.patching.megatron_lm import REPLACED
from megatron_flashrecovery.runtime.choices import Choices


def test_a_tape_gives_again_what_it_gave_and_opens_its_source_only_when_it_is_drawn_from() -> None:
    opened = []

    def open_source() -> Any:
        opened.append(True)
        return iter([torch.tensor([number]) for number in range(10)])

    tape = Tape(open_source)
    assert not opened
    first = [int(next(tape)) for _ in range(4)]
    tape.wind_back(1)
    assert [int(next(tape)) for _ in range(4)] == [*first[1:], 4]
    assert len(opened) == 1


def test_a_tape_keeps_only_what_it_may_be_wound_back_to() -> None:
    tape = Tape(lambda: iter(range(10)))
    for _ in range(5):
        next(tape)
    tape.forget_before(3)
    tape.wind_back(3)
    assert next(tape) == 3
    with pytest.raises(AssertionError):
        tape.wind_back(2)


def test_what_is_done_to_an_item_is_not_seen_when_it_is_drawn_again() -> None:
    tape = Tape(lambda: iter([{"tokens": torch.zeros(2)}]))
    next(tape)["tokens"].fill_(7)
    tape.wind_back(0)
    assert next(tape)["tokens"].tolist() == [0, 0]


def test_an_item_that_is_drawn_again_leaves_the_generators_as_it_did_the_first_time() -> None:
    class Torch:
        capture = staticmethod(torch.get_rng_state)
        restore = staticmethod(torch.set_rng_state)

    def source() -> Any:
        for number in range(4):
            if number % 2 == 0:
                torch.rand(1)
            yield number

    tape = Tape(source, generators=Torch())
    torch.manual_seed(1)
    drawn = [(next(tape), float(torch.rand(1))) for _ in range(4)]
    for begin in (0, 2):
        tape.wind_back(begin)
        torch.manual_seed(1)
        for _ in range(begin + begin // 2):
            torch.rand(1)
        assert [(next(tape), float(torch.rand(1))) for _ in range(4 - begin)] == drawn[begin:]


def test_a_result_of_train_step_comes_back_from_its_record() -> None:
    result = ({"lm loss": torch.tensor(2.5)}, 0, False, False, 0, 1.25, None, 0)
    record = results.to_record(result, reports=True)
    assert (record.loss, record.grad_norm, record.skipped) == (2.5, 1.25, False)
    assert results.from_record(record) == result


def test_a_rank_that_knows_no_loss_reports_none() -> None:
    record = results.to_record(({}, 1, False, False, 0, None, None, 0), reports=False)
    assert (record.loss, record.grad_norm, record.skipped) == (None, None, True)


def test_the_flag_is_in_a_group_of_its_own_and_there_is_only_one() -> None:
    parser = arguments.add_arguments(arguments.add_arguments(argparse.ArgumentParser(add_help=False)))
    (group,) = [group for group in parser._action_groups if group.title == "flash recovery"]
    # What the user wants to be done about numbers of the script is a flag of the script, like upstream's own checks.
    assert [action.option_strings for action in group._group_actions] == [
        ["--enable-flash-recovery"],
        ["--flash-recovery-nan"],
        ["--flash-recovery-checksum-steps"],
    ]
    assert parser.parse_args([]).enable_flash_recovery is False


def test_the_flags_become_choices_also_where_an_older_patch_knows_only_the_first() -> None:
    parser = arguments.add_arguments(argparse.ArgumentParser())
    told = parser.parse_args(["--flash-recovery-nan", "skip", "--flash-recovery-checksum-steps", "0"])
    assert arguments.choices_of(told) == Choices(NanChoice.SKIP, 0)
    assert arguments.choices_of(SimpleNamespace(enable_flash_recovery=True)) == Choices()


@pytest.mark.parametrize("refusal", arguments.REFUSALS, ids=lambda refusal: refusal.flags)
def test_what_cannot_be_combined_is_refused_with_the_reason(refusal: arguments.Refusal) -> None:
    name = refusal.flags.split()[0].removeprefix("--").replace("-", "_")
    if name == "check_weight_hash_across_dp_replicas_interval":
        assert refusal.applies(SimpleNamespace(**{name: 5}))
    name = {"fp4_param_gather": "fp4_param"}.get(name, name)
    value = {
        "async_strategy": "nvrx",
        "cuda_graph_impl": "local",
        "dataloader_type": "external",
        "exp_avg_dtype": torch.uint8,
        "moe_token_dispatcher_type": "flex",
        "tensor_parallel_num_weight_shards": 2,
    }.get(name, True)
    beside = {
        "use_transformer_engine_op_fuser": {"fp8": "hybrid"},
        "exp_avg_dtype": {"use_precision_aware_optimizer": True},
        "non_persistent_save_interval": {"async_save": True, "ckpt_format": "torch_dist"},
    }.get(name, {})
    arguments.check(SimpleNamespace(**beside))
    with pytest.raises(ConfigError, match=f"cannot be combined with {re.escape(refusal.flags)}: "):
        arguments.check(SimpleNamespace(**beside, **{name: value}))


def test_as_many_shards_of_a_weight_as_tensor_parallel_ranks_are_no_reason_to_refuse() -> None:
    """core_v0.19.0 fills in the number for everybody."""
    plain = {"tensor_model_parallel_size": 2, "tensor_parallel_num_weight_shards": 2}
    experts = {"expert_tensor_parallel_size": 2, "expert_tensor_parallel_num_weight_shards": 2}
    arguments.check(SimpleNamespace(**plain, **experts))
    for more in ({"tensor_parallel_num_weight_shards": 4}, {"expert_tensor_parallel_num_weight_shards": 4}):
        with pytest.raises(ConfigError, match="weight-shards"):
            arguments.check(SimpleNamespace(**{**plain, **experts, **more}))


def test_the_check_of_a_checkout_looks_for_what_the_hooks_replace() -> None:
    assert {*hooks.GUARDED, *hooks.WRAPPED, "pretrain"} == set(REPLACED)


def test_a_fall_back_starts_from_what_the_run_has_saved(tmp_path: Any) -> None:
    args = SimpleNamespace(save=str(tmp_path), load="elsewhere", finetune=True, no_load_optim=True, no_load_rng=True)
    use_newest(args)
    assert (newest_saved(args.save), args.load) == (0, "elsewhere")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    use_newest(args)
    assert (newest_saved(args.save), args.load, args.finetune) == (12, args.save, False)


def test_all_processes_of_a_job_log_one_run_of_wandb_and_the_user_may_name_it() -> None:
    first: dict[str, str] = {}
    use_one_run("token", first)
    again, other, named = {}, {}, {"WANDB_RUN_ID": "mine"}
    use_one_run("token", again)
    use_one_run("another", other)
    use_one_run("token", named)
    assert again == first
    assert first["WANDB_RESUME"] == "allow"
    assert other["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]
    assert "token" not in first["WANDB_RUN_ID"]
    assert (named["WANDB_RUN_ID"], named["WANDB_RESUME"]) == ("mine", "allow")


class FakeWandb:
    def __init__(self, path: str) -> None:
        self.run = SimpleNamespace(settings=SimpleNamespace(sync_file=path))
        self.said: list[Any] = []
        self.log = lambda data, step=None, commit=None: self.said.append((data, step, commit))


def test_a_report_is_in_wandb_only_when_its_row_is_over(tmp_path: Any) -> None:
    noted: list[Any] = []
    wandb = FakeWandb(str(tmp_path / "none"))
    rows = WandbRows(SimpleNamespace(note_reported=lambda name, step: noted.append((name, step))), lambda: wandb)
    for _report in range(2):
        rows.watch()
    wandb.log({"loss": 1.0}, 3)
    rows.reported("training_log#1", Step(3))
    assert noted == []
    rows.settle()
    assert wandb.said == [({"loss": 1.0}, 3, None), ({}, 3, True)]
    assert noted == [(NOTED + "training_log#1", 3)]
    rows.reported("training_log#1", Step(4))
    rows.settle()
    assert len(wandb.said) == 2, "a step without a row gets none"
    assert noted[1:] == [(NOTED + "training_log#1", 4)]


def test_a_call_that_is_cut_short_and_made_again_tells_everything_once() -> None:
    told: list[Any] = []
    board = SimpleNamespace(add_scalar=lambda *what: told.append(what), flush=lambda: told.append("flushed"))
    training: Any = SimpleNamespace(print_rank_last=told.append, get_tensorboard_writer=lambda: board)
    once = ToldOnce(training)

    def log(*, is_cut_short: bool) -> None:
        training.get_tensorboard_writer().add_scalar("loss", 1.5, 7)
        training.print_rank_last("a line")
        if is_cut_short:
            raise InterruptedError
        training.get_tensorboard_writer().add_scalar("time", 0.1, 7)
        training.print_rank_last("a line")
        training.get_tensorboard_writer().flush()

    with pytest.raises(InterruptedError), once.telling():
        log(is_cut_short=True)
    for _ in range(2):
        with once.telling():
            log(is_cut_short=False)
    assert told == [("loss", 1.5, 7), "a line", ("time", 0.1, 7), "a line", "flushed", "flushed"]
    training.print_rank_last("of the next call")
    assert told[-1] == "of the next call"


def test_where_upstream_has_no_board_there_is_none() -> None:
    training: Any = SimpleNamespace(print_rank_last=print, get_tensorboard_writer=lambda: None)
    with ToldOnce(training).telling():
        assert training.get_tensorboard_writer() is None
