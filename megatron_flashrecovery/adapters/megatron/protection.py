"""What a training loop holds: it runs the steps under protection, and brings the state of the loop along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_flashrecovery.adapters.megatron.framework import MegatronFramework
from megatron_flashrecovery.adapters.megatron.position import SamplePosition
from megatron_flashrecovery.adapters.megatron.seams import check_version, install_seams
from megatron_flashrecovery.adapters.megatron.session_seam import SessionSeam
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.runtime.session import Session

T = TypeVar("T")


class StepReport(Protocol):
    """What a step of the loop returns, on every rank. ``loss`` is known at least where it is reported."""

    @property
    def loss(self) -> float | None: ...

    @property
    def grad_norm(self) -> float | None: ...

    @property
    def skipped(self) -> bool: ...


def start() -> Protection:
    """Take part in recovery. Before ``init_process_group``, because every group made from here on is a handle.

    Raises ``ConfigError`` in a process that ``flashrecovery run`` did not start.
    """
    check_version()
    session = Session.from_environment()
    session.install_groups()
    return Protection(session)


class Protection:
    """One per process, on the main thread."""

    def __init__(self, session: SessionSeam) -> None:
        self._session = session
        self._framework: MegatronFramework

    @property
    def is_joining(self) -> bool:
        """This process replaces another one: it must not load a checkpoint, it gets its state from the others."""
        return self._session.is_joining

    @property
    def must_load(self) -> bool:
        """The job fell back to its newest checkpoint: load it, also if nobody asked for that."""
        return self._session.must_load

    def protect(
        self,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        open_batches: Callable[[int], Iterator[Any]],
        first_step: int,
        choices: Choices | None = None,
    ) -> tuple[Iterator[Any], int]:
        """Everything is built, and loaded if there was a checkpoint of ``first_step``.

        ``open_batches(consumed_samples)`` gives this rank's micro batches from that position of the data on, the same
        ones at every call. ``choices`` are the user's, by flags of the script. Returns the iterator to train from,
        which can go back, and the step to begin with.
        """
        position = SamplePosition(open_batches, Step(first_step))
        self._framework = MegatronFramework(model, optimizer, scheduler, position)
        install_seams(model, optimizer, self._session, self._framework.partial_step)
        self._session.attach(self._framework, choices)
        return position.batches, self._session.first_step(Step(first_step))

    def run_step(self, step: int, call: Callable[[int], StepReport]) -> StepRecord:
        """Complete step ``step + 1``, with ``call(step)``, however often that takes.

        ``call`` is also given an earlier step than asked for, if a recovery went back behind it, so it must do
        everything that belongs to the step that it is given.
        """
        return self._session.run_step(Step(step), lambda: self._compute(call))

    def guard(self, name: str, call: Callable[[], T]) -> T:
        """A call after the loop that may enter a collective. It is repeated if a recovery cuts it short."""
        return self._session.guard(name, call)

    def checkpoint_written(self, step: int) -> None:
        """The checkpoint of ``step`` and its marker are complete: there is something to fall back to."""
        self._session.checkpoint_written(Step(step))

    def finish(self, state_sha256: str) -> None:
        """Training is over here. Returns when it is over for everybody: until then this rank may still be needed."""
        self._session.finish(state_sha256)

    def _compute(self, call: Callable[[int], StepReport]) -> StepRecord:
        step = self._framework.begin_step()
        report = call(step)
        self._framework.end_step()
        return StepRecord(report.loss, report.grad_norm, report.skipped)
