"""A journal rebuilds the controller's state, or says where it does not."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.cli import main
from megatron_flashrecovery.core.coordinator import handle
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step, WorkerId
from megatron_flashrecovery.core.job import Job, JobConfig
from megatron_flashrecovery.core.messages import (
    ClockTicked,
    ExecutePlan,
    Loss,
    Park,
    PlanExecuted,
    RanksReady,
    RanksStood,
    SeatsDescribed,
    WorkersLost,
)
from megatron_flashrecovery.core.phases import Training
from megatron_flashrecovery.core.reports import GroupCount, Report, Standing, Update
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime.journal import JobStarted, Journal, read_journal
from megatron_flashrecovery.runtime.replay import replay

NODE, GROUP = NodeId("n0"), GroupKey("dp")
A, B = Rank(0), Rank(1)


class Recorded:
    """A job whose every event is recorded as the controller does it."""

    def __init__(self, directory):
        start = JobStarted(JobConfig(), {NODE: (A, B)})
        self.job = Job(start.config, Seats(start.seats))
        self.now = 100.0
        self.path = directory / "journal.jsonl"
        self._journal = Journal(self.path)
        self._journal.started(start, time=1000.0, now=self.now)

    def tell(self, event):
        self.now += 0.1
        commands = handle(self.job, event, self.now)
        self._journal.handled(event, commands, self.job, time=self.now + 900, now=self.now)
        return commands


@pytest.fixture
def recovered(tmp_path):
    """Rank 1 of two is lost in training, and replaced."""
    record = Recorded(tmp_path)
    record.tell(SeatsDescribed(NODE, Epoch(0), True, {A: B, B: A}, {A: (A, B), B: (A, B)}, {GROUP: (A, B)}))
    record.tell(RanksReady(NODE, Epoch(0), (A, B)))
    record.tell(ClockTicked())
    orders = record.tell(WorkersLost(NODE, (Loss(B, WorkerId("w1"), "killed by SIGKILL"),), {B: (Step(4), Step(5))}))
    (park,) = (order for order in orders if isinstance(order, Park))
    report = Report(
        A,
        Standing.CAUGHT,
        Step(5),
        Update.BEFORE,
        counts={GROUP: GroupCount(broken="a member is lost")},
        own=(Step(4), Step(5)),
        guests={B: (Step(4), Step(5))},
    )
    record.tell(RanksStood(NODE, park.epoch, park.number, (report,)))
    orders = record.tell(RanksReady(NODE, park.epoch, (B,)))
    if not any(isinstance(order, ExecutePlan) for order in orders):
        joined = Report(B, Standing.PARKED, Step(0), Update.BEFORE)
        record.tell(RanksStood(NODE, park.epoch, park.number, (joined,)))
    record.tell(PlanExecuted(NODE, park.epoch, (A, B)))
    return record


def test_the_same_orders_follow_and_the_same_state_is_reached(recovered):
    found = replay(read_journal(recovered.path))
    assert found.difference is None
    assert isinstance(found.job.phase, Training)
    assert found.job.recoveries == recovered.job.recoveries
    assert (found.job.epoch, found.job.number) == (recovered.job.epoch, OrderNumber(recovered.job.number))


def test_an_order_that_does_not_follow_is_told(recovered):
    text = recovered.path.read_text()
    recovered.path.write_text(text.replace('"resume_step":5', '"resume_step":4'))
    found = replay(read_journal(recovered.path))
    assert "resume_step=Step(4)" in (found.difference or "") or "resume_step=4" in (found.difference or "")


@pytest.mark.parametrize("lines", range(1, 9))
def test_a_crash_at_any_line_leaves_a_journal_that_replays(recovered, lines):
    whole = recovered.path.read_bytes().splitlines(keepends=True)
    recovered.path.write_bytes(b"".join(whole[:lines]) + whole[lines][:7])
    assert replay(read_journal(recovered.path)).difference is None


def test_the_command_tells_the_story_and_the_state(recovered, capsys):
    assert main(["replay", str(recovered.path.parent)], {}) == 0
    said = capsys.readouterr().out
    assert "rank 1, killed by SIGKILL" in said
    assert "training in epoch 1; 2 ranks; recoveries: 1" in said
    assert "the same orders follow" in said


def test_the_command_fails_on_a_journal_that_does_not_replay(recovered, capsys):
    recovered.path.write_text(recovered.path.read_text().replace('"resume_step":5', '"resume_step":4'))
    assert main(["replay", "--quiet", str(recovered.path.parent)], {}) == 1
    assert "goes another way" in capsys.readouterr().out


def test_a_directory_without_a_journal_is_bad_input(tmp_path, capsys):
    assert main(["replay", str(tmp_path)], {}) == 2
    assert "does not exist" in capsys.readouterr().err
