"""The process that diagnoses a running job, seen from the one that must not wait for it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.core.messages import Blamed, Diagnosed
from megatron_flashrecovery.core.occasions import EVERY, SETTLED_AFTER
from megatron_flashrecovery.runtime.diagnostician import Diagnostician
from tests.core.jobs import A, draining_job, lost, training_job

ANSWER = {
    "blamed": [{"element": "host n1", "p": 0.002, "evidence": "it is slow", "nodes": ["node1"], "ranks": [3]}],
    "undetermined": None,
    "lines": [],
}
BEGIN = 100.0 + SETTLED_AFTER


@contextmanager
def diagnostician(script: str, deadline: float = 60.0) -> Iterator[Diagnostician]:
    command = (sys.executable, "-c", script)
    it = Diagnostician(Path("logs"), Path("site.json"), os.environ, command, deadline)
    job = training_job()
    it.look(job, 0.0)
    job.own_times.slow = {3: "it is"}
    assert it.look(job, 100.0) is None
    assert it.look(job, BEGIN) is None
    try:
        yield it
    finally:
        it.close()


def heard(it: Diagnostician, now: float = BEGIN + 1) -> Diagnosed:
    assert it._process is not None
    it._process.wait()
    diagnosed = it.look(training_job(), now)
    assert diagnosed is not None
    return diagnosed


def test_what_it_says_is_told_to_the_job():
    with diagnostician(f"print({json.dumps(ANSWER)!r})") as it:
        assert heard(it) == Diagnosed(
            "rank 3 is slow", (Blamed("host n1", 0.002, "it is slow", (NodeId("node1"),), (3,)),), ""
        )


def test_undetermined_is_an_answer_too():
    answer = {"blamed": [], "undetermined": "nothing stands out", "lines": []}
    with diagnostician(f"print({json.dumps(answer)!r}); raise SystemExit(1)") as it:
        assert heard(it).undetermined == "nothing stands out"


def test_its_failure_is_told_and_ends_nothing_else():
    with diagnostician("raise SystemExit('flashrecovery: no such file')") as it:
        assert heard(it).undetermined == "the diagnosis failed: flashrecovery: no such file"


def test_a_warning_beside_its_answer_does_not_spoil_it():
    with diagnostician(f"import sys; print('a warning', file=sys.stderr); print({json.dumps(ANSWER)!r})") as it:
        assert heard(it).blamed


def test_who_ended_it_is_told_where_it_could_not_say():
    with diagnostician("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") as it:
        assert heard(it).undetermined == "the diagnosis failed: it was ended by signal 9"
    with diagnostician("import os, signal; os.kill(os.getpid(), signal.SIGALRM)") as it:
        assert heard(it).undetermined == "the diagnosis failed: it took longer than 60 s"


def test_one_that_cannot_be_started_is_told_and_ends_nothing_else():
    it = Diagnostician(Path("logs"), None, {}, ("/nowhere/python",))
    job = training_job()
    it.look(job, 0.0)
    job.own_times.slow = {3: "it is"}
    it.look(job, 100.0)
    diagnosed = it.look(job, BEGIN)
    assert diagnosed is not None
    assert diagnosed.undetermined.startswith("the diagnosis failed: it could not be started: ")
    assert it.look(job, BEGIN + 1) is None
    it.close()


def test_one_that_does_not_even_die_is_waited_for_by_nobody_and_has_no_other_beside_it():
    with diagnostician("import time; time.sleep(60)", deadline=5.0) as it:
        process = it._process
        assert process is not None
        kill, process.kill = process.kill, lambda: None  # in an uninterruptible wait it makes no difference
        assert it.look(training_job(), BEGIN + 5.0) is not None
        for life in (1, 2, 3):
            it.hear(lost(A, 1, life=life), BEGIN + 20.0 * life)
        assert it.look(training_job(), BEGIN + 6.0 + EVERY) is None
        assert it._process is None
        kill()
        process.wait()
        assert it.look(training_job(), BEGIN + 7.0 + EVERY) is None
        assert it._process is not None


def test_it_runs_at_the_lowest_priority_on_the_records_with_a_deadline_of_its_own():
    with diagnostician("import sys; sys.stdin.read(); print(sys.argv)") as it:
        assert it._process is not None
        assert it._process.args[3:] == ("logs", "--json", "--deadline", "60", "--topology", "site.json")
    with diagnostician("import time; time.sleep(60)") as it:
        assert it._process is not None
        assert os.getpriority(os.PRIO_PROCESS, it._process.pid) == 19
        assert Path(f"/proc/{it._process.pid}/oom_score_adj").read_text() == "1000\n"


def test_one_that_takes_too_long_is_ended_and_nobody_has_waited():
    with diagnostician("import time; time.sleep(60)", deadline=5.0) as it:
        process = it._process
        assert it.look(training_job(), BEGIN + 4.9) is None
        diagnosed = it.look(training_job(), BEGIN + 5.0)
        assert diagnosed is not None
        assert diagnosed.undetermined == "the diagnosis failed: it took longer than 5 s"
        assert process is not None
        assert process.returncode is not None


def test_there_is_one_at_a_time_and_not_again_at_once():
    with diagnostician(f"print({json.dumps(ANSWER)!r})") as it:
        heard(it)
        job = training_job()
        for life in (1, 2, 3):
            it.hear(lost(A, 1, life=life), BEGIN + 20 * life)
        assert it.look(job, BEGIN + EVERY) is None
        assert it._process is None
        assert it.look(job, BEGIN + 1 + EVERY) is None
        assert it._process is not None
        assert it._occasion == "3 incidents so far"


def test_while_ranks_stop_none_begins():
    it = Diagnostician(Path("logs"), None, {}, (sys.executable, "-c", ""))
    it.look(training_job(), 0.0)
    for life in (1, 2, 3):
        it.hear(lost(A, 1, life=life), 20.0 * life)
    assert it.look(draining_job(1), 100.0) is None
    assert it._process is None
