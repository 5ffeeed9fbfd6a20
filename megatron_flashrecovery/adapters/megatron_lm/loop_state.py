"""What Megatron-LM's training loop has in its hands: counters in its arguments, running timers, hooks, sums of losses.

Taken right before a call that a recovery may have to repeat, and put back before the repetition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.num_microbatches_calculator import update_num_microbatches

from megatron_flashrecovery.adapters.megatron import aux_losses
from megatron_flashrecovery.adapters.megatron_lm.tape import Tape

COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples", "curr_iteration")


@dataclass(frozen=True)
class LoopState:
    """``calculated_for`` is the number of samples for which the number of micro batches was last set."""

    counters: Mapping[str, int]
    calculated_for: int
    running: Mapping[str, float]
    timers: Any
    rerun_mode: Any
    hooked: tuple[bool, ...]
    param_sync: Any
    positions: tuple[int, ...]
    aux_losses: Any

    @staticmethod
    def take(
        args: Any, timers: Any, model: list[Any], config: Any, tapes: list[Tape], calculated_for: int
    ) -> LoopState:
        return LoopState(
            counters={name: getattr(args, name) for name in COUNTERS if hasattr(args, name)},
            calculated_for=calculated_for,
            timers=config.timers,
            rerun_mode=getattr(_rerun_machine(), "mode", None),
            running={name: timer._start_time for name, timer in timers._timers.items() if timer._started},
            hooked=tuple(is_hooked(chunk) for chunk in model),
            param_sync=config.param_sync_func,
            positions=tuple(tape.position for tape in tapes),
            aux_losses=aux_losses.capture(),
        )

    def put_back(self, args: Any, timers: Any, model: list[Any], config: Any, tapes: list[Tape]) -> None:
        for name, count in self.counters.items():
            setattr(args, name, count)
        update_num_microbatches(self.calculated_for, consistency_check=False)
        for name, timer in timers._timers.items():
            timer._started = name in self.running
            timer._start_time = self.running.get(name, timer._start_time)
        for chunk, hooked in zip(model, self.hooked, strict=True):
            hook(chunk, hooked)
        config.param_sync_func = self.param_sync
        aux_losses.restore(self.aux_losses)
        # An evaluation that is cut short has taken both away.
        config.timers = self.timers
        if self.rerun_mode is not None:
            _rerun_machine().mode = self.rerun_mode
        for tape, position in zip(tapes, self.positions, strict=True):
            tape.wind_back(position)


def _rerun_machine() -> Any:
    return rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE


def is_hooked(chunk: Any) -> bool:
    return bool(getattr(chunk, "remove_forward_pre_hook_handles", None))


def hook(chunk: Any, wanted: bool) -> None:
    if is_hooked(chunk) == wanted:
        return
    if wanted:
        chunk.enable_forward_pre_hook()
    else:
        chunk.disable_forward_pre_hook(param_sync=False)


def copy_of_sums(total: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``total_loss_dict``, which is a local variable of the loop."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in total.items()}
