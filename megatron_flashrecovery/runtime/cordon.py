"""Hosts that a scheduler should give to nobody for now, as it wants them written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")


def compressed(hosts: Iterable[str]) -> str:
    """As SLURM writes lists of hosts: ``gpu-b,n[01-03,07]``."""
    numbers: dict[tuple[str, str, int], set[int]] = {}
    plain: set[str] = set()
    for host in hosts:
        found = _NUMBERED.fullmatch(host)
        if found is None:
            plain.add(host)
        else:
            prefix, digits, suffix = found.groups()
            # Without leading zeros 9 and 10 are in one range, and with them they are of one width.
            width = len(digits) if digits.startswith("0") and len(digits) > 1 else 0
            numbers.setdefault((prefix, suffix, width), set()).add(int(digits))
    _join_widths(numbers)
    told = [
        _of_prefix(prefix, suffix, width, sorted(those)) for (prefix, suffix, width), those in sorted(numbers.items())
    ]
    return ",".join(sorted([*plain, *told]))


def drain_commands(reasons_of: Mapping[str, Iterable[str]]) -> list[str]:
    """One for all hosts with the same reasons; to be read by a person before they are run."""
    hosts_of: dict[str, list[str]] = {}
    for host, reasons in reasons_of.items():
        reason = "flashrecovery: " + "; ".join(reasons)
        hosts_of.setdefault(reason.replace('"', "'").replace("\n", " "), []).append(host)
    return [
        f'scontrol update NodeName={compressed(hosts)} State=DRAIN Reason="{_safe(reason)}"'
        for reason, hosts in hosts_of.items()
    ]


def _safe(reason: str) -> str:
    """Nothing in it means anything to a shell."""
    return re.sub(r"[\\$`!]", "_", reason)


def _join_widths(numbers: dict[tuple[str, str, int], set[int]]) -> None:
    """``n08``, ``n09`` have a width, ``n10`` has none by itself: it belongs to them."""
    for (prefix, suffix, width), those in list(numbers.items()):
        if width and (bare := numbers.get((prefix, suffix, 0))):
            same = {number for number in bare if len(str(number)) == width}
            those |= same
            bare -= same
            if not bare:
                del numbers[prefix, suffix, 0]


def _of_prefix(prefix: str, suffix: str, width: int, numbers: list[int]) -> str:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    told = [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in ranges]
    if len(numbers) == 1:
        return f"{prefix}{told[0]}{suffix}"
    return f"{prefix}[{','.join(told)}]{suffix}"
