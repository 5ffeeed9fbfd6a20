"""One call of upstream's loop between two steps: made once, and again by all if a recovery goes back before it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from megatron_flashrecovery.adapters.megatron_lm.loop_position import LoopPosition
from megatron_flashrecovery.adapters.megatron_lm.loop_state import copy_of_sums
from megatron_flashrecovery.adapters.megatron_lm.session_seam import LoopSession
from megatron_flashrecovery.adapters.megatron_lm.told_once import BOARD, PRINT, WANDB, ToldOnce, replaced
from megatron_flashrecovery.adapters.megatron_lm.wandb_rows import NOTED, WandbRows

LOG, EVALUATE, EXIT = "training_log", "evaluate_and_print_results", "checkpoint_and_decide_exit"
REPORTS = frozenset({LOG, EVALUATE})
_TOTAL_LOSSES = 1
"""Place of the loop's sums among the arguments of ``training_log``."""
_FLOPS = 4
"""Place of the operations so far among those of ``checkpoint_and_decide_exit``."""


class BetweenSteps:
    """``call`` is the name of the function, and which of the calls of this name behind the same step it is.
    ``put_back`` gives the loop what it had in its hands right before this call."""

    def __init__(
        self,
        session: LoopSession,
        training: ModuleType,
        position: LoopPosition,
        rows: WandbRows,
        call: tuple[str, int],
        put_back: Callable[[], None],
    ) -> None:
        self._session = session
        self._training = training
        self._position = position
        self._rows = rows
        self._name, occurrence = call
        self._key = f"{self._name}#{occurrence}"
        self._put_back = put_back
        self._step = position.step
        self._is_told = self._step <= session.reported.get(self._key, 0)
        self._is_in_wandb = self._step <= session.reported.get(NOTED + self._key, 0)
        self._delivered: bool | None = None
        self._told = ToldOnce(training)

    def make(self, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if self._name == LOG:
            self._position.adopt(args[_TOTAL_LOSSES])
            if "is_first_iteration" in named:
                # Of the job, not of this process: behind a first iteration upstream meets all others to log it.
                named["is_first_iteration"] = self._step == self._position.started_at + 1
        sums = copy_of_sums(self._position.total_losses) if self._name == LOG else {}

        def first() -> Any:
            if self._name == EXIT:
                self._position.flops = args[_FLOPS]
            if self._name in REPORTS:
                self._rows.watch()
            with self._telling() if self._name in REPORTS else nullcontext():
                result = original(*args, **named)
            self._is_told = self._is_in_wandb = True
            return self._agreed(result) if self._name == EXIT else result

        def again() -> Any:
            self._put_back()
            if self._name == LOG:
                self._position.total_losses.clear()
                self._position.total_losses.update(copy_of_sums(sums))
            return first()

        result = self._session.guard(self._name, first, again)
        self._delivered = result if self._name == EXIT else None
        if self._name in REPORTS and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._flush_board()
            self._session.note_reported(self._key, self._step)
            self._rows.reported(self._key, self._step)
        return result

    def _flush_board(self) -> None:
        """A replacement does not write again what is noted, so it must not die with this process. Upstream flushes at
        the end only; TensorBoard keeps it for up to two minutes wherever files cannot be appended to."""
        writer = self._training.get_tensorboard_writer()
        if writer is not None:
            writer.flush()

    def _agreed(self, leaves: bool) -> bool:
        """Whether to leave is asked again after a recovery, and by then the time may be up. Whoever was told to stay
        has gone on, so then everybody stays: the question comes again behind the next step."""
        resumed = self._session.last_resume
        if resumed is None or not resumed <= self._step <= resumed + 1:
            return leaves
        mine = leaves if self._delivered is None else self._delivered
        told = torch.tensor([int(mine)], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN)
        return bool(told.item())

    def _telling(self) -> AbstractContextManager[None]:
        """What has been told is not told again. Where only W&B has lost it, upstream must find a board to write it."""
        if not self._is_told:
            return self._told.telling()
        mute: dict[str, Callable[..., Any]] = {PRINT: _nothing, BOARD: _nothing, WANDB: _nothing}
        if not self._is_in_wandb:
            del mute[WANDB]
            mute[BOARD] = _Deaf
        return replaced(self._training, mute)


class _Deaf:
    """A board that nothing comes to be written on."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_args: Any, **_named: Any) -> None:
    """In place of a function that prints, or that gives something to write with."""
