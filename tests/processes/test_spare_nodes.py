"""A lost node is replaced by one that waited: only its ranks are started anew, and no bit differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.runtime.replay import replay
from megatron_flashrecovery.runtime.summary import MoveRecord
from tests.processes.conftest import Undisturbed
from tests.processes.launcher import ROOT, Job, Outcome, Running, processes_of
from tests.processes.matrix import gpt
from tests.processes.nodes import Place, SeveralNodes, routed, several_nodes
from tests.processes.test_device_errors import say_in_kernel_log
from tests.processes.test_injection import inject
from tests.processes.test_silent_nodes import is_running, wait_until_gone

STARTED_WITHIN = 180.0
"""Seconds: all nodes do their imports on the cores of one machine."""
STEPS = ("--steps", "150", "--compute", "0.02")
JOB = Job(ranks=2, arguments=STEPS)
ENDLESS = Job(ranks=2, arguments=("--steps", "1000000", "--compute", "0.02"))
MOVED = MoveRecord(1, (2, 3), "node1", "node2")


@dataclass
class Cluster:
    """``nodes[0]`` has the controller and the records."""

    nodes: list[Running]
    several: SeveralNodes

    @property
    def first(self) -> Running:
        return self.nodes[0]

    def wait_for_steps(self, more: int = 5) -> None:
        upto = self.first.steps_done() + more
        self.first.wait_for(lambda: self.first.steps_done() >= upto, f"{more} steps", STARTED_WITHIN)

    def wait_for_spares(self, number: int) -> None:
        self.first.wait_for(lambda: self.first.count("NodeJoined") == number, f"{number} spare nodes", STARTED_WITHIN)

    def wait_for_recovery(self, number: int) -> None:
        self.first.wait_for(lambda: self.first.count("Resume") == number, f"recovery {number}")

    def end(self, timeout: float = 180.0) -> Outcome:
        said, _ = self.first.process.communicate(timeout=timeout)
        return Outcome(self.first.log_dir, self.first.process.returncode, said)


def kill_node(running: Running) -> None:
    """As a machine that is switched off: nobody there does anything any more."""
    for pid in processes_of(running.process.pid):
        os.kill(pid, signal.SIGKILL)


def last_words_of(running: Running) -> str:
    return running.process.communicate(timeout=20)[0]


@contextmanager
def cluster(
    tmp_path: Path, job: Job = JOB, spares: int = 1, places: tuple[Place, ...] | None = None
) -> Iterator[Cluster]:
    """All nodes are there, and some steps are done."""
    with several_nodes(job, tmp_path, spares, places) as several:
        made = Cluster([several.start(node) for node in range(2 + spares)], several)
        made.wait_for_spares(spares)
        made.wait_for_steps()
        yield made


@pytest.fixture
def equal(undisturbed: Undisturbed):
    """Bit for bit what the same job on one node gives, without any fault."""

    def check(outcome: Outcome, arguments: tuple[str, ...] = STEPS) -> None:
        assert outcome.exit_code == 0, outcome.said
        calm = undisturbed(Job(ranks=4, arguments=arguments))
        assert outcome.results() == calm.results()
        assert outcome.state == calm.state

    return check


def test_the_seats_of_a_killed_node_move_and_are_as_well_protected_there(tmp_path: Path, equal) -> None:
    with cluster(tmp_path) as job:
        before = job.first.pids()
        kill_node(job.nodes[1])
        job.wait_for_recovery(1)
        moved = job.first.pids()
        os.kill(moved[2], signal.SIGKILL)
        outcome = job.end()
        assert job.nodes[2].process.wait(20) == 0
        words = last_words_of(job.nodes[2])
        after = job.first.pids()
    equal(outcome)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(2, 3), (2,)]
    assert {rank: before[rank] for rank in (0, 1)} == {rank: after[rank] for rank in (0, 1)}
    assert after[3] == moved[3] != before[3]
    assert "node1 is lost (its agent closed the connection): its ranks 2 and 3 move to node2" in outcome.said
    assert outcome.summary.moves == (MOVED,)
    assert "this is a spare node: it waits until another one is lost" in words
    assert "the job stops" not in words
    assert replay(outcome.journal_lines()).difference is None
    assert main(["diagnose", str(outcome.log_dir)], {}) == 1, "nobody is to blame"


@pytest.mark.slow
def test_spare_nodes_are_used_one_after_the_other(tmp_path: Path, equal) -> None:
    with cluster(tmp_path, spares=2) as job:
        for number, lost in enumerate((1, 2), start=1):
            kill_node(job.nodes[lost])
            job.wait_for_recovery(number)
        outcome = job.end()
        assert job.nodes[3].process.wait(20) == 0
    equal(outcome)
    assert outcome.summary.moves == (MOVED, MoveRecord(2, (2, 3), "node2", "node3"))


def test_a_spare_node_that_is_lost_while_its_ranks_join_is_replaced_in_the_same_recovery(tmp_path: Path, equal) -> None:
    arguments = (*STEPS, "--join-delay", "2")
    with cluster(tmp_path, Job(ranks=2, arguments=arguments), spares=2) as job:
        kill_node(job.nodes[1])
        job.first.wait_for(lambda: job.first.count("WorkerStarted") == 6, "the workers on the spare node")
        kill_node(job.nodes[2])
        outcome = job.end()
        assert job.nodes[3].process.wait(20) == 0
    equal(outcome, arguments)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(2, 3)]
    assert outcome.summary.moves == (MOVED, MoveRecord(2, (2, 3), "node2", "node3"))


def test_a_signal_to_all_nodes_lets_workers_end_and_spare_nodes_leave_at_once(tmp_path: Path) -> None:
    with cluster(tmp_path, replace(ENDLESS, arguments=(*ENDLESS.arguments, "--on-sigterm", "leave"))) as job:
        for node in job.nodes:
            node.process.terminate()
        words = last_words_of(job.nodes[2])
        outcome = job.end()
        assert [node.process.wait(20) for node in job.nodes] == [128 + signal.SIGTERM] * 3
    assert "this node leaves the job: told to end by SIGTERM, and no worker sits here" in words
    assert (outcome.recoveries, "the job stops: told to end by SIGTERM" in outcome.said) == ((), True)


def test_a_spare_node_that_is_lost_disturbs_nobody_and_without_one_the_job_stops(tmp_path: Path) -> None:
    with cluster(tmp_path, ENDLESS) as job:
        pids = job.first.pids()
        kill_node(job.nodes[2])
        job.first.wait_for(lambda: job.first.count("NodeLost") == 1, "the loss")
        job.wait_for_steps()
        assert job.first.pids() == pids
        kill_node(job.nodes[1])
        outcome = job.end()
    assert outcome.exit_code == 1
    assert "node2 is lost (its agent closed the connection): it had no seats; 0 spare nodes are left" in outcome.said
    assert "node node1 with rank 2, 3 is gone: its agent closed the connection; no spare node is left" in outcome.said
    assert "start the job again without it, from its newest checkpoint" in outcome.said
    assert outcome.recoveries == ()


@pytest.mark.slow
def test_a_spare_node_may_come_when_it_is_needed(tmp_path: Path, equal) -> None:
    with several_nodes(JOB, tmp_path, spares=1) as several:
        job = Cluster([several.start(0), several.start(1)], several)
        job.wait_for_steps()
        kill_node(job.nodes[1])
        job.first.wait_for(lambda: job.first.count("NodeLost") == 1, "the loss")
        spare = several.start(2)
        outcome = job.end()
        assert spare.process.wait(20) == 0
    equal(outcome)
    assert "its ranks 2 and 3 wait for a spare node" in outcome.said
    assert "spare node node2 has come: ranks 2 and 3 of node1 move there" in outcome.said


def test_a_node_that_is_lost_before_the_first_step_costs_a_restart(tmp_path: Path, equal) -> None:
    arguments = (*STEPS, "--start-delay", "3")
    with several_nodes(Job(ranks=2, arguments=arguments), tmp_path, spares=1) as several:
        job = Cluster([several.start(node) for node in range(3)], several)
        job.wait_for_spares(1)
        job.first.wait_for(lambda: job.first.count("WorkerStarted") == 4, "all workers", STARTED_WITHIN)
        kill_node(job.nodes[1])
        outcome = job.end()
        assert job.nodes[2].process.wait(20) == 0
    equal(outcome)
    assert (outcome.recoveries, [epoch.is_restart for epoch in outcome.summary.epochs]) == ((), [True])
    assert outcome.summary.moves == (MOVED,)


def test_a_node_that_is_cut_off_is_replaced_and_when_it_is_joined_again_nothing_is_left_of_it(
    tmp_path: Path, equal
) -> None:
    with routed(3) as network, cluster(tmp_path, places=network.places) as job:
        cut_off = [pid for rank, pid in job.first.pids().items() if rank in (2, 3)]
        network.cut_off(1)
        wait_until_gone(cut_off, within=10.0)
        words = last_words_of(job.nodes[1])
        network.join_again(1)
        outcome = job.end()
        assert (job.nodes[2].process.wait(20), job.nodes[1].process.returncode) == (0, 1)
    equal(outcome)
    assert "node1 is lost (nothing heard from its agent for 2.0 s): its ranks 2 and 3 move to node2" in outcome.said
    assert "this node leaves the job: the controller's machine has acknowledged nothing for 2" in words


@pytest.mark.slow
def test_an_agent_that_does_not_run_is_replaced_and_its_workers_end_when_it_goes_on(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Until then they live beside their successors, and nobody listens to them. What they did while nobody took note of
    it is not in the records of steps."""
    with cluster(tmp_path) as job:
        stopped = [pid for rank, pid in job.first.pids().items() if rank in (2, 3)]
        job.nodes[1].process.send_signal(signal.SIGSTOP)
        job.wait_for_recovery(1)
        job.wait_for_steps()
        assert all(map(is_running, stopped))
        job.nodes[1].process.send_signal(signal.SIGCONT)
        wait_until_gone(stopped, within=10.0)
        words = last_words_of(job.nodes[1])
        outcome = job.end()
    calm = undisturbed(Job(ranks=4, arguments=STEPS))
    assert (outcome.exit_code, outcome.state) == (0, calm.state), outcome.said
    assert set(outcome.results()) <= set(calm.results())
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(2, 3)]
    assert "this node leaves the job: this node was given up: nothing heard from its agent" in words


def test_a_fault_that_takes_the_agent_along_comes_once(tmp_path: Path, equal) -> None:
    specs = ("agent:rank=2,step=20,at=backward", "kill:rank=2,step=30,at=backward")
    with cluster(tmp_path, Job(ranks=2, arguments=STEPS, injections=specs)) as job:
        outcome = job.end()
        assert job.nodes[2].process.wait(20) == 0
        assert "never happened" not in last_words_of(job.nodes[2])
    equal(outcome)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(2, 3), (2,)]
    assert [line.body["spec"] for line in outcome.journal("InjectionNoted")] == [specs[1]]


def test_a_node_whose_device_is_gone_is_left_out_for_a_spare_one(tmp_path: Path, equal) -> None:
    arguments = (*STEPS, "--pretend-devices")
    with cluster(tmp_path, Job(ranks=2, arguments=arguments)) as job:
        say_in_kernel_log("NVRM: Xid (PCI:0000:f0:02): 79, pid=1, GPU has fallen off the bus.")
        job.wait_for_recovery(1)
        assert job.nodes[1].process.poll() is None, "it waits for the end of the job, without workers"
        outcome = job.end()
        assert [node.process.wait(20) for node in job.nodes] == [0, 0, 0]
        words = last_words_of(job.nodes[1])
    equal(outcome, arguments)
    assert "ranks 2 and 3 move from node1 to node2" in outcome.said
    assert outcome.summary.moves == (MOVED,)
    assert "no worker sits here any more" in words
    assert "the job stops" not in words


@pytest.mark.slow
def test_a_node_without_any_copy_elsewhere_starts_all_from_the_checkpoint_on_the_spare_one(tmp_path: Path) -> None:
    """With a plain optimizer the copies are with peers, and all of them were on the lost node."""
    calm = gpt("--no-use-distributed-optimizer", "--save", str(tmp_path / "saved"), "--save-interval", "3")
    job = replace(calm, ranks=4, injections=("agent:rank=5,step=5,at=backward",))
    with several_nodes(job, tmp_path, spares=1) as several:
        nodes = Cluster([several.start(node) for node in range(3)], several)
        outcome = nodes.end(timeout=240.0)
        assert nodes.nodes[2].process.wait(20) == 0
    assert outcome.exit_code == 0, outcome.said
    assert "all workers start again, from the newest checkpoint" in outcome.said
    assert [line.step for line in outcome.steps] == list(range(1, 10))
    assert [move.target for move in outcome.summary.moves] == ["node2"]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["backward", "optimizer"])
def test_a_node_with_a_whole_pipeline_stage_moves_in_real_megatron_core(
    tmp_path: Path, undisturbed: Undisturbed, at: str
) -> None:
    """All data-parallel peers of its ranks are lost with it: every shard of the optimizer comes from the other node."""
    calm = gpt()
    job = replace(calm, ranks=4, injections=(f"agent:rank=5,step=4,at={at}", "kill:rank=6,step=6,at=backward"))
    with several_nodes(job, tmp_path, spares=1) as several:
        nodes = Cluster([several.start(node) for node in range(3)], several)
        outcome = nodes.end(timeout=240.0)
        assert nodes.nodes[2].process.wait(20) == 0
    assert outcome.exit_code == 0, outcome.said
    assert (outcome.results(), outcome.state) == (undisturbed(calm).results(), undisturbed(calm).state)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(4, 5, 6, 7), (6,)]
    assert "its ranks 4 to 7 move to node2" in outcome.said


def test_neither_a_second_node_of_one_number_nor_a_lost_one_gets_into_the_job(tmp_path: Path) -> None:
    with cluster(tmp_path, ENDLESS) as job:
        kill_node(job.nodes[1])
        job.wait_for_recovery(1)
        for number in (1, 2):
            again = job.several.start(number)
            words = again.process.communicate(timeout=STARTED_WITHIN)[0]
            assert again.process.returncode == 2
            assert f"leaves the job: node{number} has joined this job before: give each node a --node-rank" in words
        job.wait_for_steps()
        assert job.first.count("NodeLost") == 1


def test_status_tells_where_seats_are_and_faults_find_them_there(tmp_path: Path) -> None:
    def status() -> dict[str, object]:
        command = [sys.executable, "-m", "megatron_flashrecovery", "status", "--json", str(tmp_path / "0")]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {key: json.loads(told)[key] for key in ("spares", "moved", "nodes")}

    with cluster(tmp_path, replace(ENDLESS, flags=("--allow-injection",))) as job:
        assert status() == {"spares": ["node2"], "moved": [], "nodes": 2}
        kill_node(job.nodes[1])
        job.wait_for_recovery(1)
        moved = {"ranks": [2, 3], "origin": "node1", "target": "node2"}
        assert status() == {"spares": [], "moved": [moved], "nodes": 2}
        said = inject(tmp_path / "0", "kill:rank=2")
        assert said.returncode == 0, said.stderr
        job.wait_for_recovery(2)


def test_a_signal_while_a_late_node_is_waited_for_makes_no_failure_of_a_finished_job(tmp_path: Path) -> None:
    job = Job(ranks=1, arguments=("--steps", "3"))
    with several_nodes(job, tmp_path, spares=1) as several:
        first, _ = several.start(0), several.start(1)
        first.wait_for((tmp_path / "0" / "summary.json").exists, "the end of the job", STARTED_WITHIN)
        launcher = psutil.Process(first.process.pid)
        first.wait_for(lambda: not launcher.children(), "its workers and their server to end")
        first.process.terminate()
        said, _ = first.process.communicate(timeout=20)
        assert first.process.returncode == 0, said
        assert "the job is over; node2 has not come yet" in said
