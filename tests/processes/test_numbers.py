"""Numbers that are not finite: nobody writes them, the step is computed again, and then it is as the user wants."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.conftest import Undisturbed
from tests.processes.launcher import Job, Outcome, run
from tests.processes.matrix import OPTIMIZERS, gpt

REPLICATED = ("--replicated",)
ALWAYS = "nan:rank=1,step=5,at=grad_sync,times=always"
SOON = ("--checksum-steps", "3")


def assert_as_if_nothing_had_been(outcome: Outcome, calm: Outcome) -> None:
    assert outcome.exit_code == 0, outcome.said
    assert outcome.results() == calm.results()
    assert outcome.state == calm.state
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [()]
    assert [recovery.groups.rebuilt for recovery in outcome.recoveries] == [0]


@pytest.mark.parametrize("optimizer", [pytest.param((), id="sharded"), pytest.param(REPLICATED, id="replicated")])
def test_what_does_not_come_again_changes_no_bit_and_makes_a_device_suspect(
    tmp_path: Path, undisturbed: Undisturbed, optimizer: tuple[str, ...]
) -> None:
    job = Job(arguments=optimizer, injections=("nan:rank=1,step=5,at=grad_sync",))
    outcome = run(job, tmp_path / "run")
    assert_as_if_nothing_had_been(outcome, undisturbed(job))
    (bad,) = outcome.summary.bad_numbers
    assert (bad.step, bad.suspect, bad.times) == (5, 1, 1)
    assert "did not come again, so the device of rank 1 is suspected" in outcome.said


def test_what_comes_again_stops_the_job_and_names_step_rank_and_module(tmp_path: Path) -> None:
    outcome = run(Job(injections=(ALWAYS,)), tmp_path / "run")
    assert outcome.exit_code == 1
    assert len(outcome.recoveries) == 1
    assert (
        "the job stops: step 5: the gradient norm is nan, again on the same data, "
        "first in the gradient of the toy on rank 1"
    ) in outcome.said
    assert [line.step for line in outcome.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", [pytest.param((), id="sharded"), pytest.param(REPLICATED, id="replicated")])
def test_a_step_that_is_left_out_stays_so_when_it_is_computed_again(
    tmp_path: Path, undisturbed: Undisturbed, optimizer: tuple[str, ...]
) -> None:
    """With a rank lost in that step, and one behind it, it is the run in which nobody was lost."""
    skip = (*optimizer, "--nan", "skip")
    calm = run(Job(arguments=skip, injections=(ALWAYS,)), tmp_path / "calm")
    assert calm.exit_code == 0, calm.said
    assert calm.results()[:4] == undisturbed(Job(arguments=optimizer)).results()[:4]
    assert [line.grad_norm_hex is None for line in calm.steps] == [line.step == 5 for line in calm.steps]
    kills = ("kill:rank=2,step=5,at=between", "kill:rank=3,step=6,at=forward")
    outcome = run(Job(arguments=skip, injections=(ALWAYS, *kills)), tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert (outcome.results(), outcome.state) == (calm.results(), calm.state)
    assert [recovery.lost_ranks for recovery in outcome.recoveries[:2]] == [(), ()]
    assert sorted(rank for recovery in outcome.recoveries for rank in recovery.lost_ranks) == [2, 3]


@pytest.mark.slow
def test_a_loss_in_the_step_that_is_looked_at_closely_does_not_forget_it(tmp_path: Path) -> None:
    job = Job(injections=(ALWAYS, "kill:rank=3,step=5,at=backward"), arguments=("--nan", "retry"))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 1
    assert "there is no checkpoint to fall back to" in outcome.said
    assert "first in the gradient of the toy on rank 1" in outcome.said


@pytest.mark.parametrize(
    ("rank", "at", "optimizer"),
    [
        (5, "backward", "distributed"),
        pytest.param(2, "forward", "plain", marks=pytest.mark.slow),
        pytest.param(7, "backward", "overlap", marks=pytest.mark.slow),
    ],
)
def test_on_megatron_core_what_does_not_come_again_changes_no_bit(
    tmp_path: Path, undisturbed: Undisturbed, rank: int, at: str, optimizer: str
) -> None:
    job = gpt(*OPTIMIZERS[optimizer], injections=(f"nan:rank={rank},step=4,at={at}",))
    assert_as_if_nothing_had_been(run(job, tmp_path / "run"), undisturbed(job))


def test_on_megatron_core_what_comes_again_names_the_module(tmp_path: Path) -> None:
    job = gpt("--flash-recovery-nan", "stop", injections=("nan:rank=1,step=4,at=forward,times=always",))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 1
    assert (
        "step 4: the gradient norm is nan, again on the same data, first in the output of model0.decoder on rank 1"
        in (outcome.said)
    )


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        pytest.param(4, "nobody can tell whose are wrong", id="two-peers"),
        pytest.param(6, "those of rank 2 are wrong", id="three-peers"),
    ],
)
def test_one_wrong_bit_of_a_parameter_is_seen_within_so_many_steps(tmp_path: Path, ranks: int, says: str) -> None:
    arguments = (*REPLICATED, *SOON, "--steps", "200")
    outcome = run(
        Job(ranks=ranks, arguments=arguments, injections=("bitflip:rank=2,step=4,at=between",)), tmp_path / "run"
    )
    assert outcome.exit_code == 1
    assert "data-parallel peers hold different parameters in step" in outcome.said
    assert says in outcome.said
    first = min(line.body["step"] for line in outcome.journal("PeersDiffered"))
    assert 4 <= first <= 4 + 3


@pytest.mark.parametrize("optimizer", [pytest.param((), id="sharded"), pytest.param(REPLICATED, id="replicated")])
def test_losses_make_no_peers_differ(tmp_path: Path, undisturbed: Undisturbed, optimizer: tuple[str, ...]) -> None:
    kills = ("kill:rank=2,step=4,at=backward", "kill:rank=1,step=6,at=optimizer", "kill:rank=0,step=8,at=mirror")
    job = Job(arguments=(*optimizer, *SOON, "--steps", "12"), injections=kills)
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert outcome.results() == undisturbed(job).results()
    assert not outcome.journal("PeersDiffered")


def test_a_spike_is_noted_and_nothing_else(tmp_path: Path) -> None:
    job = Job(arguments=("--steps", "40"), injections=("spike:rank=1,step=30,at=grad_sync",))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert not outcome.recoveries
    assert 30 in [line.body["step"] for line in outcome.journal("SpikeNoted")]
