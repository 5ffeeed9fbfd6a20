"""The contexts in which gradients are not reduced yet, so that those of a step that is cut short can be left.

A pipeline schedule enters ``no_sync`` by hand. If it is cut short it never leaves, and the garbage collector does it
later: then the reduction of gradients is switched on in the middle of another step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

Context = Callable[[], AbstractContextManager[Any]]


class NoSync:
    def __init__(self) -> None:
        self._entered: list[ExitStack] = []

    def tracked(self, no_sync: Context) -> Context:
        """The same context, which ``leave`` can leave."""

        @contextmanager
        def enter() -> Iterator[None]:
            with ExitStack() as inside:
                inside.enter_context(no_sync())
                self._entered.append(inside)
                try:
                    yield
                finally:
                    if inside in self._entered:
                        self._entered.remove(inside)

        return enter

    def leave(self) -> None:
        """Leave every context that is still entered. When they are collected later, nothing happens any more."""
        while self._entered:
            self._entered.pop().close()
