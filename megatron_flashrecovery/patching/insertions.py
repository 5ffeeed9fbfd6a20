"""A patch that only inserts lines: a unified diff without context, so that it holds no line of anybody else's.

``git apply --unidiff-zero`` and ``patch`` understand it, too. What they do not know is whether the file is the one that
the line numbers were counted in; each file's fingerprint before and after stands above its part for that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.core.errors import RecordDamaged

_FILE = re.compile(r"^\+\+\+ b/(.+)$")
_HUNK = re.compile(r"^@@ -(\d+),0 \+\d+(?:,(\d+))? @@")
_BEFORE, _AFTER = "before: ", "after: "


@dataclass(frozen=True)
class Insertion:
    """``lines`` (with their ends) come behind line ``after`` of the file, counted from 1; 0 is its top."""

    after: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class FilePatch:
    """``before`` and ``patched`` are the sha256 of the whole file without and with the insertions."""

    path: str
    before: str
    patched: str
    insertions: tuple[Insertion, ...]

    def apply(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        for insertion in sorted(self.insertions, key=lambda each: each.after, reverse=True):
            lines[insertion.after : insertion.after] = insertion.lines
        return "".join(lines)

    def revert(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        for insertion in sorted(self.insertions, key=lambda each: each.after):
            end = insertion.after + len(insertion.lines)
            assert tuple(lines[insertion.after : end]) == insertion.lines, insertion
            del lines[insertion.after : end]
        return "".join(lines)

    def render(self) -> str:
        said = [f"{_BEFORE}{self.before}\n", f"{_AFTER}{self.patched}\n"]
        said += [f"--- a/{self.path}\n", f"+++ b/{self.path}\n"]
        shift = 0
        for insertion in sorted(self.insertions, key=lambda each: each.after):
            count = len(insertion.lines)
            said.append(f"@@ -{insertion.after},0 +{insertion.after + shift + 1},{count} @@\n")
            said += [f"+{line}" for line in insertion.lines]
            shift += count
        return "".join(said)


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> str:
    """With its line ends as they are: what is written back must differ in nothing but the insertions."""
    return path.read_bytes().decode()


def make(path: str, text: str, insertions: Sequence[Insertion]) -> FilePatch:
    unsealed = FilePatch(path, fingerprint(text), "", tuple(insertions))
    return FilePatch(path, unsealed.before, fingerprint(unsealed.apply(text)), unsealed.insertions)


def parse(patch: Path) -> dict[str, FilePatch]:
    """By path. Raises ``RecordDamaged`` for anything but insertions."""
    found: dict[str, FilePatch] = {}
    prints: dict[str, str] = {}
    path, hunks = "", dict[int, list[str]]()
    where: list[str] | None = None

    def close() -> None:
        if path:
            made = tuple(Insertion(after, tuple(lines)) for after, lines in hunks.items())
            found[path] = FilePatch(path, prints[_BEFORE], prints[_AFTER], made)

    for line in patch.read_text().splitlines(keepends=True):
        if line.startswith((_BEFORE, _AFTER)):
            if line.startswith(_BEFORE):
                close()
                path, hunks, where = "", {}, None
            key = _BEFORE if line.startswith(_BEFORE) else _AFTER
            prints[key] = line.removeprefix(key).strip()
        elif named := _FILE.match(line):
            path = named[1]
        elif hunk := _HUNK.match(line):
            where = hunks.setdefault(int(hunk[1]), [])
        elif line.startswith("+") and where is not None:
            where.append(line[1:])
        elif not line.startswith("--- "):
            raise RecordDamaged(f"{patch.name} is no patch of insertions: {line.strip()}")
    close()
    return found


def states(patches: Mapping[str, FilePatch], root: Path) -> dict[str, str]:
    """For each file of the patch: ``applied``, ``not applied``, ``changed`` by somebody, or ``missing``."""
    found = {}
    for path, patch in patches.items():
        file = root / path
        if not file.is_file():
            found[path] = "missing"
            continue
        now = fingerprint(read(file))
        found[path] = {patch.before: "not applied", patch.patched: "applied"}.get(now, "changed")
    return found
