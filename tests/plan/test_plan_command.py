"""`flashrecovery plan` answers from flags and from a running job alike."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank
from megatron_flashrecovery.core.messages import SeatsDescribed
from megatron_flashrecovery.runtime.journal import Journal
from megatron_flashrecovery.runtime.node_messages import BillNoted

DEMO = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]

EXPERTS = ["--nproc-per-node", "8", "--params", "1B", "--expert-model-parallel-size", "4"]


def plan(*flags):
    return main(["plan", *flags], {})


def test_the_demos_layout_is_hosted_by_peers_on_one_node_and_says_what_that_means(capsys):
    assert plan("--nproc-per-node", "8", "--params", "1B", *DEMO) == 0
    said = capsys.readouterr().out
    assert "8 ranks; nodes: 1" in said
    assert "any one rank: yes" in said
    assert "any one node: no, 1 of 1" in said
    assert "the loss of that node is not survived" in said


def test_a_large_job_fits_on_a_screen(capsys):
    flags = ["--nnodes", "600", "--nproc-per-node", "8", "--tensor-model-parallel-size", "8", "--params", "7B"]
    assert plan(*flags, "--use-distributed-optimizer") == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 40
    assert "any one node: yes" in said


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["plain", "distributed"])
def test_a_job_without_data_parallel_peers_is_said_to_mirror_everything(optimizer, capsys):
    flags = ["--nnodes", "4", "--nproc-per-node", "8", "--tensor-model-parallel-size", "32", "--params", "7B"]
    assert plan(*flags, *optimizer) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("no rank has a data-parallel peer: every rank's whole state is mirrored")


def test_a_running_job_is_read_from_its_journal(tmp_path, capsys):
    ranks = Rank(0), Rank(1)
    journal = Journal(tmp_path / "journal.jsonl")
    for rank, host in zip(ranks, reversed(ranks), strict=True):
        seats = SeatsDescribed(NodeId(f"node{rank}"), Epoch(0), True, {rank: host}, {rank: ranks}, {})
        journal.write("event", seats, time=1.0, epoch=Epoch(0))
        journal.write("note", BillNoted(rank, host, 2**30, None), time=1.0, epoch=Epoch(0))
    journal.close()
    assert plan(str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "2 ranks; nodes: 2" in said
    assert "each rank hands 1 GiB to its host" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(["--params", "1B"], "how many ranks?", id="no-ranks"),
        pytest.param(["--nproc-per-node", "8"], "how large is the model? --num-layers", id="no-model"),
        pytest.param(["--nproc-per-node", "8", "--params", "much"], "--params much", id="no-number"),
        pytest.param(["--world-size", "6", "--params", "1B", *DEMO], "6 ranks do not divide", id="indivisible"),
        pytest.param(["--world-size", "1", "--params", "1B"], "the job has one rank", id="single-rank"),
        pytest.param(["--world-size", "8", "--nnodes", "3", "--nproc-per-node", "4"], "does not fill", id="nodes"),
        pytest.param(["--world-size", "0"], "--world-size 0", id="no-rank"),
        pytest.param(
            ["--world-size", "8", "--params", "1B", "--num-distributed-optimizer-instances", "3"],
            "does not divide 8 peers",
            id="instances",
        ),
        pytest.param([*EXPERTS, "--num-experts", "6", "--use-distributed-optimizer"], "6 is no multiple", id="experts"),
        pytest.param([*EXPERTS, "--num-experts", "8"], "needs --use-distributed-optimizer", id="experts-replicated"),
        pytest.param(["--worldsize", "8"], "did you mean --world-size?", id="unknown-flag"),
        pytest.param(["nowhere"], "does not exist", id="no-such-directory"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(flags, says, capsys):
    assert plan(*flags) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
