"""Records for other programs: exact, complete at every moment, and a step once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource

import pytest

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.messages import Blamed
from megatron_flashrecovery.core.numbers import BadStep
from megatron_flashrecovery.runtime.journal import append_whole
from megatron_flashrecovery.runtime.summary import (
    EpochRecord,
    GroupTally,
    MoveRecord,
    PhaseSeconds,
    RecoveryRecord,
    StepLine,
    StepLog,
    Summary,
    read_steps,
    read_summary,
    replace_file,
    write_summary,
)

SECONDS = PhaseSeconds(0.01, 0.02, 0.5, 0.1, 0.2, 0.4, 1.23)
RECOVERY = RecoveryRecord(
    Epoch(1), "killed by SIGKILL", (Rank(5),), Step(5), 1, SECONDS, GroupTally(6, 10), {Rank(5): "mirror of rank 7"}
)
BAD = BadStep(Step(7), "the norm is nan", 1, "did not come again", "the gradient of rank 5", Rank(5))
BLAMED = Blamed("host n1", 0.002, "its ranks are slow", (NodeId("node1"),))
SUMMARY = Summary(
    world_size=8,
    steps=12,
    state_sha256={Rank(0): "ab"},
    recoveries=(RECOVERY,),
    bad_numbers=(BAD,),
    blamed=(BLAMED,),
    outcome="stopped",
    reason="no room",
    epochs=(EpochRecord(Epoch(1), 17.5, "rank 5: killed by SIGKILL", is_restart=False),),
    moves=(MoveRecord(Epoch(2), (Rank(4), Rank(5)), NodeId("node1"), NodeId("node2")),),
)


def line(step, loss=2.5, epoch=0):
    return StepLine.of(Step(step), loss, 0.1, Epoch(epoch), 0.4)


def test_a_summary_has_the_fields_that_others_script_against(tmp_path):
    write_summary(tmp_path, SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "world_size": 8,
        "steps": 12,
        "state_sha256": {"0": "ab"},
        "recoveries": [
            {
                "epoch": 1,
                "cause": "killed by SIGKILL",
                "lost_ranks": [5],
                "resume_step": 5,
                "steps_recomputed": 1,
                "seconds": {
                    "detect": 0.01,
                    "park": 0.02,
                    "replace": 0.5,
                    "rebuild": 0.1,
                    "restore": 0.2,
                    "first_step": 0.4,
                    "total": 1.23,
                },
                "groups": {"rebuilt": 6, "kept": 10},
                "source": {"5": "mirror of rank 7"},
            }
        ],
        # New with the search for bad numbers: which step, what, how often, and how it ended.
        "bad_numbers": [
            {
                "step": 7,
                "what": "the norm is nan",
                "times": 1,
                "outcome": "did not come again",
                "origin": "the gradient of rank 5",
                "suspect": 5,
            }
        ],
        # New with diagnoses: whom they have named while the job went on.
        "blamed": [
            {"element": "host n1", "p": 0.002, "evidence": "its ranks are slow", "nodes": ["node1"], "ranks": []}
        ],
        # New with failed runs that say so: how it ended, why, and every epoch, also one that never went on.
        "outcome": "stopped",
        "reason": "no room",
        "moves": [{"epoch": 2, "ranks": [4, 5], "origin": "node1", "target": "node2"}],
        "epochs": [{"epoch": 1, "began": 17.5, "cause": "rank 5: killed by SIGKILL", "is_restart": False}],
    }
    assert read_summary(tmp_path) == SUMMARY


def test_a_summary_of_an_older_version_can_be_read(tmp_path):
    older = {"world_size": 2, "steps": 3, "state_sha256": {}, "recoveries": []}
    (tmp_path / "summary.json").write_text(json.dumps(older))
    assert read_summary(tmp_path) == Summary(world_size=2, steps=3, state_sha256={}, outcome="unknown")


def test_a_step_has_the_fields_that_others_script_against(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    log.record(line(1))
    assert json.loads((tmp_path / "steps.jsonl").read_text()) == {
        "step": 1,
        "loss": 2.5,
        "loss_hex": "0x1.4000000000000p+1",
        "grad_norm_hex": "0x1.999999999999ap-4",
        "epoch": 0,
        "seconds": 0.4,
    }


def test_a_step_is_recorded_once_however_often_it_was_computed(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    for step, epoch in [(1, 0), (2, 0), (2, 1), (3, 1)]:
        assert log.compare(line(step, epoch=epoch)) is None
        log.record(line(step, epoch=epoch))
    assert [(found.step, found.epoch) for found in read_steps(tmp_path)] == [(1, 0), (2, 0), (3, 1)]
    assert log.steps == 3


def test_a_step_that_comes_out_differently_is_told_and_the_newer_result_stays(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    log.record(line(1))
    log.record(line(2))
    said = log.compare(line(2, loss=2.75, epoch=1))
    log.record(line(2, loss=2.75, epoch=1))
    assert "step 2 came out differently" in (said or "")
    log.record(line(3))
    assert [found.loss for found in read_steps(tmp_path)] == [2.5, 2.75, 2.5]


@pytest.mark.parametrize(("loss", "text"), [(None, None), (float("nan"), "nan"), (float("-inf"), "-inf")])
def test_a_loss_that_json_has_no_number_for_is_told_by_its_hex_form(loss, text, tmp_path):
    StepLog(tmp_path / "steps.jsonl").record(line(1, loss=loss))
    (found,) = read_steps(tmp_path)
    assert (found.loss, found.loss_hex) == (None, text)


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    replace_file(path, b"new")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "new"}


@contextlib.contextmanager
def small_files():
    """No file of this process grows beyond 64 bytes: what is written there is cut off, as by a full disk.

    Not a fixture: pytest prints a test's outcome before its fixtures end, and its own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with small_files(), pytest.raises(OSError, match="too large"):
        replace_file(path, b"new" * 100)
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "old"}


def test_a_line_that_does_not_fit_leaves_none_of_it(tmp_path):
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with small_files():
        append_whole(fd, b"a line that fits\n")
        with pytest.raises(OSError, match="No space"):
            append_whole(fd, b"x" * 100 + b"\n")
        append_whole(fd, b"another\n")
    os.close(fd)
    assert (tmp_path / "file").read_text() == "a line that fits\nanother\n"


def test_steps_can_still_be_recorded_behind_a_rewrite_that_did_not_fit(tmp_path, monkeypatch):
    log = StepLog(tmp_path / "steps.jsonl")
    log.record(line(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.raises(OSError, match="No space"):
            log.record(line(1, loss=2.75))
    log.record(line(2))
    assert [found.step for found in read_steps(tmp_path)] == [1, 2]


def _no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
