"""The batch scripts, with a SLURM that is made of two shell scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.launcher import ROOT, TOY

LAUNCH = ROOT / "launch"
SCONTROL = """#!/bin/sh
echo 127.0.0.1
echo 127.0.0.2
"""
# Every node is this one: each task gets its number, as from the real one, and the worst exit code is that of the step.
# LATE_TASK, if there is one, begins when the job has been over for some time.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do echo "$1" >> "$SRUN_FLAGS"; shift; done
begin() {
  if [[ $SLURM_PROCID == "${LATE_TASK:-}" ]]; then
    until [[ -s $RUN_DIR/summary.json ]]; do sleep 0.1; done
    sleep 6
  fi
  exec "$@"
}
for task in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_PROCID=$task begin "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
FLASHRECOVERY = f"""#!/bin/sh
exec {sys.executable} -m megatron_flashrecovery "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script on two nodes of two ranks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("flashrecovery", FLASHRECOVERY)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SRUN_FLAGS": str(tmp_path / "flags"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "RANKS_PER_NODE": "2",
        "SPARES_PER_NODE": "0",
        "RUN_DIR": str(tmp_path / "run"),
    }


def sbatch(environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / "pretrain_gpt.sbatch"), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )


def test_a_batch_job_trains_on_all_its_nodes(slurm, tmp_path):
    done = sbatch(slurm, str(TOY), "--steps", "4")
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (4, 4)
    flags = (tmp_path / "flags").read_text()
    assert "--kill-on-bad-exit=0" in flags
    assert "--no-kill" in flags


@pytest.mark.parametrize("inject", [(), ("--inject", "agent:rank=2,step=3,at=forward")], ids=["calm", "lost-node"])
def test_a_batch_job_ends_well_with_spare_nodes_also_if_one_was_needed(slurm, tmp_path, inject):
    done = sbatch({**slurm, "SLURM_NNODES": "3", "SPARE_NODES": "1"}, *inject, str(TOY), "--steps", "6")
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (4, 6)
    assert [move["target"] for move in summary["moves"]] == (["node2"] if inject else [])


def test_a_spare_node_that_comes_when_a_short_job_is_over_is_not_left_waiting(slurm, tmp_path):
    done = sbatch({**slurm, "SLURM_NNODES": "3", "SPARE_NODES": "1", "LATE_TASK": "2"}, str(TOY), "--steps", "6")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcome"] == "finished"
    assert "the job is over; node2 has not come yet" in done.stdout


def test_a_batch_job_that_never_ran_fails_whatever_an_earlier_one_has_left_there(slurm, tmp_path):
    """SLURM may put a job into its queue again: same number, same directory."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "journal.jsonl").write_text("")
    (run / "summary.json").write_text('{"outcome": "finished"}')
    os.utime(run / "summary.json", (1, 1))
    done = sbatch({**slurm, "SLURM_NNODES": "3", "SPARE_NODES": "1"}, "--join-timeout", "5", str(TOY), "--steps", "6")
    assert done.returncode != 0, done.stdout
    assert json.loads((run / "summary.json").read_text()) == {"outcome": "finished"}


def test_the_failure_of_a_job_is_that_of_its_batch_script(slurm):
    done = sbatch(slurm, str(TOY), "--no-such-flag")
    assert done.returncode != 0
    assert "--no-such-flag" in done.stdout


@pytest.mark.parametrize("missing", ["script", "slurm"])
def test_a_batch_script_says_how_it_is_used(slurm, missing):
    arguments = () if missing == "script" else (str(TOY),)
    if missing == "slurm":
        del slurm["SLURM_JOB_ID"]
    done = sbatch(slurm, *arguments)
    assert done.returncode != 0
    assert ("usage: sbatch" if missing == "script" else "this script is for sbatch") in done.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sbatch")), ids=lambda path: path.name)
def test_every_batch_script_is_bash(path: Path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_workflow_calls_what_the_makefile_has():
    makefile = (ROOT / "Makefile").read_text()
    steps = (LAUNCH / "gpu_tests.yml").read_text().splitlines()
    called = [line.split("make ")[1] for line in steps if "run: make" in line]
    assert called
    assert all(f"\n{verb}:" in makefile for verb in called)
