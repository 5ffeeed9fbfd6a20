"""Where Megatron-LM's loop is, as the framework asks for it: see ``adapters.megatron.position.Position``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.num_microbatches_calculator import update_num_microbatches

from megatron_flashrecovery.adapters.megatron_lm.data import Data
from megatron_flashrecovery.adapters.megatron_lm.loop_state import COUNTERS, copy_of_sums
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.state.pieces import Value


class LoopPosition:
    """A replacement begins its loop one step early, and makes what follows that step together with the others. So what
    is captured with a step are the counters that the loop had *before* it."""

    def __init__(self, args: Any, data: Data, first_step: Step) -> None:
        self.step = first_step
        self.calculated_for = int(args.consumed_train_samples)
        self.iteration = int(first_step)
        """At which the loop of a replacement begins."""
        self.total_losses: dict[str, Any] = {}
        """The loop's own sums, from the first time on that it shows them."""
        self.flops = args.num_floating_point_operations_so_far
        self._args = args
        self._data = data
        self._before = self._counters()
        self.started_at = first_step
        """By the job, and not by this process."""
        self.was_hooked = False
        """Whether the hooks that gather parameters were on when the newest step was complete."""
        self._captured_losses: dict[str, Any] = {}
        self._positions: dict[Step, list[int]] = {}

    def begin_step(self) -> None:
        self.calculated_for = int(self._args.consumed_train_samples)
        self._before = self._counters()
        self._data.forget_reruns()
        self._positions.setdefault(self.step, [tape.position for tape in self._data.tapes])

    def end_step(self) -> None:
        self.iteration = int(self.step)
        self.step = Step(self.step + 1)
        # What follows the step draws from here on, and may have to draw it again.
        self._positions[self.step] = [tape.position for tape in self._data.tapes]

    def capture(self) -> Value:
        machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
        return {
            "step": int(self.step),
            "iteration": self.iteration,
            "counters": dict(self._before),
            "calculated_for": self.calculated_for,
            "losses": [[name, value] for name, value in copy_of_sums(self.total_losses).items()],  # in their order
            "flops": self.flops,
            "started_at": int(self.started_at),
            "hooked": self.was_hooked,
            "rerun_iteration": None if machine is None else int(machine.current_iteration),
        }

    def restore(self, captured: Any) -> None:
        self.step, self.iteration = Step(captured["step"]), captured["iteration"]
        self.calculated_for = captured["calculated_for"]
        self._before = captured["counters"]
        self.flops = captured["flops"]
        self.started_at, self.was_hooked = Step(captured["started_at"]), captured["hooked"]
        self._captured_losses = dict(captured["losses"])
        update_num_microbatches(self.calculated_for, consistency_check=False)
        machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
        if machine is not None and captured["rerun_iteration"] is not None:
            machine.current_iteration = captured["rerun_iteration"]

    def begin_loop(self) -> None:
        """On a replacement, before its loop: the counters with which the loop goes into the step that is over."""
        self._args.iteration = self.iteration
        self._args.num_floating_point_operations_so_far = self.flops
        for name, count in self._before.items():
            setattr(self._args, name, count)

    def adopt(self, total_losses: dict[str, Any]) -> None:
        """The loop shows its sums. Those of a replacement are empty: it goes on with its predecessor's."""
        if self.total_losses is not total_losses:
            self.total_losses = total_losses
            total_losses.update(self._on_device(self._captured_losses))

    def forget_before(self, step: Step) -> None:
        for old in [each for each in self._positions if each < step]:
            del self._positions[old]
        if self._positions:
            oldest = self._positions[min(self._positions)]
            for tape, position in zip(self._data.tapes, oldest, strict=True):
                tape.forget_before(position)

    def _counters(self) -> Mapping[str, int]:
        return {name: int(getattr(self._args, name)) for name in COUNTERS if hasattr(self._args, name)}

    @staticmethod
    def _on_device(losses: dict[str, Any]) -> dict[str, Any]:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) and device is not None else value
            for name, value in losses.items()
        }
