"""The field's public injector against a running job: each of its faults that a CPU can have, in its own way.

It needs ``nvidia-resiliency-ext`` (0.4.1), on which nothing here depends: ``pip install --no-deps --target DIR``, with
DIR in ``PYTHONPATH``, will do. The latency is from its own callback, right before the fault, to the new epoch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes.launcher import ROOT, Job, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not installed"),
]
SCRIPT = ROOT / "tests" / "processes" / "train_nvrx.py"
STEPS = ("--steps", "200")
ENDS = {
    "SIGKILL": "killed by SIGKILL",
    "SIGTERM": "killed by SIGTERM",
    "SIGINT": "exit code 1",
    "SEGFAULT": "killed by SIGSEGV",
    "OS_ABORT": "killed by SIGABRT",
    "WORKLOAD_EXC": "exit code 1",
    "ASYNC_EXC": "exit code 1",
    "SIGNAL_EXC": "exit code 1",
}
HANGS = {"LOCK_GIL": "none of its threads has run", "SIGSTOP": "none of its threads has run"}
BEYOND_THE_LIMIT = 5.0


@pytest.mark.parametrize("fault", [*ENDS, *HANGS])
def test_a_job_survives_what_others_inflict(tmp_path: Path, undisturbed, fault: str, record_property) -> None:
    struck = tmp_path / "struck"
    environment = {
        "NVRX_FAULT": fault,
        "NVRX_STRUCK": str(struck),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    outcome = run(Job(SCRIPT, arguments=STEPS, environment=environment), tmp_path / "run", timeout=200.0)
    assert outcome.exit_code == 0, outcome.said
    calm = undisturbed(Job(arguments=STEPS))
    assert (outcome.results(), outcome.state) == (calm.results(), calm.state)
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == (2,)
    assert (ENDS | HANGS)[fault] in recovery.cause
    latency = outcome.journal("Park")[0].time - float(struck.read_text())
    record_property("latency", latency)
    print(f"{fault}: seen after {latency:.3f} s: {recovery.cause[:150]}")
    assert latency < (5.0 + BEYOND_THE_LIMIT if fault in HANGS else 2.0)
