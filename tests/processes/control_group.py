"""A memory control group of our own, in which the kernel's out-of-memory killer can be called without harm."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@contextmanager
def control_group(limit_nbytes: int) -> Iterator[Path]:
    """Raises ``OSError`` where none can be made."""
    top, limit = (_V1, "memory.limit_in_bytes") if _V1.is_dir() else (_V2, "memory.max")
    group = top / f"flashrecovery-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(limit_nbytes))
        yield group
    finally:
        _remove(group)


def inside(group: Path, command: Sequence[str]) -> list[str]:
    """The command, with all that it starts, in that group."""
    join = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    return [sys.executable, "-c", f"{join}os.execv({command[0]!r}, {list(command)!r})"]


def _remove(group: Path) -> None:
    """Its last process is perhaps only just gone."""
    deadline = time.monotonic() + 10
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
