"""What a step leaves behind when it is cut short, and how to get rid of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import rerun_state_machine
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_attr_wrapped_model, unwrap_model

from megatron_flashrecovery.adapters.megatron import aux_losses, fp8_state
from megatron_flashrecovery.adapters.megatron.model_state import bucket_groups
from megatron_flashrecovery.adapters.megatron.no_sync import NoSync
from megatron_flashrecovery.adapters.megatron.step_numbers import StepNumbers

_RERUN_FIELDS = (
    "state",
    "current_iteration",
    "first_iteration_complete",
    "rerun_requested",
    "checkpoint_requested",
    "restart_again_requested",
    "continue_requested",
)


class PartialStep:
    """Gradients, outstanding handles, timers and the rerun machine, as they were before the step began."""

    def __init__(self, model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._model = list(model)
        self._optimizer = optimizer
        self._config = model[0].config
        self.no_sync = NoSync()
        self._timers_running: set[str] = set()
        self._aux_losses: Any = aux_losses.NOTHING
        self._rerun: dict[str, Any] = {}
        self.numbers: StepNumbers | None = None
        """What watches the numbers of each step, as soon as the seams are installed."""

    def begin(self) -> None:
        if self.numbers is not None:
            self.numbers.begin()
        self._timers_running = {name for name, timer in self._timers() if timer._started}
        self._aux_losses = aux_losses.capture()
        machine = _rerun_machine()
        self._rerun = {field: getattr(machine, field) for field in _RERUN_FIELDS} if machine else {}

    def discard(self) -> None:
        if self.numbers is not None:
            self.numbers.end()
        self.no_sync.leave()
        for chunk in self._model:
            _forget_communication(chunk)
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                parameter.grad = None
            get_attr_wrapped_model(chunk, "set_input_tensor")([None])
            _forget_deferred_gradients(chunk)
            # An evaluation that was cut short has left these.
            chunk.train()
            if chunk.use_forward_hook and not chunk.remove_forward_pre_hook_handles:
                chunk.enable_forward_pre_hook()
        self._optimizer.zero_grad()
        aux_losses.restore(self._aux_losses)
        fp8_state.forget_recomputation()
        for name, timer in self._timers():
            if timer._started and name not in self._timers_running:
                timer._started = False
        machine = _rerun_machine()
        for field, value in self._rerun.items():
            setattr(machine, field, value)

    def _timers(self) -> list[tuple[str, Any]]:
        timers = self._config.timers
        return [] if timers is None else list(timers._timers.items())


def _forget_communication(chunk: DistributedDataParallel) -> None:
    """The groups behind these handles are severed or kept empty: nobody waits for them any more."""
    for group in bucket_groups(chunk):
        group.param_gather_handle = None
        group.param_gather_dispatched = False
        group.grad_reduce_handle = None
        # Else the reset that comes next takes what an incomplete first step has counted for complete.
        if hasattr(group, "per_param_grad_ready_counts"):
            group.per_param_grad_ready_counts = {}


def _forget_deferred_gradients(chunk: DistributedDataParallel) -> None:
    """``--defer-embedding-wgrad-compute``: activations and gradients that are to be paired behind the last backward, by
    their order. The next step clears the activations only (``megatron/core/pipeline_parallel/schedules.py``)."""
    for name in ("embedding_activation_buffer", "grad_output_buffer"):
        kept = getattr(unwrap_model(chunk), name, None)
        if isinstance(kept, list):
            kept.clear()


def _rerun_machine() -> Any:
    """Only where there is one: asking for it through megatron-core would make it."""
    return rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
