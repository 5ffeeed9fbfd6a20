"""Megatron-LM's training loop under protection: every wrapper that ``hooks`` puts in place of a function of upstream's.

Upstream's loop is not changed. It calls ``train_step`` once per iteration, and between two of them a handful of
functions that can enter collectives (logging, evaluation, saving): these are guarded. A replacement begins the loop one
iteration early: its first ``train_step`` computes nothing and returns what the resume step reported, and so it joins
the others in what follows that step. Where it has to evaluate or save once more, everybody does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_flashrecovery.adapters.megatron.framework import MegatronFramework
from megatron_flashrecovery.adapters.megatron.seams import install_seams
from megatron_flashrecovery.adapters.megatron.step_numbers import StepNumbers
from megatron_flashrecovery.adapters.megatron_lm import results
from megatron_flashrecovery.adapters.megatron_lm.arguments import choices_of
from megatron_flashrecovery.adapters.megatron_lm.async_saves import AsyncSaves
from megatron_flashrecovery.adapters.megatron_lm.between_steps import BetweenSteps
from megatron_flashrecovery.adapters.megatron_lm.checkpoint import newest_saved
from megatron_flashrecovery.adapters.megatron_lm.data import Data
from megatron_flashrecovery.adapters.megatron_lm.early_losses import EarlyLosses
from megatron_flashrecovery.adapters.megatron_lm.loop_position import LoopPosition
from megatron_flashrecovery.adapters.megatron_lm.loop_state import LoopState, hook, is_hooked
from megatron_flashrecovery.adapters.megatron_lm.session_seam import LoopSession
from megatron_flashrecovery.adapters.megatron_lm.wandb_rows import WandbRows
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.framework import StepRecord

Function = Callable[..., Any]
_SCHEDULE = 6
"""Place of the schedule among the arguments of ``train_step``."""


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
        self._numbers: StepNumbers
        self._early_losses = EarlyLosses(session)
        self._saves = AsyncSaves(session, args)
        self._rows = WandbRows(session, lambda: training.get_wandb_writer())
        self._everyone_trains = False
        self._checkpoint = 0
        self._is_saving = False
        self._param_sync: Any = None
        self._calls_behind: Counter[str] = Counter()

    # --- before the loop ----------------------------------------------------------------------------------------------

    def load_checkpoint(self, original: Function, *args: Any, **named: Any) -> Any:
        """A replacement reads none, so what loading sends around is no part of the recorded start."""
        if self._session.is_joining:
            return 0, 0
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
        self._framework = MegatronFramework(model, optimizer, scheduler, self._position, self._saves.abandon)
        self._everyone_trains = _everyone_trains(model)
        self._session.attach(self._framework, choices_of(self._args))
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
            self._numbers = install_seams(self._model, self._optimizer, seams, self._framework.partial_step)
        schedule = self._numbers.watch_losses(args[_SCHEDULE])
        if not sharded:
            schedule = self._early_losses.watch(schedule)
        args = (*args[:_SCHEDULE], schedule, *args[_SCHEDULE + 1 :])
        put_back = self._snapshot(int(self._args.consumed_train_samples))
        step = Step(self._args.curr_iteration)

        def call() -> StepRecord:
            put_back()
            self._framework.begin_step()
            if "iteration" in named:
                named["iteration"] = int(step)
            result = original(*args, **named)
            self._position.was_hooked = all(map(is_hooked, self._model))
            self._framework.end_step()
            # On the last stage everybody knows the loss; whose record is shown is the session's affair.
            return results.to_record(result, bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True)))

        is_answered = self._position.step > step
        self._rows.settle()
        record = self._session.run_step(step, call)
        self._calls_behind.clear()
        if is_answered and record.skipped and self._position.was_hooked:
            # Upstream switches the hooks on behind a first step that was not skipped; the others have done that before.
            self._switch_hooks_on()
        return results.from_record(record)

    def calculate(self, original: Function, consumed_samples: int, *rest: Any, **named: Any) -> Any:
        """In place of ``update_num_microbatches``: what it was last asked for can be asked again."""
        if self._is_guarding():
            self._position.calculated_for = int(consumed_samples)
        return original(consumed_samples, *rest, **named)

    def agree(self, original: Function, value: Any, *rest: Any, **named: Any) -> Any:
        """In place of the reductions over a replica that follow an update. A replicated optimizer must not wait for
        others there, and if everybody has parameters to train, everybody has been told the same before."""
        if self._session.is_inside and self._everyone_trains and not self._framework.sharded:
            return value
        return original(value, *rest, **named)

    def guarded(self, name: str, original: Function, *args: Any, **named: Any) -> Any:
        """A call that can enter a collective, before the loop, in it, or behind it."""
        if not self._is_guarding():
            if name == "disable_forward_pre_hook":
                self._param_sync = self._config.param_sync_func
            return original(*args, **named)
        original = self._saves.around(name, original)
        if self._session.is_inside:
            self._is_saving = self._is_saving or name == "save_checkpoint"
            return self._session.guard(name, lambda: original(*args, **named))
        if name == "enable_forward_pre_hook" and all(map(is_hooked, self._model)):
            return None
        self._calls_behind[name] += 1
        put_back = self._snapshot(self._position.calculated_for)
        which = (name, self._calls_behind[name])
        call = BetweenSteps(self._session, self._training, self._position, self._rows, which, put_back)
        result = call.make(original, *args, **named)
        self._is_saving = self._is_saving or name == "save_checkpoint" or self._saves.take_news()
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
        self._rows.settle()
        if self._session.has_entered:
            self._session.finish(self._framework.state_sha256())

    def give_up(self) -> None:
        """``pretrain`` has failed, and this process ends."""
        self._saves.give_up()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _is_guarding(self) -> bool:
        return self._session.has_entered

    def _snapshot(self, calculated_for: int) -> Callable[[], None]:
        """What puts back what the loop has in its hands now."""
        hands = (self._args, self._training.get_timers(), self._model, self._config, self._data.tapes)
        state = LoopState.take(*hands, calculated_for)
        return lambda: state.put_back(*hands)

    def _switch_hooks_on(self) -> None:
        for chunk in self._model:
            hook(chunk, True)
        self._config.param_sync_func = self._param_sync

    def _note_checkpoint(self) -> None:
        """Whatever way it was saved in: only the marker says that it is complete."""
        if self._is_saving:
            self._is_saving = False
            newest = newest_saved(self._args.save)
            if newest > self._checkpoint:
                self._checkpoint = newest
                self._session.checkpoint_written(newest)


def _everyone_trains(model: list[Any]) -> bool:
    trains = any(parameter.requires_grad for chunk in model for parameter in chunk.parameters())
    told = torch.tensor([int(trains)], dtype=torch.int32, device=torch.cuda.current_device())
    group = parallel_state.get_model_parallel_group()
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(told.item())
