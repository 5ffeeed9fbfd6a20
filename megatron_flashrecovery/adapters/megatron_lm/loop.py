"""Megatron-LM's training loop under protection: every wrapper that ``hooks`` puts in place of a function of upstream's.

Upstream's loop is not changed. It calls ``train_step`` once per iteration, and between two of them a handful of
functions that can enter collectives (logging, evaluation, saving): these are guarded. A replacement begins the loop one
iteration early: its first ``train_step`` computes nothing and returns what the resume step reported, and so it joins
the others in what follows that step. Where it has to evaluate or save once more, everybody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_flashrecovery.adapters.megatron.framework import MegatronFramework
from megatron_flashrecovery.adapters.megatron.seams import install_seams
from megatron_flashrecovery.adapters.megatron_lm import results
from megatron_flashrecovery.adapters.megatron_lm.checkpoint import newest_saved, use_newest
from megatron_flashrecovery.adapters.megatron_lm.data import Data
from megatron_flashrecovery.adapters.megatron_lm.early_losses import EarlyLosses
from megatron_flashrecovery.adapters.megatron_lm.loop_position import LoopPosition
from megatron_flashrecovery.adapters.megatron_lm.loop_state import LoopState, copy_of_sums
from megatron_flashrecovery.adapters.megatron_lm.session_seam import LoopSession
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.framework import StepRecord

Function = Callable[..., Any]
_FORWARD_BACKWARD = 6
"""Place of the schedule among the arguments of ``train_step``."""
_FLOPS = 4
"""Place of the operations so far among those of ``checkpoint_and_decide_exit``."""
_OUTPUTS = ("print_rank_last", "get_tensorboard_writer", "get_wandb_writer")
_QUIET_AGAIN = frozenset({"training_log", "evaluate_and_print_results"})


class Loop:
    """One per process. ``training`` is upstream's module of that name, ``args`` its arguments."""

    def __init__(self, session: LoopSession, training: ModuleType, args: Any) -> None:
        self._session = session
        self._training = training
        self._args = args
        self._data = Data(training, session.is_joining)
        self._model: list[Any] = []
        self._optimizer: Any = None
        self._config: Any = None
        self._framework: MegatronFramework
        self._position: LoopPosition
        self._early_losses = EarlyLosses(session)
        self._everyone_trains = False
        self._checkpoint = 0
        self._is_saving = False

    # --- before the loop ----------------------------------------------------------------------------------------------

    def load_checkpoint(self, original: Function, *args: Any, **named: Any) -> Any:
        """A replacement reads none, so what loading sends around is no part of the recorded start."""
        if self._session.is_joining:
            return 0, 0
        if self._session.must_load:
            use_newest(self._args)
        with self._session.unrecorded():
            return original(*args, **named)

    def build_loader(self, original: Function, *args: Any, **named: Any) -> Any:
        return self._data.build_loader(original, *args, **named)

    def build_iterators(self, original: Function, *args: Any, **named: Any) -> Any:
        assert not named, named
        return self._data.build_iterators(original, self._training.build_pretraining_data_loader, *args)

    def train(self, original: Function, forward_step: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
        """Everything is built, and loaded if there was a checkpoint."""
        scheduler, config = rest[0], self._training.get_model_config(model[0])
        self._model, self._optimizer, self._config = model, optimizer, config
        first = Step(self._args.iteration)
        self._position = LoopPosition(self._args, self._data, first)
        self._framework = MegatronFramework(model, optimizer, scheduler, self._position)
        self._everyone_trains = _everyone_trains(model)
        self._session.attach(self._framework)
        is_joining = self._session.is_joining
        self._session.first_step(first)
        if is_joining:
            self._position.begin_loop()
        return original(forward_step, model, optimizer, *rest, **named)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train_step(self, original: Function, *args: Any, **named: Any) -> Any:
        sharded = self._framework.sharded
        if not self._session.has_entered:
            seams = self._session if sharded else self._early_losses
            install_seams(self._model, self._optimizer, seams, self._framework.partial_step)
        if not sharded:
            args = (
                *args[:_FORWARD_BACKWARD],
                self._early_losses.watch(args[_FORWARD_BACKWARD]),
                *args[_FORWARD_BACKWARD + 1 :],
            )
        state = self._take_state(int(self._args.consumed_train_samples))
        step = Step(self._args.curr_iteration)

        def call() -> StepRecord:
            self._put_back(state)
            self._framework.begin_step()
            if "iteration" in named:
                named["iteration"] = int(step)
            result = original(*args, **named)
            self._framework.end_step()
            return results.to_record(result, self._is_reporting())

        return results.from_record(self._session.run_step(step, call))

    def agree(self, original: Function, value: Any, *rest: Any, **named: Any) -> Any:
        """In place of the reductions over a replica that follow an update. A replicated optimizer must not wait for
        others there, and if everybody has parameters to train, everybody has been told the same before."""
        if self._session.is_inside and self._everyone_trains and not self._framework.sharded:
            return value
        return original(value, *rest, **named)

    def guarded(self, name: str, original: Function, *args: Any, **named: Any) -> Any:
        """A call that can enter a collective, before the loop, in it, or behind it."""
        if not self._is_guarding():
            return original(*args, **named)
        if name == "save_checkpoint":
            self._is_saving = True
        if name == "training_log":
            self._position.adopt(args[1])
        state = self._take_state(self._position.calculated_for)
        sums = copy_of_sums(self._position.total_losses) if name == "training_log" else {}
        step = Step(self._args.curr_iteration + 1)
        done = step <= self._session.reported.get(name, 0)

        def call() -> Any:
            nonlocal done
            if name == "checkpoint_and_decide_exit":
                self._position.flops = args[_FLOPS]
            with self._quiet() if done and name in _QUIET_AGAIN else nullcontext():
                result = original(*args, **named)
            done = True
            return result

        def again() -> Any:
            self._put_back(state)
            if name == "training_log":
                self._position.total_losses.clear()
                self._position.total_losses.update(copy_of_sums(sums))
            return call()

        result = self._session.guard(name, call, again)
        if name in _QUIET_AGAIN and self._reports():
            self._session.note_reported(name, step)
        self._note_checkpoint()
        return result

    def barrier_of_timer(self, timer: Any) -> None:
        """In place of the barrier that a timer starts or stops with."""

        def meet() -> None:
            torch.distributed.barrier(group=timer._barrier_group)

        if self._is_guarding():
            self._session.guard(f"the barrier of timer {timer.name}", meet)
        else:
            meet()

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """``pretrain`` is over."""
        if self._session.has_entered:
            self._session.finish(self._framework.state_sha256())

    # --- inside -------------------------------------------------------------------------------------------------------

    def _is_guarding(self) -> bool:
        return self._session.has_entered

    def _take_state(self, calculated_for: int) -> LoopState:
        timers = self._training.get_timers()
        return LoopState.take(self._args, timers, self._model, self._config, self._data.tapes, calculated_for)

    def _put_back(self, state: LoopState) -> None:
        state.put_back(self._args, self._training.get_timers(), self._model, self._config, self._data.tapes)

    def _note_checkpoint(self) -> None:
        """Whatever way it was saved in: only the marker says that it is complete."""
        if self._is_saving and not self._session.is_inside:
            newest = newest_saved(self._args.save)
            self._is_saving = bool(getattr(self._args, "async_save", False)) and newest <= self._checkpoint
            if newest > self._checkpoint:
                self._checkpoint = newest
                self._session.checkpoint_written(newest)

    @staticmethod
    def _reports() -> bool:
        """Upstream writes its report on the last rank."""
        return bool(torch.distributed.get_rank() == torch.distributed.get_world_size() - 1)

    def _is_reporting(self) -> bool:
        """On the last stage everybody knows the loss; one replica is enough to report it."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """What has been reported is not reported again."""
        before = {name: getattr(self._training, name) for name in _OUTPUTS}
        for name in _OUTPUTS:
            setattr(self._training, name, _nothing)
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(self._training, name, function)


def _everyone_trains(model: list[Any]) -> bool:
    trains = any(parameter.requires_grad for chunk in model for parameter in chunk.parameters())
    told = torch.tensor([int(trains)], dtype=torch.int32, device=torch.cuda.current_device())
    group = parallel_state.get_model_parallel_group()
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(told.item())


def _nothing(*_args: Any, **_named: Any) -> None:
    """In place of a function that prints, or that gives something to write with."""
