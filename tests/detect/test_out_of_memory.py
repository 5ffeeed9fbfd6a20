"""The kernel's count of processes that it killed for want of memory."""

from megatron_flashrecovery.detect.out_of_memory import OutOfMemory


def test_a_count_that_grows_is_told_once(tmp_path):
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 1\noom_kill 2\n")
    killer = OutOfMemory(events)
    assert not killer.has_struck()
    events.write_text("low 0\noom 2\noom_kill 3\n")
    assert killer.has_struck()
    assert not killer.has_struck()


def test_the_file_of_the_first_version_of_control_groups_is_read_too(tmp_path):
    events = tmp_path / "memory.oom_control"
    events.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    killer = OutOfMemory(events)
    events.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert killer.has_struck()


def test_without_a_count_nothing_is_claimed(tmp_path):
    assert not OutOfMemory(tmp_path / "missing").has_struck()
    assert not OutOfMemory().has_struck()
