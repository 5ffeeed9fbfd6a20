"""How much host memory can still be had: what the kernel calls available, and what the control groups leave of it."""

from __future__ import annotations

from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The least of MemAvailable and the room below every memory limit that this process is under."""
    groups = [line.split(":", 2) for line in _text(proc / "self" / "cgroup").splitlines() if line.count(":") >= 2]
    rooms = [_mem_available(_text(proc / "meminfo"))]
    for _, controllers, path in groups:
        if controllers == "":
            rooms += _rooms(cgroup, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _rooms(cgroup / "memory", path, files)
    return max(0, min(rooms))


def _mem_available(meminfo: str) -> int:
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("no MemAvailable in meminfo: a Linux kernel older than 3.14")


def _rooms(root: Path, path: str, files: tuple[str, str, str]) -> list[int]:
    """Below each limit from the group at ``path`` up to the root; inside a container the path may be the host's."""
    limit_file, usage_file, reclaimable = files
    group = root / path.lstrip("/")
    rooms = []
    for directory in (group, *group.parents):
        limit, usage = _text(directory / limit_file).strip(), _text(directory / usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            # Page cache counts as usage, but it makes room when somebody needs it.
            rooms.append(int(limit) - int(usage) + _stat(_text(directory / "memory.stat"), reclaimable))
        if directory == root:
            break
    return rooms


def _stat(stat: str, name: str) -> int:
    for line in stat.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
