"""A loop that does something together between its steps: what a loss cuts short there is done again by everybody."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.processes.conftest import Undisturbed
from tests.processes.launcher import Job, Outcome, run

_TOTAL = re.compile(r"rank (\d+) total after step (\d+): (\S+)")


def totals(outcome: Outcome) -> dict[tuple[int, int], str]:
    """By rank and step; what was found more than once must have been the same."""
    found: dict[tuple[int, int], str] = {}
    for log in sorted((outcome.log_dir / "logs").glob("rank*.log")):
        for rank, step, total in _TOTAL.findall(log.read_text()):
            assert found.setdefault((int(rank), int(step)), total) == total
    return found


@pytest.mark.parametrize("call", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("rank", "step", "flags"),
    [(1, 4, ()), (0, 1, ("--replicated",)), (3, 10, ()), (2, 9, ("--replicated",))],
    ids=["in-the-middle", "behind-the-first", "behind-the-last", "replicated"],
)
def test_a_kill_between_two_steps_repeats_what_follows_the_first(
    tmp_path: Path, undisturbed: Undisturbed, rank: int, step: int, call: int, flags: tuple[str, ...]
) -> None:
    calm = undisturbed(Job(arguments=("--report", *flags)))
    dies = {"TOY_DIES": f"{rank}:{step}:{call}"}
    outcome = run(Job(arguments=("--report", *flags), environment=dies), tmp_path / "run")
    assert outcome.exit_code == 0, outcome.said
    assert outcome.results() == calm.results()
    assert outcome.state == calm.state
    assert totals(outcome) == totals(calm)
    (recovery,) = outcome.recoveries
    assert recovery.lost_ranks == (rank,)


def test_kills_in_steps_change_nothing_of_what_is_done_between_them(tmp_path: Path, undisturbed: Undisturbed) -> None:
    job = Job(
        arguments=("--report",),
        injections=("kill:rank=1,step=4,at=backward", "kill:rank=3,step=6,at=between", "kill:rank=0,step=7,at=mirror"),
    )
    outcome, calm = run(job, tmp_path / "run"), undisturbed(job)
    assert outcome.exit_code == 0, outcome.said
    assert outcome.results() == calm.results()
    assert totals(outcome) == totals(calm)
    assert [recovery.lost_ranks for recovery in outcome.recoveries] == [(1,), (3,), (0,)]
