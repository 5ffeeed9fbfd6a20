"""What a reviewer did to the runtime, and what it must not do to the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes.conftest import Equal
from tests.processes.launcher import ROOT, TOY, Job, Outcome, Running, run, started

KILL = "kill:rank=2,step=5,at=backward"


def toy(*arguments: str, **kwargs: object) -> Job:
    return Job(arguments=arguments, **kwargs)  # type: ignore[arg-type]


def continued(running: Running, timeout: float = 60.0) -> Outcome:
    said, _ = running.process.communicate(timeout=timeout)
    return Outcome(running.log_dir, running.process.returncode, said)


def test_a_launcher_that_was_stopped_for_a_while_loses_nothing(tmp_path: Path, assert_equal: Equal) -> None:
    job = toy("--steps", "300", injections=("kill:rank=1,step=200,at=backward",))
    with started(job, tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 5, "some steps")
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)  # longer than the heartbeat timeout; the rank dies in the meantime
        running.process.send_signal(signal.SIGCONT)
        assert_equal(job, continued(running))


def test_whoever_fails_after_the_last_step_makes_the_job_fail(tmp_path: Path) -> None:
    outcome = run(toy("--fail-at-end"), tmp_path / "run")
    assert outcome.exit_code == 1
    assert "rank 1 failed after its last step: exit code 1" in outcome.said


def test_ranks_that_leave_together_end_the_job_well(tmp_path: Path) -> None:
    outcome = run(toy("--leave-at", "4"), tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert outcome.recoveries == ()


def test_a_rank_that_leaves_alone_is_replaced_until_it_is_clear_that_it_will_not_stay(tmp_path: Path) -> None:
    outcome = run(toy("--leave-at", "4", "--only-rank", "1"), tmp_path / "run")
    assert outcome.exit_code == 1
    assert "rank 1 was lost" in outcome.said


def test_children_of_the_imports_and_of_dead_workers_do_no_harm(tmp_path: Path, assert_equal: Equal) -> None:
    script = tmp_path / "toy.py"
    head = "import subprocess\nsubprocess.Popen(['sleep', '1'])\n"
    source = TOY.read_text().replace(
        "from __future__ import annotations\n", "from __future__ import annotations\n" + head
    )
    script.write_text(source)
    job = Job(script, injections=(KILL,), arguments=("--child",))
    outcome = run(job, tmp_path / "run")  # fails if a child is left
    assert_equal(job, outcome)


def test_a_full_disk_costs_the_records_and_not_the_job(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (full / "run").mkdir()
        (full / "run" / "logs").symlink_to(tmp_path, target_is_directory=True)
        outcome = run(toy("--steps", "400", injections=(KILL,)), full / "run")
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)
    assert outcome.exit_code == 0, outcome.said
    assert "are incomplete from here on" in outcome.said


def test_a_reader_that_goes_away_does_not_end_the_job(tmp_path: Path) -> None:
    command = Job(arguments=("--steps", "200")).command(tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 0


def test_cold_workers_go_with_their_launcher(tmp_path: Path) -> None:
    script = tmp_path / "idle.py"
    script.write_text("import time\n\nif __name__ == '__main__':\n    time.sleep(300)\n")
    with started(Job(script, ranks=2, flags=("--no-preload",)), tmp_path / "run") as running:
        running.wait_for(lambda: len(running.pids()) == 2, "two workers")
        pids = running.pids().values()
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline, "workers outlived their launcher"
            time.sleep(0.01)


def test_the_store_listens_where_it_is_needed_and_nowhere_else(tmp_path: Path) -> None:
    with started(toy("--steps", "100000"), tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 2, "some steps")
        family = subprocess.run(
            [sys.executable, "-c", _LISTENERS, str(running.process.pid)], capture_output=True, text=True, check=True
        )
        running.process.send_signal(signal.SIGTERM)
        running.process.communicate(timeout=20)
    listeners = family.stdout.split()
    assert listeners
    assert all("127.0.0.1" in address for address in listeners), listeners


_LISTENERS = """
import psutil, sys
for c in psutil.Process(int(sys.argv[1])).net_connections("inet"):
    if c.status == "LISTEN": print(c.laddr.ip)
"""
