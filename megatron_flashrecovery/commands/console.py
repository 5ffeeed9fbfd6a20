"""Where commands print their tables. As with ``print``, a reader that has gone is the business of ``cli.main``."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    """rich's own would end the process with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
