"""Some room on the disk of the records, kept free for their end: of a full disk it can still be said how the job ended.

It is a file that is deleted right before the last records are written.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NAME = ".reserve"
NBYTES = (65536, 16384)
"""As much as there is room for: a summary grows with every recovery."""


class Reserve:
    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME

    def make(self) -> None:
        """Where there is no room for it the job goes on without it."""
        for nbytes in NBYTES:
            try:
                with self._path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                return
            except OSError:
                self.give_up()

    def give_up(self) -> None:
        with suppress(OSError):
            self._path.unlink()
