"""What one call of upstream's loop has told people so far: a repetition of the call leaves it out.

A rank that survives may have printed its line and put its points on the board before another one was lost, while it
waited for that one in the same call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PRINT, BOARD, WANDB = "print_rank_last", "get_tensorboard_writer", "get_wandb_writer"


class ToldOnce:
    """Of one call. ``training`` is upstream's module, whose functions look each other up in it."""

    def __init__(self, training: ModuleType) -> None:
        self._training = training
        self._told: Counter[Hashable] = Counter()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around an attempt: the same things are told in the same order each time."""
        seen: Counter[Hashable] = Counter()
        print_line, get_writer = getattr(self._training, PRINT), getattr(self._training, BOARD)

        def is_news(what: Hashable) -> bool:
            seen[what] += 1
            if seen[what] <= self._told[what]:
                return False
            self._told[what] = seen[what]
            return True

        def print_once(*args: Any, **named: Any) -> None:
            if is_news(PRINT):
                print_line(*args, **named)

        def board() -> Any:
            writer = get_writer()
            return None if writer is None else _Board(writer, is_news)

        with replaced(self._training, {PRINT: print_once, BOARD: board}):
            yield


class _Board:
    def __init__(self, writer: Any, is_news: Callable[[Hashable], bool]) -> None:
        self._writer = writer
        self._is_news = is_news

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._writer, name)
        if not name.startswith("add_"):
            return method

        def add(tag: Any, *args: Any, **named: Any) -> Any:
            return method(tag, *args, **named) if self._is_news((name, str(tag))) else None

        return add


@contextmanager
def replaced(module: ModuleType, by: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Functions of a module, for as long as this lasts."""
    before = {name: getattr(module, name) for name in by}
    for name, function in by.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
