"""Processes without a job: forked or cold, watched until they end."""

from __future__ import annotations

import ast
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, WorkerId
from megatron_flashrecovery.runtime import workers as workers_module
from megatron_flashrecovery.runtime.dialogue import Seat
from megatron_flashrecovery.runtime.fork_server import has_main_guard, preload
from megatron_flashrecovery.runtime.workers import Worker, WorkerEnded, Workers

ENDING = """
import atexit, sys, threading, time

def later():
    time.sleep(0.2)
    print("thread", end=" ")

if __name__ == "__main__":
    atexit.register(lambda: print("handler", end=" "))
    threading.Thread(target=later).start()
    exec(sys.argv[1])
"""
GUARDED = 'import sys\nif __name__ == "__main__":\n    print("never run here")\n'


@pytest.mark.parametrize(
    ("source", "guarded"),
    [
        pytest.param(GUARDED, True, id="guarded"),
        pytest.param("print('training')\n", False, id="bare"),
        pytest.param("if True:\n    pass\n", False, id="another-if"),
        pytest.param("def main():\n    if __name__ == '__main__':\n        pass\n", False, id="not-at-top-level"),
    ],
)
def test_only_a_script_with_a_main_guard_may_be_imported(source: str, guarded: bool) -> None:
    assert has_main_guard(source) is guarded


def test_an_unguarded_script_is_never_run_by_preloading(tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert "cannot be imported without running it" in preload(str(script))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(params=[True, False], ids=["forked", "cold"])
def workers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pool = Workers(str(script), tmp_path / "logs", environment, preload=request.param)
    pool.wait_for_server(30.0)
    yield pool
    pool.close(grace=2.0)


def seat_of(script: Path, ending: str) -> Seat:
    return Seat(
        Rank(0), WorkerId("0"), NodeId("a"), Epoch(0), False, b"", 1, 1, "", 0, "", str(script), False, (ending,), {}
    )


def wait_for_pid(pool: Workers, worker: Worker) -> int:
    deadline = time.monotonic() + 20
    while worker.pid is None:
        assert time.monotonic() < deadline
        assert not pool.poll()
        time.sleep(0.005)
    return worker.pid


def wait_for_end(pool: Workers) -> WorkerEnded:
    deadline = time.monotonic() + 20
    while not (ended := pool.poll()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (only,) = ended
    return only


def test_a_killed_worker_is_noticed_with_its_cause(workers: Workers) -> None:
    worker = workers.start("w.log")
    os.kill(wait_for_pid(workers, worker), signal.SIGKILL)
    end = wait_for_end(workers)
    assert end.worker is worker
    assert end.cause == "killed by SIGKILL"
    assert workers.living == []


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [("pass", 0), ("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('in words')", 1), ("raise KeyError('no')", 1)],
)
def test_a_script_ends_as_it_would_by_itself(workers: Workers, tmp_path: Path, ending: str, exit_code: int) -> None:
    worker = workers.start("w.log")
    worker.channel.send(seat_of(tmp_path / "script.py", ending))
    assert wait_for_end(workers).exit_code == exit_code
    said = worker.log.read_text()
    assert said.endswith("thread handler ")
    assert ("in words" in said) == ("words" in ending)
    assert ("KeyError" in said) == ("KeyError" in ending)


@pytest.mark.parametrize("preload", [True, False], ids=["forked", "cold"])
def test_a_worker_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: bool
) -> None:
    """Nor does one of torchrun, and another copy of this package there would not understand its launcher."""
    script = tmp_path / "script" / "script.py"
    script.parent.mkdir()
    script.write_text(ENDING)
    for module in ("megatron_flashrecovery", "msgspec"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from the current directory')\n")
    monkeypatch.chdir(tmp_path)
    pool = Workers(str(script), tmp_path / "logs", dict(os.environ), preload=preload)
    try:
        pool.wait_for_server(30.0)
        worker = pool.start("w.log")
        arguments = ("print(sys.path)",)
        worker.channel.send(
            Seat(
                Rank(0),
                WorkerId("0"),
                NodeId("a"),
                Epoch(0),
                False,
                b"",
                1,
                1,
                "",
                0,
                "",
                str(script),
                False,
                arguments,
                {},
            )
        )
        assert wait_for_end(pool).exit_code == 0, worker.log.read_text()
        path = ast.literal_eval(worker.log.read_text().splitlines()[0])
        assert path[0] == str(script.parent)
        assert not {"", str(tmp_path)} & set(path)
    finally:
        pool.close(grace=2.0)


def test_a_spare_whose_agent_goes_away_ends_by_itself(workers: Workers) -> None:
    worker = workers.start("w.log")
    wait_for_pid(workers, worker)
    worker.channel.close()
    assert wait_for_end(workers).exit_code == 0


def test_a_worker_killed_before_its_pid_is_known_still_ends(workers: Workers) -> None:
    workers.kill(workers.start("w.log"))
    wait_for_end(workers)


def test_the_loss_of_the_fork_server_is_named_and_another_one_takes_its_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    pool = Workers(str(script), tmp_path / "logs", {**os.environ, "OMP_NUM_THREADS": "1"}, preload=True)
    pool.wait_for_server(30.0)
    worker = pool.start("w.log")
    server = psutil.Process(wait_for_pid(pool, worker)).ppid()
    os.kill(server, signal.SIGKILL)
    end = wait_for_end(pool)
    assert end.worker is worker
    assert end.cause == "ended together with the fork server of its node (killed by SIGKILL)"
    assert pool.start("cold.log").process is not None
    said = capfd.readouterr().err
    assert f"the fork server (process {server}) is gone: killed by SIGKILL; workers that ended with it: 1; " in said
    assert "replacements start cold until" in said
    deadline = time.monotonic() + 30
    while pool.cold_because:
        assert time.monotonic() < deadline
        assert not pool.poll()
        time.sleep(0.005)
    assert "another fork server is there" in capfd.readouterr().err
    third = pool.start("third.log")
    wait_for_pid(pool, third)
    assert third.process is None
    pool.close(grace=0.0)


def test_who_is_slow_to_end_is_waited_for_with_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_SILENT_FOR", 0.1)
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    pool = Workers(str(script), tmp_path / "logs", {**os.environ, "OMP_NUM_THREADS": "1"}, preload=True)
    pool.wait_for_server(30.0)
    worker = pool.start("w.log")
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    worker.channel.send(seat_of(script, deaf))
    wait_for_pid(pool, worker)
    deadline = time.monotonic() + 20
    while "deaf" not in worker.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    pool.close(grace=1.0)
    assert capfd.readouterr().err == "flashrecovery: waiting for 1 workers to end by SIGTERM, for 1 s at most\n"
    assert pool.living == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_for_all_processes_of_a_job_ends_workers_only(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    pool = Workers(str(script), tmp_path / "logs", dict(os.environ), preload=True)
    try:
        pool.wait_for_server(30.0)
        worker = pool.start("w.log")
        pid = wait_for_pid(pool, worker)
        (server,) = (process.pid for process in psutil.Process().children() if pid in _children(process))
        os.kill(server, number)
        os.kill(pid, signal.SIGTERM)
        assert wait_for_end(pool).cause == "killed by SIGTERM"
        assert wait_for_pid(pool, pool.start("another.log")) in _children(psutil.Process(server))
    finally:
        pool.close(grace=2.0)


def _children(process: psutil.Process) -> list[int]:
    return [child.pid for child in process.children()]


def test_a_fork_server_that_has_just_ended_costs_no_start(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    pool = Workers(str(script), tmp_path / "logs", {**os.environ, "OMP_NUM_THREADS": "1"}, preload=True)
    pool.wait_for_server(30.0)
    server = psutil.Process(wait_for_pid(pool, pool.start("w.log"))).ppid()
    os.kill(server, signal.SIGKILL)
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
    assert pool.start("cold.log").process is not None
    assert "fork server" in wait_for_end(pool).cause
    pool.close(grace=0.0)


@pytest.mark.parametrize(("free", "is_named"), [(0, True), (7, False)])
def test_a_full_disk_under_the_logs_is_named_with_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, is_named: bool
) -> None:
    worker: Any = SimpleNamespace(log=tmp_path / "rank3.log", log_begins=0)
    worker.log.touch()
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=free))
    full = f" (no space is left in {tmp_path}: make room there)" if is_named else ""
    assert WorkerEnded(worker, 1 << 8).cause == f"exit code 1{full}, its last words: (nothing)"


@pytest.mark.parametrize(
    ("before", "said", "code", "words"),
    [
        pytest.param("", "no such file\n\n", 1, "no such file", id="its-last-line"),
        pytest.param("", "step 9\nflashrecovery: goes on from step 7, in step 9\n", 1, "(nothing)", id="only-ours"),
        pytest.param("of a predecessor\n", "", 1, "(nothing)", id="only-its-predecessor"),
        pytest.param("", "flashrecovery: no such flag\n", 2, "flashrecovery: no such flag", id="refused"),
    ],
)
def test_the_last_words_are_those_of_the_worker_itself(
    tmp_path: Path, before: str, said: str, code: int, words: str
) -> None:
    worker: Any = SimpleNamespace(log=tmp_path / "rank3.log", log_begins=len(before))
    worker.log.write_text(before + said)
    assert WorkerEnded(worker, code << 8).cause == f"exit code {code}, its last words: {words}"


@pytest.mark.parametrize("bad", [False, True])
def test_workers_start_cold_where_a_fork_could_not_use_cuda(tmp_path: Path, bad: bool) -> None:
    """What torch says in a child of a process that has initialised CUDA, which ``torch.cuda.is_available`` does."""
    script = tmp_path / "script.py"
    script.write_text(f"import torch\ntorch.cuda._is_in_bad_fork = lambda: {bad}\n" + GUARDED)
    pool = Workers(str(script), tmp_path / "logs", dict(os.environ), preload=True)
    pool.wait_for_server(60.0)
    assert ("initialised CUDA" in pool.cold_because) == bad
    pool.close(grace=1.0)


@pytest.mark.gpu
def test_a_script_that_looks_for_a_gpu_can_be_forked(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import torch\nassert torch.cuda.is_available()\n" + GUARDED)
    pool = Workers(str(script), tmp_path / "logs", dict(os.environ), preload=True)
    pool.wait_for_server(60.0)
    assert pool.cold_because == ""
    pool.close(grace=1.0)


def test_a_script_that_cannot_be_imported_is_refused_with_its_error(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import no_such_module\n" + GUARDED)
    pool = Workers(str(script), tmp_path / "logs", dict(os.environ), preload=True)
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        pool.wait_for_server(30.0)
    pool.close(grace=1.0)
