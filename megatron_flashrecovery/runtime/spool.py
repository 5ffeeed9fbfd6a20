"""How a user reaches a run that goes on: a directory in its --log-dir, which the owner of the job alone can write.

Nothing listens, and no secret is needed: who may write there may end the job anyway. A request is a file that appears
under its name all at once; so is the answer. The controller looks there, on any machine that shares the directory.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError

NAME = "injections"
_REQUEST, _ANSWER = ".request", ".answer"
_MOST_NBYTES = 4096
_POLL = 0.05
_OK = "ok "


@dataclass(frozen=True)
class Request:
    name: str
    spec: str


class Spool:
    """The controller's side. Raises ``ConfigError`` if the directory would be somebody else's."""

    def __init__(self, log_dir: Path) -> None:
        self._path = log_dir / NAME
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            _check_owner(self._path)
            self._path.chmod(0o700)  # whatever the umask says
        except OSError as error:
            raise ConfigError(f"--allow-injection: {self._path} cannot be made: {error.strerror}") from None
        self._clear()

    def requests(self) -> Iterator[Request]:
        """Each once, oldest name first; whatever is not a small file of the owner's is left alone."""
        try:
            found = sorted(entry for entry in os.listdir(self._path) if entry.endswith(_REQUEST))
        except OSError:
            return
        for entry in found:
            try:
                spec = _read(self._path / entry)
                if spec is not None:
                    (self._path / entry).unlink(missing_ok=True)
            except OSError:
                return  # a disk that fails is no reason to stop training; who has asked gets no answer
            if spec is not None:
                yield Request(entry.removesuffix(_REQUEST), spec)

    def answer(self, name: str, refusal: str, text: str = "") -> None:
        with suppress(OSError):  # whoever has asked says that nobody answers
            _appear(self._path, name + _ANSWER, refusal or _OK + text)

    def close(self) -> None:
        """Nobody looks there any more."""
        self._clear()
        try:
            self._path.rmdir()
        except OSError:
            return  # somebody has put something else there, or the disk is gone

    def _clear(self) -> None:
        for suffix in (_REQUEST, _ANSWER):
            for path in self._path.glob(f"*{suffix}"):
                path.unlink(missing_ok=True)


def submit(log_dir: Path, spec: str, timeout: float) -> str:
    """Ask, and wait for the answer. Raises ``ConfigError``: refused, or nobody answers."""
    path = log_dir / NAME
    if not path.is_dir():
        raise ConfigError(
            f"{log_dir}: this run takes no faults: start it with `flashrecovery run --allow-injection ...`"
        )
    name = secrets.token_hex(8)
    try:
        _appear(path, name + _REQUEST, spec)
    except PermissionError:
        raise ConfigError(f"{path} belongs to somebody else: only the owner of a run may inject faults") from None
    answer, deadline = path / (name + _ANSWER), time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            said = answer.read_text()
        except FileNotFoundError:
            time.sleep(_POLL)
            continue
        answer.unlink(missing_ok=True)
        if not said.startswith(_OK):
            raise ConfigError(said)
        return said.removeprefix(_OK)
    (path / (name + _REQUEST)).unlink(missing_ok=True)
    raise ConfigError(f"nobody has answered within {timeout:g} s: see `flashrecovery status {log_dir}`")


def _check_owner(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(f"--allow-injection: {path} belongs to somebody else: name another --log-dir")


def _read(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0)
        if not is_ours or found.st_size > _MOST_NBYTES:
            return None
        return os.read(descriptor, _MOST_NBYTES).decode(errors="replace")
    finally:
        os.close(descriptor)


def _appear(directory: Path, name: str, text: str) -> None:
    part = directory / f"{name}.part"
    part.write_text(text)
    part.rename(directory / name)
