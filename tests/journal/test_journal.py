"""What is written to a journal is what is read back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_flashrecovery.commands.timeline import describe
from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, WorkerId
from megatron_flashrecovery.core.job import Job, JobConfig
from megatron_flashrecovery.core.messages import ClockTicked, Command, Event, Loss, Stop, WorkersLost
from megatron_flashrecovery.core.seats import Seats
from megatron_flashrecovery.runtime.journal import Journal, decode_message, read_journal

# Messages hold dictionaries; hypothesis would try every kind of mapping there is.
st.register_type_strategy(Mapping, lambda kind: st.dictionaries(*map(st.from_type, get_args(kind)), max_size=3))
# JSON has no others, and seconds are finite.
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))

LOST = WorkersLost(NodeId("n0"), (Loss(Rank(1), WorkerId("w1"), "killed by SIGKILL"),))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def written(path, *messages):
    journal = Journal(path)
    for message in messages:
        journal.write("event", message, time=1.5, epoch=Epoch(2), now=0.5)
    journal.close()
    return list(read_journal(path))


def one_job():
    return Job(JobConfig(), Seats({NodeId("n0"): (Rank(0), Rank(1))}))


def test_a_full_disk_costs_one_line_and_nothing_of_the_others(path, monkeypatch):
    journal = Journal(path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, text: write(fd, text[:40]))
    with pytest.raises(OSError, match="No space left"):
        journal.write("event", LOST, time=1.0, epoch=Epoch(0), now=0.5)
    monkeypatch.setattr(os, "write", write)
    for time in (2.0, 3.0):
        journal.write("event", LOST, time=time, epoch=Epoch(0), now=0.5)
    journal.close()
    assert [line.time for line in read_journal(path)] == [2.0, 3.0]


@pytest.mark.parametrize("kind", [*get_args(Event), *get_args(Command)], ids=lambda kind: kind.__name__)
def test_every_event_and_command_is_read_back_as_it_was(kind, path):
    @given(st.from_type(kind))
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    def round_trip(message):
        path.unlink(missing_ok=True)
        (line,) = written(path, message)
        assert decode_message(line) == message

    round_trip()


def test_no_message_has_a_field_that_the_journal_needs_for_itself():
    used = {field for kind in (*get_args(Event), *get_args(Command)) for field in kind.__dataclass_fields__}
    assert not used & {"kind", "name", "now", "time"}


def test_a_line_tells_when_and_in_which_epoch(path):
    (line,) = written(path, LOST)
    assert (line.time, line.now, line.epoch, line.kind, line.name) == (1.5, 0.5, 2, "event", "WorkersLost")


def test_a_torn_last_line_is_left_out_and_appending_goes_on_with_a_line_of_its_own(path):
    written(path, LOST, LOST)
    path.write_bytes(path.read_bytes()[:-10])
    assert len(list(read_journal(path))) == 1


@pytest.mark.parametrize("damage", [b"{}\n", b"[1]\n", b"nonsense\n"])
def test_damage_before_the_end_is_named_by_its_line(damage, path):
    written(path, LOST)
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(RecordDamaged, match="line 2"):
        list(read_journal(path))


def test_a_message_that_this_version_does_not_know_is_named(path):
    written(path, LOST)
    path.write_text(path.read_text().replace("WorkersLost", "WorkersGone"))
    with pytest.raises(RecordDamaged, match="WorkersGone"):
        decode_message(next(read_journal(path)))


def test_a_message_with_a_field_of_the_wrong_type_is_refused(path):
    written(path, LOST)
    path.write_text(path.read_text().replace('"rank":1', '"rank":"one"'))
    with pytest.raises(RecordDamaged, match="malformed"):
        decode_message(next(read_journal(path)))


def test_a_tick_leaves_a_line_only_if_it_changed_something(path):
    journal, job = Journal(path), one_job()
    for commands in ([], [], [Stop("no room")]):
        journal.handled(ClockTicked(), commands, job, time=1.0, now=1.0)
    job.begin_anew()
    job.phase = type(job.phase)(deadline=9.0)
    journal.handled(ClockTicked(), [], job, time=2.0, now=2.0)
    journal.close()
    assert [(line.name, line.time) for line in read_journal(path)] == [
        ("ClockTicked", 1.0),
        ("Stop", 1.0),
        ("ClockTicked", 2.0),
    ]


@pytest.mark.parametrize("kind", [*get_args(Event), *get_args(Command)], ids=lambda kind: kind.__name__)
def test_every_event_and_command_can_be_told_in_one_line(kind, path):
    @given(st.from_type(kind))
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    def told(message):
        path.unlink(missing_ok=True)
        (line,) = written(path, message)
        assert describe(line).startswith(kind.__name__)

    told()
