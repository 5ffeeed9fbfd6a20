"""The functions of a framework that we rely on, and what has become of them in a checkout."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError


@dataclass(frozen=True)
class Seam:
    """``name`` is dotted inside its file. ``sha256`` is that of its source text."""

    file: str
    name: str
    parameters: tuple[str, ...]
    sha256: str

    @property
    def place(self) -> str:
        return f"{self.file}: {self.name}"


@dataclass(frozen=True)
class Moved:
    """``breaks``: what we call or replace is not there in the form that we know, and not only written differently."""

    seam: Seam
    difference: str
    breaks: bool


def read_seam(root: Path, file: str, name: str) -> Seam | None:
    """As it is in this checkout; None if it is not there."""
    path = root / file
    if not path.is_file():
        return None
    node = _find(parsed(path), name.split("."))
    if node is None:
        return None
    source = path.read_text()
    text = textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))
    return Seam(file, name, tuple(_parameters(node)), hashlib.sha256(text.encode()).hexdigest())


def parsed(path: Path) -> ast.Module:
    """Raises ``ConfigError`` for what is no Python: a merge conflict, say."""
    try:
        return ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path} line {error.lineno} is no Python ({error.msg}): a merge conflict?") from None


def compare(root: Path, known: Sequence[Seam]) -> Iterator[Moved]:
    """What has moved since ``known``."""
    for seam in known:
        now = read_seam(root, seam.file, seam.name)
        if now is None:
            yield Moved(seam, "is gone", breaks=True)
        elif now.parameters != seam.parameters:
            gone = [name for name in seam.parameters if name not in now.parameters]
            new = [name for name in now.parameters if name not in seam.parameters]
            parts = [f"no longer takes {', '.join(gone)}"] if gone else []
            parts += [f"also takes {', '.join(new)}"] if new else []
            yield Moved(seam, "; ".join(parts) or "takes its parameters in another order", breaks=bool(gone) or not new)
        elif now.sha256 != seam.sha256:
            yield Moved(seam, "has another body", breaks=False)


def _find(tree: ast.Module, path: Sequence[str]) -> ast.FunctionDef | ast.ClassDef | None:
    body: Sequence[ast.stmt] = tree.body
    node: ast.FunctionDef | ast.ClassDef | None = None
    for name in path:
        node = next(
            (each for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == name), None
        )
        if node is None:
            return None
        body = node.body
    return node


def _parameters(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        yield from (each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
