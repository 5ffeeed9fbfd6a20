"""An iterator that can be wound back to where it was a little while ago."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megatron_flashrecovery.adapters.megatron.replay import copied


class Generators(Protocol):
    """The random generators of this process."""

    def capture(self) -> Any: ...

    def restore(self, captured: Any) -> None: ...


class Tape(Iterator[Any]):
    """``source`` is what is there already; without it ``open_source`` is asked when the first item is wanted.

    ``generators`` are given for a source that may draw from them. An item that is given again leaves them as it did
    the first time, when they were the same before it, too."""

    def __init__(
        self,
        open_source: Callable[[], Iterator[Any]],
        source: Iterator[Any] | None = None,
        generators: Generators | None = None,
    ) -> None:
        self._open_source = open_source
        self._source = source
        self._generators = generators
        self._kept: deque[tuple[Any, Any]] = deque()
        self._first = 0
        self.position = 0
        """How many items were drawn since the tape was made."""

    def __next__(self) -> Any:
        if self._source is None:
            self._source = self._open_source()
        at = self.position - self._first
        if at == len(self._kept):
            item = next(self._source)
            self._kept.append((item, self._generators.capture() if self._generators is not None else None))
        elif self._generators is not None:
            self._generators.restore(self._kept[at][1])
        self.position += 1
        # What is done to an item must not be seen by whoever draws it again.
        return copied(self._kept[at][0])

    def wind_back(self, position: int) -> None:
        assert self._first <= position <= self.position, (self._first, position, self.position)
        self.position = position

    def forget_before(self, position: int) -> None:
        while self._first < min(position, self.position):
            self._kept.popleft()
            self._first += 1
