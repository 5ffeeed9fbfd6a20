"""Megatron-LM's own ``pretrain_gpt.py``, unmodified: with one flag more it survives lost ranks, bit for bit.

These run where ``MEGATRON_LM`` names a checkout (see the README); none of it is a part of this repository.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_flashrecovery.adapters.megatron_lm.wandb_rows import RunFile
from tests.frameworks.corpus import write_corpus
from tests.frameworks.megatron_lm_features import (
    CONTEXT,
    FEATURES,
    KILLS,
    assert_feature_changes_no_bit,
    kills_with,
    losses,
)
from tests.frameworks.megatron_lm_job import CHECKOUT, SHARDED, STEPS, pretrain
from tests.processes.conftest import Equal, Undisturbed
from tests.processes.launcher import ROOT, Outcome, run, started
from tests.processes.matrix import MOMENTS, assert_changes_no_bit, kill
from tests.processes.nodes import several_nodes

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM")

UNTIL_TOLD = ("--save-interval", "1000", "--exit-signal-handler")
IN_BACKGROUND = ("--async-save", "--use-persistent-ckpt-worker")
STAND_IN = "megatron_flashrecovery.testing.cpu_"
CORPORA = {"few": 12, "many": 40}
"""Documents of each."""


@pytest.mark.parametrize("at", MOMENTS)
def test_a_kill_changes_no_bit(tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, at: str) -> None:
    job = pretrain(*SHARDED, injections=(kill(5, 4, at),))
    assert_changes_no_bit(job, tmp_path_factory.mktemp("run") / "run", assert_equal, at, timeout=120.0)


@pytest.mark.parametrize("feature", FEATURES)
def test_kills_with_a_feature_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, undisturbed: Undisturbed, feature: str
) -> None:
    """One after another, each at another moment: also the rank that logs, and rank 0."""
    job = pretrain(*FEATURES[feature], injections=kills_with(feature))
    assert_feature_changes_no_bit(job, tmp_path_factory.mktemp("run") / "run", assert_equal, undisturbed, timeout=240.0)


@pytest.mark.parametrize(
    ("flags", "without"),
    [
        pytest.param((*SHARDED, "--sequence-parallel"), SHARDED, id="sequence"),
        pytest.param((*SHARDED, *CONTEXT), (*SHARDED, *CONTEXT, "--context-parallel-size", "1"), id="context"),
    ],
)
def test_layers_that_stand_in_for_those_of_a_gpu_compute_the_same(
    undisturbed: Undisturbed, flags: tuple[str, ...], without: tuple[str, ...]
) -> None:
    """Nearly: sums are added up in another order."""
    still = ("--hidden-dropout", "0.0", "--attention-dropout", "0.0")
    one, other = (undisturbed(pretrain(*parallel, *still)) for parallel in (flags, without))
    for measure in ("loss_hex", "grad_norm_hex"):
        values = [[float.fromhex(getattr(line, measure)) for line in outcome.steps] for outcome in (one, other)]
        assert len(values[0]) == STEPS
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_checkpoint_written_in_spite_of_a_loss_is_one_to_start_from(
    tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, undisturbed: Undisturbed
) -> None:
    """Rank 5 is killed while the first one is saved; another run goes on from the last one, and loses a rank, too.

    Without the optimizer: upstream cannot load that of torch's Adam, with or without recovery.
    """
    directory = tmp_path_factory.mktemp("run")
    saved = directory / "checkpoints"
    steady = (*SHARDED, "--lr-decay-iters", "20")
    calm = undisturbed(pretrain(*steady, "--train-iters", "12"))
    with started(pretrain(*steady, "--save", str(saved), "--save-interval", "4"), directory / "run") as running:
        running.wait_for(saved.exists, "the first checkpoint")
        os.kill(running.pids()[5], signal.SIGKILL)
        said, _ = running.process.communicate(timeout=120)
    outcome = Outcome(directory / "run", running.process.returncode, said)
    assert outcome.exit_code == 0, outcome.said
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(5,)]
    assert outcome.results() == calm.results()[:STEPS]
    load = (*steady, "--train-iters", "12", "--load", str(saved), "--no-load-optim")
    goes_on = pretrain(*load, injections=(kill(2, 11, "backward"),))
    again = run(goes_on, directory / "again")
    assert_equal(goes_on, again)
    assert [line.step for line in again.steps] == [10, 11, 12]


def test_a_save_in_the_background_is_cut_short_by_a_loss_and_the_next_one_is_whole(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed
) -> None:
    """Ranks are killed while that of step 3 is written: it begins again, and is given up. Who wrote it is really gone:
    nobody comes through the gate when it opens. What is written then is what is written without a loss."""
    directory = tmp_path_factory.mktemp("run")
    saved, gate = directory / "checkpoints", directory / "gate"
    steady = (*SHARDED, "--lr-decay-iters", "20")
    calm = undisturbed(pretrain(*steady, "--train-iters", "12"))
    kills = (kill(5, 4, "backward"), kill(0, 5, "optimizer"))
    job = pretrain(*steady, *IN_BACKGROUND, "--save", str(saved), "--save-interval", "3", injections=kills)
    job.environment["HOLD_WRITERS"] = str(gate)
    with started(job, directory / "run") as running:
        running.wait_for(lambda: running.count("Resume") == 2, "two recoveries", 100.0)
        assert not (saved / "latest_checkpointed_iteration.txt").exists()
        workers = running.all_pids()
        gate.touch()
        said, _ = running.process.communicate(timeout=120)
    outcome = Outcome(directory / "run", running.process.returncode, said)
    assert outcome.exit_code == 0, outcome.said
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(5,), (0,)]
    assert outcome.results() == calm.results()[:STEPS]
    assert said.count("the save of step 3 was cut short; there is no checkpoint yet") == 2
    told = [line.split() for line in (directory / "writers").read_text().splitlines()]
    began = [(int(group), path) for word, group, path in told if word == "begin" and "iter_0000003" in path]
    assert len(began) > len({path for _, path in began}), "the save of step 3 began again"
    assert {group for group, _ in began} == set(workers) - {workers[-1]}
    assert not [path for word, _, path in told if word == "end" and "iter_0000003" in path]
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    assert outcome.journal("CheckpointWritten")[-1].body["step"] == STEPS
    calmly = directory / "calmly"
    assert run(pretrain(*steady, "--save", str(calmly), "--save-interval", "9"), directory / "calm").exit_code == 0
    restarts = [
        run(
            pretrain(*steady, "--train-iters", "12", "--load", str(path), "--no-load-optim"),
            directory / f"{path.name}-on",
        )
        for path in (saved, calmly)
    ]
    assert [line.step for line in restarts[0].steps] == [10, 11, 12]
    assert restarts[0].results() == restarts[1].results()


@pytest.mark.parametrize("function", ["sync_all_async_calls", "maybe_finalize_async_calls"])
def test_a_loss_between_two_ranks_finalisations_leaves_a_whole_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed, function: str
) -> None:
    """At the end of training, before the marker is written and behind it: then it is not written again."""
    directory = tmp_path_factory.mktemp("run")
    saved = directory / "checkpoints"
    steady = (*SHARDED, "--lr-decay-iters", "20")
    calm = undisturbed(pretrain(*steady, "--train-iters", "12"))
    job = pretrain(*steady, *IN_BACKGROUND, "--save", str(saved), "--save-interval", "9")
    job.environment["DIE_IN"] = f"{function},{directory / 'died'}"
    outcome = run(job, directory / "run", timeout=240)
    assert outcome.exit_code == 0, outcome.said
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(5,)]
    assert outcome.results() == calm.results()[:STEPS]
    assert ("is complete, and not written again" in outcome.said) == (function == "maybe_finalize_async_calls")
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    again = run(pretrain(*steady, "--train-iters", "10", "--load", str(saved), "--no-load-optim"), directory / "again")
    assert again.exit_code == 0, again.said


@pytest.fixture(scope="session")
def blend(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two small corpora, each passed through several times."""
    directory = tmp_path_factory.mktemp("corpora")
    paths = [write_corpus(directory / name, documents, seed) for seed, (name, documents) in enumerate(CORPORA.items())]
    data = [part for path, weight in zip(paths, ("30", "70"), strict=True) for part in (weight, str(path))]
    return ("--data-path", *data, "--split", "80,10,10", "--data-cache-path", str(directory / "cache"))


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("loader", ["single", "cyclic"])
def test_kills_with_blended_data_of_several_epochs_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, assert_equal: Equal, blend: tuple[str, ...], loader: str, workers: str
) -> None:
    flags = ("--dataloader-type", loader, "--num-workers", workers, "--eval-interval", "4", "--eval-iters", "1")
    job = pretrain(*SHARDED, *blend, *flags, injections=KILLS)
    assert_equal(job, run(job, tmp_path_factory.mktemp("run") / "run", timeout=240))


def test_a_job_that_is_told_to_end_writes_a_checkpoint_and_another_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Upstream's own way to leave: the ranks agree that one of them was told to, save, and end."""
    directory = tmp_path_factory.mktemp("run")
    saved = directory / "checkpoints"
    steady = (*SHARDED, "--lr-decay-iters", "100", "--train-iters", "100")
    with started(pretrain(*steady, "--save", str(saved), *UNTIL_TOLD), directory / "run") as running:
        running.wait_for(lambda: running.steps_done() > 2, "some steps")
        os.kill(running.pids()[3], signal.SIGKILL)
        running.wait_for(lambda: running.resumed_at() >= 0, "the recovery")
        running.process.send_signal(signal.SIGTERM)
        said, _ = running.process.communicate(timeout=120)
    outcome = Outcome(directory / "run", running.process.returncode, said)
    assert outcome.exit_code == 128 + signal.SIGTERM
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(3,)]
    last = outcome.steps[-1].step
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(last)
    goes_on = (
        *SHARDED,
        "--lr-decay-iters",
        "100",
        "--train-iters",
        str(last + 1),
        "--load",
        str(saved),
        "--no-load-optim",
    )
    again = run(pretrain(*goes_on), directory / "again")
    assert again.exit_code == 0, again.said
    assert [line.step for line in again.steps] == [last + 1]


@pytest.mark.parametrize("environment", [{}, {"LAZY_BOARD": "1"}], ids=["appended", "kept until it is flushed"])
def test_every_step_is_in_the_board_once(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    directory = tmp_path_factory.mktemp("run")
    kills = (*KILLS[:2], kill(2, 6, "between"), kill(7, 8, "between"))
    job = pretrain(*SHARDED, "--tensorboard-dir", str(directory / "board"), injections=kills)
    job.environment.update(environment)
    outcome = run(job, directory / "run", timeout=240)
    assert outcome.exit_code == 0, outcome.said
    board = event_accumulator.EventAccumulator(str(directory / "board"))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("lm loss")] == list(range(1, STEPS + 1))


def test_a_replaced_logging_rank_goes_on_with_the_same_run_of_wandb(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("wandb")
    directory = tmp_path_factory.mktemp("run")
    flags = ("--wandb-project", "test", "--wandb-exp-name", "test", "--wandb-save-dir", str(directory))
    board = ("--tensorboard-dir", str(directory / "board"))
    kills = (kill(7, 3, "backward"), kill(2, 4, "forward"), kill(7, 6, "between"), kill(7, 8, "optimizer"))
    job = pretrain(*SHARDED, *board, *flags, injections=kills)
    job.environment["WANDB_MODE"] = "offline"
    outcome = run(job, directory / "run", timeout=240)
    assert outcome.exit_code == 0, outcome.said
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 4
    assert len({file.name for file in files}) == 1
    rows = [row for file in files for row in RunFile(file).rows()]
    logged = [row.step.num for row in rows if any(list(item.nested_key) == ["lm loss"] for item in row.item)]
    assert sorted(logged) == list(range(1, STEPS + 1))


def test_a_lost_node_with_the_rank_that_logs_moves_and_each_step_is_logged_once(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed
) -> None:
    calm, log_dir = pretrain(*SHARDED), tmp_path_factory.mktemp("run")
    job = replace(calm, ranks=4, injections=("agent:rank=5,step=5,at=backward", kill(7, 7, "backward")))
    with several_nodes(job, log_dir, spares=1) as several:
        nodes = [several.start(node) for node in range(3)]
        said, _ = nodes[0].process.communicate(timeout=240.0)
        assert nodes[2].process.wait(20) == 0
    outcome = Outcome(nodes[0].log_dir, nodes[0].process.returncode, said)
    assert outcome.exit_code == 0, said
    assert (outcome.results(), outcome.state) == (undisturbed(calm).results(), undisturbed(calm).state)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(4, 5, 6, 7), (7,)]
    logged = "".join((log_dir / node / "logs" / "rank7.log").read_text() for node in "12")
    assert losses(logged) == losses(undisturbed(calm).said)


@pytest.mark.parametrize("flags", [SHARDED, ("--rerun-mode", "disabled")], ids=["rerun", "plain-without-rerun"])
def test_numbers_that_are_not_finite_do_not_end_a_rank_but_are_computed_again(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed, flags: tuple[str, ...]
) -> None:
    """Upstream checks losses and gradients itself, and with or without its rerun machine it would end the run."""
    job = pretrain(*flags, injections=("nan:rank=5,step=4,at=backward",))
    outcome = run(job, tmp_path_factory.mktemp("run") / "run", timeout=240)
    assert outcome.exit_code == 0, outcome.said
    calm = undisturbed(job)
    assert (outcome.results(), outcome.state) == (calm.results(), calm.state)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [()]
    assert "step 4: the gradient norm is nan, and it did not come again" in outcome.said


def test_a_step_whose_numbers_are_bad_again_is_left_out_and_its_origin_named(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    skip = ("--flash-recovery-nan", "skip")
    job = pretrain(*SHARDED, *skip, injections=("nan:rank=7,step=4,at=forward,times=always", kill(2, 6, "backward")))
    outcome = run(job, tmp_path_factory.mktemp("run") / "run", timeout=240)
    assert outcome.exit_code == 0, outcome.said
    assert [line.step for line in outcome.steps if line.grad_norm_hex is None] == [4]
    again = next(bad for bad in outcome.summary.bad_numbers if bad.step == 4)
    assert (again.times, again.outcome) == (2, "its update is left out")
    assert again.origin.endswith("on rank 7")


def test_without_the_flag_nothing_of_ours_changes_the_run(undisturbed: Undisturbed) -> None:
    with_recovery = undisturbed(pretrain(*SHARDED))
    plain = undisturbed(pretrain(*SHARDED, recovery=False))
    assert losses(with_recovery.said) == losses(plain.said)


def test_without_the_flag_nothing_of_ours_is_imported_and_the_run_is_that_of_torchrun(undisturbed: Undisturbed) -> None:
    job = pretrain(*SHARDED, recovery=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks)]
    environment = {
        **os.environ,
        **job.environment,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TELL_MODULES": "1",
    }
    done = subprocess.run(
        [*command, str(job.script), *job.arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("ours:")]
    # What makes a machine without a GPU look like one that has some is ours, too.
    assert len(told) == job.ranks
    others = {name for name in set.union(*told) if not name.startswith(STAND_IN)}
    assert others == {"megatron_flashrecovery", "megatron_flashrecovery.testing"}
    assert losses(done.stdout) == losses(undisturbed(pretrain(*SHARDED)).said)
