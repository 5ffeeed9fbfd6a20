"""The kernel's log, from now on. Reading it never waits."""

from __future__ import annotations

import os
from pathlib import Path

KMSG = Path("/dev/kmsg")
_RECORD_NBYTES = 8192
_MOST = 1000
"""Records in one look: a kernel that floods its log must not keep the reader."""


class KernelLog:
    """Where there is none, or this user may not read it, it stays silent and says so in ``why_not``."""

    def __init__(self, path: Path = KMSG) -> None:
        self.why_not = ""
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            self.why_not = f"{path} cannot be read: {error.strerror}"

    def lines(self) -> list[str]:
        """What has come since the last look. One read gives one record (Documentation/ABI/testing/dev-kmsg)."""
        found: list[str] = []
        while self._descriptor is not None and len(found) < _MOST:
            try:
                record = os.read(self._descriptor, _RECORD_NBYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # some were overwritten before they were read
            except OSError as error:
                self.why_not = f"the kernel's log ended: {error.strerror}"
                self.close()
                break
            if not record:
                break
            found.append(record.decode(errors="replace").partition(";")[2].partition("\n")[0])
        return found

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
