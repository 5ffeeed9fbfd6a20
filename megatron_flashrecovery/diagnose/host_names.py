"""Names of hosts: lists in SLURM's short form, and what names say of racks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.cluster import Cluster, HostWiring

_MOST = 1 << 20
"""A range that is longer is a slip."""
_BRACKETS = re.compile(r"\[([^][]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_TWO_NUMBERS = re.compile(r"(\D*)(\d+)(\D+)(\d+)(\D*)")


def expand(text: str) -> tuple[str, ...]:
    """``node[1-3,07],login`` names node1, node2, node3, node07 and login: each number as wide as it is written.

    Raises ``ConfigError`` for what is no such list."""
    names = tuple(itertools.chain.from_iterable(_expand_one(part, text) for part in _split(text)))
    if not names:
        raise ConfigError(f"host list {text!r} names nobody: write names like node[1-4,7]")
    return names


def guess_racks(hosts: Sequence[str]) -> Cluster:
    """Hosts, each below its rack if all names have one form with two numbers (``r12n07``), the second of which begins
    anew for each of the first; else hosts only. A rack counts as a leaf switch, and its name ends in ``?``.

    Names with three numbers or more are not looked at: most of them are addresses (``ip-10-0-3-17``)."""
    names = tuple(dict.fromkeys(hosts))
    found = [_TWO_NUMBERS.fullmatch(name.partition(".")[0]) for name in names]
    matches = [match for match in found if match is not None]
    forms = {match.group(1, 3, 5) for match in matches}
    racks, inside = {match.group(2) for match in matches}, {match.group(4) for match in matches}
    # In r1n1 r1n2 r2n1 r2n2 numbers come again; in a cluster whose hosts are numbered throughout they do not.
    if len(matches) < len(names) or len(forms) != 1 or len(racks) < 2 or 2 * len(inside) > len(names):
        return Cluster(tuple(HostWiring(name) for name in names))
    return Cluster(
        tuple(
            HostWiring(name, leaves=(f"{match.group(1)}{match.group(2)}?",))
            for name, match in zip(names, matches, strict=True)
        )
    )


def _split(text: str) -> Iterator[str]:
    """At commas outside of brackets."""
    depth, begin = 0, 0
    for place, letter in enumerate(text + ","):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ConfigError(f"host list {text!r}: brackets do not match, close each before the next one opens")
        if letter == "," and depth == 0:
            if part := text[begin:place].strip():
                yield part
            begin = place + 1
    if depth:
        raise ConfigError(f"host list {text!r}: a bracket is not closed, add the ]")


def _expand_one(part: str, text: str) -> Iterator[str]:
    pieces = _BRACKETS.split(part)  # text and contents of brackets in turn
    if re.search(r"\s", part):
        raise ConfigError(f"host list {text!r}: there is a space in {part!r}, separate names by commas")
    choices = [list(_numbers(piece, text)) if k % 2 else [piece] for k, piece in enumerate(pieces)]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _numbers(ranges: str, text: str) -> Iterator[str]:
    for each in ranges.split(","):
        match = _RANGE.fullmatch(each.strip())
        if match is None:
            raise ConfigError(f"host list {text!r}: {each!r} is no number and no range, write them like [1-4,07]")
        first, last = match.group(1), match.group(2) or match.group(1)
        if not int(first) <= int(last) < int(first) + _MOST:
            raise ConfigError(f"host list {text!r}: range {each} is empty or too long, the smaller number comes first")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
