"""What holds for all commands alike: files in place of directories, and readers that have seen enough."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_flashrecovery.cli import main

PLAN = ("plan", "--nproc-per-node", "8", "--params", "7B")


@pytest.mark.parametrize("below", ["", "deeper"])
@pytest.mark.parametrize(
    "argv",
    [
        ("status", "DIR"),
        ("replay", "DIR"),
        ("plan", "DIR"),
        ("diagnose", "DIR"),
        ("verify", "DIR", "DIR"),
        ("inject", "DIR", "kill:rank=0"),
        ("run", "--log-dir", "DIR", __file__),
        ("demo", "--log-dir", "DIR", __file__),
    ],
    ids=lambda argv: argv[0],
)
def test_a_file_in_place_of_a_directory_is_refused_in_one_line(argv, below, tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text("# a file\n")
    assert main([str(file / below) if word == "DIR" else word for word in argv], {}) == 2
    assert capsys.readouterr().err == (
        f"flashrecovery: {file} is a file: name the --log-dir of a run, which is a directory\n"
    )


@pytest.mark.parametrize("argv", [PLAN, ("policy",), ("policy", "--json"), ("run", "--help")], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_failure(argv):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "megatron_flashrecovery", *argv]
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
