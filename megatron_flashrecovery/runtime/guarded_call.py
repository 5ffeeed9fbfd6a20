"""A call of the framework's loop between two steps, which a recovery may have to repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class GuardedCall:
    """``result`` is that of the newest attempt. ``again`` is made in place of ``call`` from the second attempt on."""

    def __init__(self, name: str, call: Callable[[], object], again: Callable[[], object]) -> None:
        self.name = name
        self._call = call
        self._again = again
        self.result: Any = None

    def make(self) -> None:
        self.result = self._call()

    def repeat(self) -> None:
        self.result = self._again()
