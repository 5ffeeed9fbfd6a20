"""What a launcher tells people: one line on its standard error, also when nobody listens any more."""

from __future__ import annotations

import sys
from contextlib import suppress


def say(line: str) -> None:
    with suppress(OSError):  # whoever listened has gone
        print(f"flashrecovery: {line}", file=sys.stderr, flush=True)
