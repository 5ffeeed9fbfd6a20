"""A node that is gone, with a word or without: it is seen within three seconds, the job says so, and the node itself
ends its workers, for its seats may be somebody else's by then."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.processes.launcher import Job, Running
from tests.processes.nodes import TwoNodes, routed, two_nodes

FOR_EVER = ("--steps", "1000000")
JOB = Job(ranks=2, arguments=FOR_EVER)


def pids_of(nodes: TwoNodes, ranks: Collection[int]) -> list[int]:
    return [pid for rank, pid in nodes.first.pids().items() if rank in ranks]


def wait_until_gone(pids: list[int], within: float) -> None:
    deadline = time.monotonic() + within
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """One that waits for somebody to take note of its end runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def said(running: Running, timeout: float = 20.0) -> str:
    return running.process.communicate(timeout=timeout)[0]


@pytest.mark.parametrize("preload", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_workers_go_with_the_agent_of_their_node_and_the_job_names_it(tmp_path: Path, preload: bool) -> None:
    job = Job(ranks=2, arguments=FOR_EVER, flags=() if preload else ("--no-preload",))
    with two_nodes(job, tmp_path) as nodes:
        nodes.first.wait_for(lambda: nodes.first.steps_done() > 5, "some steps")
        workers = pids_of(nodes, (2, 3))
        nodes.second.process.kill()
        killed = time.time()
        wait_until_gone(workers, within=1.0)
        words = said(nodes.first)
    (lost,) = nodes.first.journal("NodeLost")
    assert lost.time - killed < 1.0
    assert nodes.first.process.returncode == 1
    assert "node node1 with rank 2, 3 is gone: its agent closed the connection" in words
    assert "start the job again without it, from its newest checkpoint" in words


def test_a_node_that_the_network_is_cut_off_from_is_lost_and_ends_its_own_workers(tmp_path: Path) -> None:
    with routed() as network, two_nodes(JOB, tmp_path, network.places) as nodes:
        nodes.first.wait_for(lambda: nodes.first.steps_done() > 5, "some steps")
        workers = pids_of(nodes, (2, 3))
        network.cut()
        cut = time.time()
        words = said(nodes.first)
        (lost,) = nodes.first.journal("NodeLost")
        assert 1.5 < lost.time - cut < 3.0
        assert "node node1 with rank 2, 3 is gone: nothing heard from its agent for 2.0 s" in words
        wait_until_gone(workers, within=3.0)
        assert "the controller's machine has acknowledged nothing for 2" in said(nodes.second)
        assert nodes.second.process.returncode == 1


def test_a_network_that_comes_back_in_time_costs_nothing(tmp_path: Path) -> None:
    with routed() as network, two_nodes(Job(ranks=2, arguments=("--steps", "400")), tmp_path, network.places) as nodes:
        nodes.first.wait_for(lambda: nodes.first.steps_done() > 5, "some steps")
        network.cut()
        time.sleep(1.0)  # half of what a node may be silent for
        network.join()
        words = said(nodes.first, 60.0)
        assert nodes.first.process.returncode == 0, words
        assert "finished at step 400 after 0 recoveries" in words
        assert nodes.second.process.wait(20) == 0


def test_a_controller_that_was_stopped_for_a_while_loses_no_node(tmp_path: Path) -> None:
    """Its machine acknowledges what the other nodes send all the time."""
    with two_nodes(Job(ranks=2, arguments=("--steps", "1000")), tmp_path) as nodes:
        nodes.first.wait_for(lambda: nodes.first.steps_done() > 5, "some steps")
        nodes.first.process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)  # twice as long as a node may be silent
        nodes.first.process.send_signal(signal.SIGCONT)
        words = said(nodes.first, 60.0)
        assert nodes.first.process.returncode == 0, words
        assert nodes.first.count("NodeLost") == 0
        assert nodes.second.process.wait(20) == 0


def test_the_only_rank_of_a_node_that_leaves_alone_is_lost_as_one_of_many_would_be(tmp_path: Path) -> None:
    job = Job(ranks=1, arguments=("--leave-at", "4", "--only-rank", "1"))
    with two_nodes(job, tmp_path) as nodes:
        words = said(nodes.first, 60.0)
    assert nodes.first.process.returncode == 1
    assert "rank 1 was lost" in words
    assert len(nodes.first.journal("WorkersLost")) > 1, "its replacement has left, too"
