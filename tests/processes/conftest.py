"""Undisturbed runs are made once and compared with many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import pytest

from megatron_flashrecovery.runtime.injection import Injection
from megatron_flashrecovery.runtime.summary import RecoveryRecord
from tests.processes.launcher import Job, Outcome, run

Undisturbed = Callable[[Job], Outcome]


class Equal(Protocol):
    def __call__(self, job: Job, outcome: Outcome, also_lost: tuple[int, ...] = ()) -> None: ...


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same job without any fault."""
    made: dict[tuple[object, ...], Outcome] = {}

    def of(job: Job) -> Outcome:
        key = (job.script, job.ranks, job.arguments)
        if key not in made:
            calm = replace(job, injections=(), flags=())
            made[key] = run(calm, tmp_path_factory.mktemp("undisturbed") / "run", timeout=600.0)
            assert made[key].exit_code == 0, made[key].said
        return made[key]

    return of


@pytest.fixture(scope="session")
def assert_equal(undisturbed: Undisturbed) -> Equal:
    """Bit for bit what the run without the fault gives, and nobody lost who was not killed."""

    def check(job: Job, outcome: Outcome, also_lost: tuple[int, ...] = ()) -> None:
        assert outcome.exit_code == 0, outcome.said
        calm = undisturbed(job)
        assert outcome.results() == calm.results()
        assert outcome.state == calm.state
        # Equal bits alone prove little: ranks that die of a bug of ours are replaced, too.
        lost = sorted(rank for recovery in outcome.recoveries for rank in recovery.lost_ranks)
        assert lost == sorted([*(_rank(spec) for spec in job.injections), *also_lost])

    return check


def assert_only_what_is_broken_is_rebuilt(outcome: Outcome, recovery: RecoveryRecord, at: str) -> None:
    """The groups of the lost rank; and others only if it was lost in the middle of a step, each with a reason."""
    (lost,) = recovery.lost_ranks
    rebuilt, of_lost = outcome.rebuilt(recovery.epoch), outcome.groups_of(lost)
    assert of_lost
    assert of_lost <= rebuilt.keys()
    others = {key: why for key, why in rebuilt.items() if key not in of_lost}
    if at == "between":
        assert not others
    assert all(why and "was lost" not in why for why in others.values()), others
    assert recovery.groups.rebuilt == len(rebuilt)
    assert recovery.groups.rebuilt + recovery.groups.kept == len(outcome.groups())


def _rank(spec: str) -> int:
    return Injection.parse(spec).rank
