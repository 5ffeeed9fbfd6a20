"""A connection that goes while everybody lives: all go back to the step, on new communicators."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.processes.conftest import Equal, Undisturbed
from tests.processes.launcher import Job, run
from tests.processes.nodes import two_nodes


@pytest.mark.parametrize("at", ["forward", "between", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_a_connection_that_is_cut_costs_a_step_and_no_rank(tmp_path: Path, undisturbed: Undisturbed, at: str) -> None:
    job = Job(injections=(f"network:rank=2,step=5,at={at}",))
    outcome = run(job, tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    calm = undisturbed(job)
    assert outcome.results() == calm.results()
    assert outcome.state == calm.state
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == ()
    assert recovery.cause.startswith("communication failed in step ")
    assert recovery.steps_recomputed <= 1
    (told, *_) = outcome.journal("OperationsFailed")
    (park,) = outcome.journal("Park")
    assert park.time - told.time < 1.0


def test_a_connection_for_mirrors_that_is_reset_is_made_again_and_nobody_notices(
    tmp_path: Path, assert_equal: Equal
) -> None:
    job = Job(arguments=("--cut-mirror-at", "5", "--only-rank", "2"))
    outcome = run(job, tmp_path / "run")
    assert_equal(job, outcome)
    assert outcome.recoveries == ()


@pytest.mark.slow
def test_a_control_connection_that_is_reset_is_a_lost_node_and_both_sides_say_so_at_once(tmp_path: Path) -> None:
    with two_nodes(Job(ranks=2, arguments=("--steps", "1000000")), tmp_path) as nodes:
        nodes.first.wait_for(lambda: nodes.first.steps_done() > 5, "some steps")
        found = psutil.Process(nodes.second.process.pid).net_connections("tcp")
        (own_port,) = [each.laddr.port for each in found if each.raddr and each.raddr.port == nodes.port]
        began = time.time()
        reset = subprocess.run(["ss", "-K", "-t", "sport", "=", str(own_port)], capture_output=True, text=True)
        if "ESTAB" not in reset.stdout:
            pytest.skip(f"connections cannot be reset from outside: {reset.stderr}")
        words = [node.process.communicate(timeout=30)[0] for node in (nodes.first, nodes.second)]
        assert [node.process.returncode for node in (nodes.first, nodes.second)] == [1, 1]
        (lost,) = nodes.first.journal("NodeLost")
    assert lost.time - began < 1.0
    assert "is gone: its agent closed the connection" in words[0]
    assert "is gone" in words[1]
