"""`flashrecovery status` says where a run is, and whom it waits for."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from io import StringIO

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.core.coordinator import handle
from megatron_flashrecovery.core.job import Job
from megatron_flashrecovery.core.messages import Blamed, CheckpointWritten, Diagnosed, NodeJoined, NodeLost, StepsTimed
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime.chronicle import Chronicle
from megatron_flashrecovery.runtime.dialogue import StepDone
from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.node_messages import StepNoted
from megatron_flashrecovery.runtime.status import LauncherNoted
from tests.core.jobs import CONFIG, SEATS, A, B, described, executed, lost, ready, report, stood


class Run:
    """The records of a job, as its controller writes them."""

    def __init__(self, directory, out=sys.stderr):
        self.directory = directory
        self.chronicle = Chronicle(LaunchConfig(script="train.py", nproc_per_node=4, log_dir=directory), out)
        self._job = Job(CONFIG, Seats(SEATS))
        self._now = 0.0
        self.chronicle.begin(self._job, self._now)

    def tell(self, *events):
        for event in events:
            self._now += 0.5
            self.chronicle.record(event, handle(self._job, event, self._now), self._job, self._now)
        return self

    def train(self):
        self.tell(described(A), described(B), ready(A, 0, 1), ready(B, 2, 3))
        self.chronicle.note(StepNoted(StepDone(step=5, loss=2.5, grad_norm=1.0, skipped=False, epoch=0, seconds=0.25)))
        return self

    def recover(self):
        self.tell(lost(B, 3), stood(report(0), report(1)), stood(report(2)), ready(B, 3, epoch=1))
        return self.tell(executed(A, 0, 1), executed(B, 2, 3))

    def status(self, capsys):
        code = main(["status", str(self.directory)], {})
        return code, capsys.readouterr().out


@pytest.fixture
def run(tmp_path, capsys):
    run = Run(tmp_path)
    yield run
    run.chronicle.close("the test is over")


def test_a_run_that_nobody_has_joined_yet(run, capsys):
    code, said = run.status(capsys)
    assert (code, said.startswith("waiting for the nodes for 0.")) == (0, True)


def test_a_run_whose_journal_is_still_empty(tmp_path, capsys):
    (tmp_path / FILE_NAME).touch()
    assert main(["status", str(tmp_path)], {}) == 0
    assert "waiting for the nodes" in capsys.readouterr().out


def test_a_start_names_who_has_not_come(run, capsys):
    run.tell(described(A), ready(A, 0))
    code, said = run.status(capsys)
    assert code == 0
    assert said.splitlines()[0].startswith("starting for 0.")
    assert "waiting for rank 1, 2, 3 to come to the first step" in said


def test_whoever_starts_a_job_is_told_what_it_waits_for(tmp_path):
    job, out = Job(CONFIG, Seats(SEATS)), StringIO()
    chronicle = Chronicle(LaunchConfig(script="train.py", nproc_per_node=4, log_dir=tmp_path), out)
    for now in (0.0, 60.0):
        chronicle.remind(job, now, [A])
    chronicle.remind(job, 120.0)
    chronicle.close("the test is over")
    assert out.getvalue().splitlines()[:2] == [
        f"flashrecovery: epoch 0: waiting for {A} to do the script's imports, and join",
        "flashrecovery: epoch 0: waiting for all 4 ranks to come to the first step",
    ]


def test_training_tells_the_step_and_the_checkpoint(run, capsys):
    run.train().tell(CheckpointWritten(4))
    code, said = run.status(capsys)
    assert code == 0
    assert "epoch 0, 4 ranks on 2 nodes" in said
    assert "step 5 completed 0." in said
    assert "loss 2.5; it took 0.25 s" in said
    assert "newest checkpoint: step 4" in said
    assert "waiting" not in said


def test_a_recovery_names_whom_it_waits_for(run, capsys):
    run.train().tell(lost(B, 3), stood(report(0), report(1)))
    _, said = run.status(capsys)
    assert said.splitlines()[0].startswith("draining for 0.")
    assert "epoch 1" in said
    assert "waiting for rank 2 to stop at the next operation" in said


def test_spare_nodes_are_told_and_where_seats_are_that_have_moved(run, capsys):
    run.train().tell(NodeJoined("spare", 2), NodeJoined("spare2", 2))
    assert "2 spare nodes: spare, spare2" in run.status(capsys)[1].splitlines()
    run.tell(NodeLost(B, "connection closed"))
    lines = run.status(capsys)[1].splitlines()
    assert "ranks 2 and 3 of b are on spare now" in lines
    assert "1 spare node: spare2" in lines
    assert "4 ranks on 2 nodes" in lines[0]


def test_seats_that_wait_for_a_node_are_told(run, capsys):
    run.train().tell(NodeLost(B, "connection closed"))
    assert "ranks 2 and 3 without a node: start a spare one" in run.status(capsys)[1].splitlines()


def test_what_was_lost_is_told_afterwards(run, capsys):
    run.train().recover()
    _, said = run.status(capsys)
    assert "1 recovery; the last, in epoch 1: rank 3: killed by SIGKILL; it went on from step 5 after 2.50 s" in said


def test_a_slow_rank_is_named_when_it_becomes_so_and_in_the_status(tmp_path, capsys):
    run = Run(tmp_path).train()
    for step in range(1, 6):
        run.tell(StepsTimed(A, 0, step, {0: 0.1, 1: 0.1}, {}), StepsTimed(B, 0, step, {2: 0.1, 3: 0.4}, {}))
    says = "rank 3 is slow: it computes for 0.4 s in a step, its peer for 0.1 s, up to step 5"
    assert says in run.status(capsys)[1].splitlines()
    run.tell(StepsTimed(B, 0, 6, {2: 0.1, 3: 0.5}, {}))
    assert says.replace("0.4", "0.5").replace("step 5", "step 6") in run.status(capsys)[1].splitlines()
    for step in range(7, 11):
        run.tell(StepsTimed(B, 0, step, {2: 0.1, 3: 0.1}, {}))
    assert "rank 3 was slow: " in (said := run.status(capsys)[1])
    assert "up to step 6; not in the last 4 looks" in said
    run.tell(StepsTimed(B, 0, 11, {2: 0.1, 3: 0.1}, {}))
    assert "slow" not in run.status(capsys)[1]
    noted = [line.body for line in read_journal(tmp_path / FILE_NAME) if line.name == "SlowNoted"]
    assert [(body["rank"], body["evidence"] is None) for body in noted] == [(3, False), (3, True)]


@pytest.mark.parametrize(("failure", "code", "says"), [("", 0, "every rank has finished"), ("no room", 1, "no room")])
def test_the_end_is_told(run, capsys, failure, code, says):
    run.train().chronicle.close(failure)
    assert run.status(capsys)[0] == code
    assert f": {says}" in run.status(capsys)[1]


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"created": 0.0}], ids=["no-process", "another-process"])
def test_a_launcher_that_is_gone_without_a_word_is_found_out(tmp_path, capsys, monkeypatch, change):
    gone = replace(LauncherNoted.this_one(), **change)
    monkeypatch.setattr(LauncherNoted, "this_one", classmethod(lambda cls: gone))
    code, said = Run(tmp_path).train().status(capsys)
    assert code == 1
    assert said.startswith(f"died: the launcher (process {gone.pid}) is gone without a word; its last one was 0.")


def test_of_a_launcher_elsewhere_nothing_is_assumed(tmp_path, capsys, monkeypatch):
    elsewhere = LauncherNoted("another-machine", 2**22 + 1, 0.0)
    monkeypatch.setattr(LauncherNoted, "this_one", classmethod(lambda cls: elsewhere))
    code, said = Run(tmp_path).train().status(capsys)
    assert (code, said.startswith("training for 0.")) == (0, True)


def test_programs_get_json(run, capsys):
    run.train().recover()
    assert main(["status", "--json", str(run.directory)], {}) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["phase"], told["epoch"], told["step"], told["recoveries"]) == ("training", 1, 5, 1)
    assert told["last_recovery"]["lost_ranks"] == [3]


def test_a_directory_without_a_run_is_bad_input(tmp_path, capsys):
    assert main(["status", str(tmp_path)], {}) == 2
    assert "journal.jsonl does not exist: name the --log-dir of a run, or" in capsys.readouterr().err


def test_who_is_blamed_stays_so_whatever_later_diagnoses_say(run, capsys):
    run.train().tell(Diagnosed("rank 3 is slow", (Blamed("host n1", 0.002, "its ranks are slow", (B,)),), ""))
    _, said = run.status(capsys)
    assert "to blame: host n1 (p 0.002): its ranks are slow" in said
    assert "still blamed" not in said
    still = f"{B} is still blamed, by an earlier diagnosis: host n1, its ranks are slow"
    run.tell(Diagnosed("3 incidents so far", (), "nothing stands out"))
    assert f"3 incidents so far: undetermined: nothing stands out\n{still}" in run.status(capsys)[1]
    run.tell(Diagnosed("5 incidents so far", (), "the diagnosis failed: it was ended by signal 9"))
    assert f"5 incidents so far: the diagnosis failed: it was ended by signal 9\n{still}" in run.status(capsys)[1]


def test_what_has_no_slow_rank_is_not_told_as_the_reason_of_slow_ranks(tmp_path):
    out = io.StringIO()
    run = Run(tmp_path, out).train()
    for step in range(1, 6):
        run.tell(StepsTimed(A, 0, step, {0: 0.1, 1: 0.1}, {}), StepsTimed(B, 0, step, {2: 0.1, 3: 0.4}, {}))
    blamed = (
        Blamed("device n1/1", 0.001, "it computes long", (B,), (3,)),
        Blamed("leaf switch leaf1", 0.002, "errors", (A,), (0, 1)),
    )
    run.tell(Diagnosed("rank 3 is slow", blamed, ""), Diagnosed("5 incidents so far", blamed[1:], ""))
    assert out.getvalue().splitlines()[-3:] == [
        "flashrecovery: rank 3 is slow: device n1/1 is to blame (p 0.001): it computes long",
        "flashrecovery: rank 3 is slow; also conspicuous: leaf switch leaf1 (p 0.002): errors",
        "flashrecovery: 5 incidents so far: leaf switch leaf1 is to blame (p 0.002): errors",
    ]
