"""Kill whoever, whenever: also those who are joining, and in the middle of somebody else's recovery."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes.conftest import Undisturbed
from tests.processes.launcher import Job, Outcome, Running, started

LAST_STEPS = 50
"""Nobody is killed in these: a rank that is lost after its last step stops the job, as it should."""


def kill_at_random(running: Running, rng: random.Random, seconds: float, until: int) -> int:
    """SIGKILL to random ranks, at moments that are sometimes close together. Returns how many were hit.

    For ``seconds``, or until step ``until`` is done. A seat that is lost more than three times before a recovery goes
    on from a newer step makes the job fall back: so none is hit more than twice, for one hit may cross that moment.
    """
    killed, deadline = 0, time.monotonic() + seconds
    hits: Counter[int] = Counter()
    resumed = -1
    while time.monotonic() < deadline and running.process.poll() is None:
        time.sleep(rng.choice((0.02, 0.1, 0.3, 1.0)) * rng.random())
        if (newest := running.resumed_at()) > resumed:
            resumed = newest
            hits.clear()
        pids = {rank: pid for rank, pid in running.pids().items() if hits[rank] < 2}
        if not pids:
            continue
        rank = rng.choice(sorted(pids))
        with suppress(ProcessLookupError):
            # Whoever is stopped holds all others back: the job cannot come to its end between the look and the kill.
            os.kill(pids[rank], signal.SIGSTOP)
            if running.steps_done() >= until:
                os.kill(pids[rank], signal.SIGCONT)
                break
            os.kill(pids[rank], signal.SIGKILL)
            killed, hits[rank] = killed + 1, hits[rank] + 1
    return killed


@pytest.mark.parametrize(
    ("seed", "seconds"), [pytest.param(1, 8.0, id="8s"), pytest.param(2, 300.0, id="5min", marks=pytest.mark.slow)]
)
def test_random_kills_change_no_bit(tmp_path: Path, undisturbed: Undisturbed, seed: int, seconds: float) -> None:
    steps = int(seconds * 40)
    job = Job(arguments=("--steps", str(steps)))
    with started(job, tmp_path / "run") as running:
        running.wait_for(lambda: running.steps_done() > 3, "some steps")
        killed = kill_at_random(running, random.Random(seed), seconds, steps - LAST_STEPS)
        said, _ = running.process.communicate(timeout=seconds * 4 + 60)
    outcome = Outcome(tmp_path / "run", running.process.returncode, said)
    assert outcome.exit_code == 0, f"seed {seed}: {said[-2000:]}"
    assert killed > 3
    assert outcome.results() == undisturbed(job).results()
    assert outcome.state == undisturbed(job).state
