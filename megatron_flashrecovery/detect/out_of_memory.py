"""Whether it was the kernel's out-of-memory killer: the control group counts its victims (``memory.events`` of cgroup
v2, ``memory.oom_control`` of v1).

A count that did not move proves nothing where the killer acted on another group, so then nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


class OutOfMemory:
    """``events`` is the file with the count; by default that of this process."""

    def __init__(self, events: Path | None = None) -> None:
        self._events = events or next((path for path in _candidates() if path.is_file()), None)
        self._known = self._count()

    def has_struck(self) -> bool:
        """Since this was asked for the last time, or since the beginning."""
        count = self._count()
        struck, self._known = count > self._known, max(count, self._known)
        return struck

    def _count(self) -> int:
        if self._events is None:
            return 0
        try:
            lines = (line.split() for line in self._events.read_text().splitlines())
            return next((int(value) for name, value in lines if name == "oom_kill"), 0)
        except (OSError, ValueError):
            return 0


def _candidates() -> Iterator[Path]:
    """In a container the own group may be mounted as the root."""
    try:
        lines = [line.split(":", 2) for line in _OWN.read_text().splitlines()]
    except OSError:
        return
    for _number, controllers, path in lines:
        if not controllers:
            yield _ROOT / path.lstrip("/") / "memory.events"
            yield _ROOT / "memory.events"
        if "memory" in controllers.split(","):
            yield _ROOT / "memory" / path.lstrip("/") / "memory.oom_control"
            yield _ROOT / "memory" / "memory.oom_control"
