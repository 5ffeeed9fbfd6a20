"""The data iterators of Megatron-LM, so that a recovery can go back in them and a replacement can begin in the middle.

Upstream: ``build_train_valid_test_data_iterators`` and ``build_pretraining_data_loader``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from megatron_flashrecovery.adapters.megatron.random_state import RandomState
from megatron_flashrecovery.adapters.megatron_lm.tape import Tape


@dataclass(frozen=True)
class _Built:
    dataset: Any
    loader: Any


@dataclass
class Data:
    """Every iterator that this rank draws from. ``training`` is upstream's module of that name."""

    training: ModuleType
    is_joining: bool
    train: list[Tape] = field(default_factory=list)
    others: list[Tape] = field(default_factory=list)
    _loaders: list[_Built] = field(default_factory=list)
    _reruns: list[Any] = field(default_factory=list)

    @property
    def tapes(self) -> list[Tape]:
        return [*self.train, *self.others]

    def build_loader(self, original: Callable[..., Any], dataset: Any, *rest: Any, **named: Any) -> Any:
        """In place of ``build_pretraining_data_loader``."""
        loader = original(dataset, *rest, **named)
        self._loaders.append(_Built(dataset, loader))
        return loader

    def build_iterators(self, original: Callable[..., Any], build_loader: Callable[..., Any], *args: Any) -> Any:
        """In place of ``build_train_valid_test_data_iterators``; the iterators are those that it gives, taped."""
        options = self.training.get_args()
        self._loaders.clear()
        train, valid, test = original(*args)
        built = list(self._loaders)
        train_built = [] if options.skip_train else built[:1]
        rest = built[len(train_built) :]

        def consumed(of_train: bool) -> Callable[[], int]:
            return lambda: int(options.consumed_train_samples) if of_train else _validated(options)

        def put(iterator: Any, sources: Iterable[_Built], into: list[Tape], where: Callable[[], int]) -> None:
            iterators = iterator if isinstance(iterator, list) else [iterator]
            for rerun, source in zip(iterators, sources, strict=True):
                if rerun is not None:
                    into.append(self._tape(rerun, source, build_loader, where))

        if built:
            put(train, train_built, self.train, consumed(of_train=True))
            put(valid, rest[:-1], self.others, consumed(of_train=False))
            put(test, rest[-1:], self.others, lambda: 0)
        return train, valid, test

    def forget_reruns(self) -> None:
        """What the rerun machine keeps of a step that was cut short."""
        for rerun in self._reruns:
            rerun.advance()

    def _tape(self, rerun: Any, built: _Built, build_loader: Callable[..., Any], consumed: Callable[[], int]) -> Tape:
        is_cyclic = self.training.get_args().dataloader_type == "cyclic"
        began_at = consumed()

        def open_source() -> Iterator[Any]:
            at = consumed()
            with generator_untouched():
                loader = build_loader(built.dataset, at)
                if not is_cyclic:
                    return iter(loader)
            source: Iterator[Any] = self.training.cyclic_iter(loader)
            return source if at == began_at or _begins_epoch(loader, at) else _first_untouched(source)

        # A cyclic source makes its iterator in the middle of training: at its first item, and at that of each epoch.
        generators = RandomState() if is_cyclic else None
        tape = Tape(open_source, None if self.is_joining else iter(rerun.iterable), generators)
        rerun.iterable = tape
        self._reruns.append(rerun)
        return tape


def _validated(options: Any) -> int:
    return 0 if options.full_validation or options.skip_train else int(options.consumed_valid_samples)


def _begins_epoch(loader: Any, consumed: int) -> bool:
    """Whether one that had been there all the time would make another iterator now. With workers it keeps them."""
    sampler = loader.batch_sampler
    return not loader.persistent_workers and consumed % (sampler.total_samples - sampler.last_batch_size) == 0


def _first_untouched(source: Iterator[Any]) -> Iterator[Any]:
    with generator_untouched():
        first = next(source)
    yield first
    yield from source


@contextmanager
def generator_untouched() -> Iterator[None]:
    """A data loader draws a seed for its workers when its iterator is made."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
