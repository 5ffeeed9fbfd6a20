"""The kernel's log, on the real one where root may write to it."""

import os

import pytest

from megatron_flashrecovery.detect.kernel_log import KMSG, KernelLog


def test_only_what_is_new_is_read_and_nothing_is_waited_for():
    try:
        writer = os.open(KMSG, os.O_WRONLY)
    except OSError as error:
        pytest.skip(f"{KMSG} cannot be written: {error.strerror}")
    os.write(writer, b"flashrecovery test: before\n")
    log = KernelLog()
    assert log.why_not == ""
    os.write(writer, b"flashrecovery test: NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n")
    os.close(writer)
    mine = [line for line in log.lines() if "flashrecovery test" in line]
    assert mine == ["flashrecovery test: NVRM: Xid (PCI:0000:3b:00): 79, pid=1"]
    assert not any("flashrecovery test" in line for line in log.lines())
    log.close()
    assert log.lines() == []


def test_where_there_is_none_it_is_silent_and_says_why(tmp_path):
    log = KernelLog(tmp_path / "none")
    assert log.lines() == []
    assert "cannot be read" in log.why_not
