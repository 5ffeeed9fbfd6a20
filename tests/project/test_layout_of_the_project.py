"""What the guide says of the code's shape, where a machine can see it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_flashrecovery"
MODULES = sorted(PACKAGE.rglob("*.py"))
CORE = sorted((PACKAGE / "core").glob("*.py"))
IMPURE = {
    "time",
    "datetime",
    "os",
    "socket",
    "threading",
    "asyncio",
    "subprocess",
    "logging",
    "random",
    "io",
    "pathlib",
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_its_purpose_first_and_fits_into_400_lines(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no purpose on the first line"
    assert len(text.splitlines()) <= 400
    assert path.stem not in ("utils", "common", "constants", "manager", "helpers")


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_imports_the_standard_library_without_clock_and_io(path):
    found = set(imported(path)) - {"megatron_flashrecovery"}
    assert found <= sys.stdlib_module_names
    assert not found & IMPURE


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_reads_no_file_and_prints_nothing(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"open", "print", "input", "exec", "eval"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_pickled(path):
    assert not {"pickle", "cloudpickle", "shelve", "marshal"} & set(imported(path))


def test_every_directory_of_the_package_is_a_package():
    missing = [name_of(path.parent) for path in MODULES if not (path.parent / "__init__.py").is_file()]
    assert missing == []
