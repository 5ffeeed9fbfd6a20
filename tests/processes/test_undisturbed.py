"""Nothing fails, and the bits are those of plain torchrun without this package's launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.launched import RECOVERY, torchrun
from bench.undisturbed import Difference, difference_of
from tests.processes.conftest import Undisturbed
from tests.processes.launcher import GPT, Job

pytestmark = pytest.mark.slow  # until its time is known on a quiet machine
STEPS = 9


def test_an_undisturbed_run_with_recovery_equals_plain_torchrun(tmp_path: Path, undisturbed: Undisturbed) -> None:
    arguments = ("--train-iters", str(STEPS))
    with_recovery = undisturbed(Job(GPT, ranks=8, arguments=(RECOVERY, *arguments)))
    with torchrun(arguments, tmp_path) as plain:
        plain.must_end(120.0)
    difference = difference_of(with_recovery.log_dir, tmp_path, STEPS)
    assert difference == Difference(0, 0, f"equal bit for bit: {STEPS} steps, the final state of 8 ranks")
