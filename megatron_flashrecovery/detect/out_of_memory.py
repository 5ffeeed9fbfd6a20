"""Whether it was the kernel's out-of-memory killer: the control group counts its victims (``memory.events`` of cgroup
v2, ``memory.oom_control`` of v1).

A count that did not move proves nothing where the killer acted on another group, so then nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")
_UNLIMITED = 1 << 62
"""Version 1 says a number just below 2**63 where there is no limit."""


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


def why_no_limit(root: Path = _ROOT, own: Path = _OWN, memory: Path = _MEMORY) -> str | None:
    """Why the control group of this process would not stop it before the machine is full; ``None``: it would."""
    room = headroom(root, own)
    if room == _UNLIMITED:
        return "there is no memory limit: run the job in a control group with one"
    total, available = _meminfo(memory, "MemTotal"), _meminfo(memory, "MemAvailable")
    if room > available - total // 10:
        return "the machine would be full before the memory limit is reached: set a lower one"
    return None


def headroom(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Bytes up to the nearest limit of the control groups of this process."""
    return min((room for path in _levels(root, own) if (room := _headroom(path)) is not None), default=_UNLIMITED)


def _headroom(group: Path) -> int | None:
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            allowed, used = (group / limit).read_text().strip(), (group / usage).read_text().strip()
        except OSError:
            continue
        if allowed.isdecimal() and int(allowed) < _UNLIMITED:
            return int(allowed) - int(used)
    return None


def _levels(root: Path, own: Path) -> Iterator[Path]:
    """The own group and those around it."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _number, controllers, path in lines:
        if not controllers or "memory" in controllers.split(","):
            top = root / "memory" if controllers else root
            group = top / path.lstrip("/")
            yield from (level for level in (group, *group.parents) if level.is_relative_to(top))


def _meminfo(path: Path, name: str) -> int:
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(line[1]) << 10 for line in lines if line[0] == f"{name}:")


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
