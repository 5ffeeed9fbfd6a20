"""Stacks of processes that cannot be asked for them in any other way."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_flashrecovery.detect import stacks

PRELUDE = """
import ctypes, sys
from megatron_flashrecovery.detect import stacks
stacks.write_on_death(int(sys.argv[1]))
"""
HANG = {
    "a loop": "print('there', flush=True)\nwhile True: pass",
    "the interpreter's lock": "print('there', flush=True)\nwhile True: ctypes.PyDLL(None).sleep(60)",
}


@pytest.fixture
def words():
    descriptor = stacks.make_file()
    yield descriptor
    os.close(descriptor)


def start(program: str, descriptor: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"{PRELUDE}\n{program}", str(descriptor)]
    return subprocess.Popen(command, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("what", HANG)
def test_a_process_that_hangs_says_where(words, what):
    process = start(HANG[what], words)
    try:
        assert process.stdout.readline() == "there\n"
        stacks.ask_for({process.pid: words})
        assert 'File "<string>"' in stacks.read_from(words)
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_dies_of_a_signal_says_where(words):
    process = start("ctypes.string_at(0)", words)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in stacks.read_from(words)


def test_one_that_stands_still_is_not_waited_for_for_long(words):
    process = start("print('there', flush=True)\nwhile True: pass", words)
    try:
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        stacks.ask_for({process.pid: words})
        assert time.monotonic() - began < 5.0
        assert stacks.read_from(words) == ""
    finally:
        process.kill()
        process.communicate()


def test_one_that_is_gone_is_no_error(words):
    process = start("pass", words)
    process.communicate(timeout=30)
    stacks.ask_for({process.pid: words})
    assert stacks.read_from(words) == ""
