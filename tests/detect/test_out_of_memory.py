"""The kernel's count of processes that it killed for want of memory."""

import pytest

from megatron_flashrecovery.detect.out_of_memory import OutOfMemory, why_no_limit


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


LIMITS = {
    "v2": ("0::/job/step\n", "job/step", "memory.max", "memory.current"),
    "v1": ("4:memory:/job/step\n", "memory/job/step", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@pytest.mark.parametrize("version", LIMITS)
@pytest.mark.parametrize(
    ("limit", "says"),
    [(2 << 30, None), (7 << 30, "the machine would be full"), (9223372036854771712, "there is no memory limit")],
)
def test_memory_may_be_taken_only_where_a_limit_comes_before_the_end_of_the_machine(tmp_path, version, limit, says):
    text, group, limit_name, usage_name = LIMITS[version]
    (tmp_path / "own").write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 6291456 kB\n")
    path = tmp_path / "root" / group
    path.mkdir(parents=True)
    (path.parent / limit_name).write_text(f"{limit}\n")
    (path.parent / usage_name).write_text("1000\n")
    (path / limit_name).write_text("max\n" if version == "v2" else "9223372036854771712\n")
    (path / usage_name).write_text("1000\n")
    why = why_no_limit(tmp_path / "root", tmp_path / "own", tmp_path / "meminfo")
    assert why is None if says is None else says in why
