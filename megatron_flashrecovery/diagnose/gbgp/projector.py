"""Projections of all blocks, one after the other or by processes that live as long as the work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from megatron_flashrecovery.diagnose.gbgp.limits import Deadline
from megatron_flashrecovery.diagnose.gbgp.network import Blocks, Indices, Vector
from megatron_flashrecovery.diagnose.gbgp.projection import Model, Projection, best_available

Side: TypeAlias = Literal["head", "tail"]


class Projector(Protocol):
    """Projects one vector for each block. Raises ``OutOfTime``."""

    def project(
        self, side: Side, vectors: Sequence[Vector], models: Sequence[Model], deadline: Deadline
    ) -> list[Indices]: ...


class OneByOne:
    """In this process."""

    def __init__(self, blocks: Blocks, projection: Projection | None = None) -> None:
        self._blocks = blocks
        self._projection = projection or best_available()

    def project(
        self, side: Side, vectors: Sequence[Vector], models: Sequence[Model], deadline: Deadline
    ) -> list[Indices]:
        project = self._projection.head if side == "head" else self._projection.tail
        of_blocks = zip(self._blocks.networks, vectors, models, strict=True)
        return [project(network, vector, model, deadline) for network, vector, model in of_blocks]


@contextmanager
def in_processes(blocks: Blocks, processes: int, projection: Projection | None = None) -> Iterator[Projector]:
    """``processes`` that get the networks once and end with the ``with``. Threads would not help: ``pcst_fast`` keeps
    the interpreter's lock. The processes are started afresh, so a script needs its ``if __name__ == "__main__"``."""
    with ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_keep,
        initargs=(blocks, projection or best_available()),
    ) as pool:
        # A process starts with the first task that finds none idle; the time that takes is nobody's round.
        for ready in [pool.submit(_ready) for _ in range(processes)]:
            ready.result()
        yield _InProcesses(pool, blocks)


class _InProcesses:
    def __init__(self, pool: ProcessPoolExecutor, blocks: Blocks) -> None:
        self._pool = pool
        # The largest first: the last task to end is a small one.
        self._order = sorted(range(len(blocks)), key=lambda k: -len(blocks.networks[k].edges))

    def project(
        self, side: Side, vectors: Sequence[Vector], models: Sequence[Model], deadline: Deadline
    ) -> list[Indices]:
        tasks = {k: self._pool.submit(_project, side, k, vectors[k], models[k], deadline) for k in self._order}
        return [tasks[k].result() for k in range(len(vectors))]


@dataclass
class _Kept:
    """What a process of the pool was given at its start."""

    blocks: Blocks | None = None
    projection: Projection | None = None


_kept = _Kept()


def _keep(blocks: Blocks, projection: Projection) -> None:
    _kept.blocks, _kept.projection = blocks, projection


def _ready() -> None:
    assert _kept.blocks is not None


def _project(side: Side, block: int, vector: Vector, model: Model, deadline: Deadline) -> Indices:
    assert _kept.blocks is not None
    assert _kept.projection is not None
    deadline.check()
    project: Callable[..., Indices] = _kept.projection.head if side == "head" else _kept.projection.tail
    return project(_kept.blocks.networks[block], vector, model, deadline)
