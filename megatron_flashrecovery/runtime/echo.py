"""Shows what one worker prints while the launcher runs: workers write to files, so that nobody blocks on a full
pipe."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO


class Echo:
    """``follow`` copies what has come since the last call; replacements of the rank go on in the same file."""

    def __init__(self, path: Path, out: TextIO) -> None:
        self._path = path
        self._out = out
        self._is_deaf = False
        self._at = path.stat().st_size if path.exists() else 0

    def follow(self) -> None:
        try:
            with self._path.open("rb") as log:
                log.seek(self._at)
                text = log.read()
        except FileNotFoundError:
            return
        if text and not self._is_deaf:
            self._at += len(text)
            try:
                self._out.write(text.decode(errors="replace"))
                self._out.flush()
            except OSError:
                self._is_deaf = True  # whoever listened has gone; the job goes on, and its log is complete
