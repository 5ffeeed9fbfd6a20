"""Whether the numbers of a step are finite, asked before its update.

What is asked is what the step reads anyway: the gradient norm, which is no number for everybody if one gradient of
anybody is none, or the overflow flag of a loss scaler. Where there is neither, for gradients are not clipped, the gate
asks. A loss can be no number although all gradients are: whoever has it spoils its own gradients, which are of no more
use, so that the norm tells the others. Upstream's own checks of losses and of gradients before their reduction end one
rank in the middle of a step, and wait for the device at each: here the same results are kept on the device, and looked
at only when something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_flashrecovery.adapters.megatron.examination import Examination
from megatron_flashrecovery.adapters.megatron.model_state import bucket_groups
from megatron_flashrecovery.adapters.megatron.optimizer_state import inner_optimizers
from megatron_flashrecovery.adapters.megatron.session_seam import StepSeams

_STATISTICS = "report_determinism_stats"
_OBJECTION = "a loss or a gradient is not finite"
_OVERFLOW = "gradients overflow although the loss scale is constant"
_LOSS = "the loss is not finite"


class StepNumbers:
    """One per model, on the main thread. ``begin`` and ``end`` surround forward and backward of each step."""

    def __init__(
        self, model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, session: StepSeams
    ) -> None:
        self._model = list(model)
        self._session = session
        inner = inner_optimizers(optimizer)
        self._scales_dynamically = any(isinstance(getattr(o, "grad_scaler", None), DynamicGradScaler) for o in inner)
        # A dynamic scale makes upstream leave its own checks out, and so can the user.
        asks = any(chunk.ddp_config.check_for_nan_in_grad for chunk in self._model)
        self._judges_losses = asks or self._scales_dynamically
        self.has_norm = isinstance(optimizer, ChainedOptimizer) or optimizer.config.clip_grad > 0.0
        self._norm: float | None = None
        self._objects = False
        self._loss_flag: torch.Tensor | None = None
        self._own: list[tuple[str, torch.Tensor]] = []
        self._is_inside = False
        self._examination: Examination | None = None

    # --- what is seen on the way --------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.end()
        self._norm, self._objects, self._is_inside = None, False, True
        self._own.clear()
        if self._loss_flag is not None:
            self._loss_flag.zero_()
        if self._session.refusal.examines:
            self._examination = Examination(self._model)

    def end(self) -> None:
        self._is_inside = False
        if self._examination is not None:
            self._examination.end()
            self._examination = None

    def before_reduction(self) -> None:
        if self._examination is not None:
            self._examination.look_at_gradients()

    def note_norm(self, norm: Any) -> None:
        self._norm = None if norm is None else float(norm)

    def watch_losses(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it returns are losses by name, of each micro batch, on the last stage."""

        def watched(*args: Any, **named: Any) -> Any:
            losses = forward_backward(*args, **named)
            found = []
            for of_batch in losses or ():
                # Behind the first there may be measures of any kind.
                value = next(iter(of_batch.values()), None) if isinstance(of_batch, dict) else of_batch
                found += [value.detach()] if isinstance(value, torch.Tensor) else []
            if found and self._judges_losses:
                self._own += [("loss", value) for value in found]
                self._raise_flag(torch.stack([value.float().sum() for value in found]))
            return losses

        return watched

    def take_over_checks(self) -> None:
        """Of upstream, which asks of each loss and of each bucket's gradients whether they are finite."""
        if not self._judges_losses and rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE is None:
            return
        machine = rerun_state_machine.get_rerun_state_machine()
        original = machine.validate_result

        def validate_result(result: Any, rejection_func: Any, message: str = "", *rest: Any, **named: Any) -> None:
            is_ours = rejection_func in (torch.isnan, torch.isinf) and isinstance(result, torch.Tensor)
            if not self._is_inside or not is_ours or machine.mode.value == _STATISTICS:
                original(result, rejection_func, message, *rest, **named)
            elif rejection_func is torch.isnan:
                self._own.append(("loss" if "loss" in message else "gradient", result.detach()))

        machine.validate_result = validate_result

    # --- what is decided ----------------------------------------------------------------------------------------------

    def objects(self) -> bool:
        """Asked at the gate, which has waited for the device: of losses, and of gradients that will have no norm."""
        if not self._is_inside:
            return False
        return bool(self._loss_flag) or (not self.has_norm and self._gradients_are_bad())

    def _gradients_are_bad(self) -> bool:
        norms = [bucket.grad_data.norm() for c in self._model for group in bucket_groups(c) for bucket in group.buckets]
        return bool(norms) and not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())

    def note_objection(self, objects: bool) -> None:
        """Of anybody who could be asked. By the norm all others learn of it."""
        self._objects, self._is_inside = objects, False
        if objects:
            for chunk in self._model:
                for group in bucket_groups(chunk):
                    for bucket in group.buckets:
                        bucket.grad_data.fill_(float("nan"))

    def judge_overflow(self, has_overflowed: bool) -> None:
        """A scaler has looked at the gradients. Overflows are how a dynamic one finds its scale, but not of losses."""
        if has_overflowed and not self._scales_dynamically:
            self._refuse(_OVERFLOW)
        elif has_overflowed and (own := self._own_bad()) == "loss":
            self._refuse(_LOSS, own)
        elif has_overflowed:
            self.end()

    def judge(self) -> None:
        """Right before the first write."""
        if self._objects:
            self._refuse(_LOSS if bool(self._loss_flag) else _OBJECTION)
        elif self._norm is not None and not math.isfinite(self._norm):
            self._refuse(f"the gradient norm is {self._norm}")
        self.end()

    def _raise_flag(self, losses: torch.Tensor) -> None:
        """In memory of the host, without waiting for the device: the gate does that before it is looked at."""
        if self._loss_flag is None:
            self._loss_flag = torch.zeros(1, dtype=torch.int32, pin_memory=losses.is_cuda)
        self._loss_flag.copy_((~torch.isfinite(losses).all()).int().view(1), non_blocking=True)

    def _refuse(self, what: str, own: str | None = None) -> None:
        finding = self._examination.finding if self._examination else None
        self._session.refusal.refuse(what, self._own_bad() if own is None else own, finding)

    def _own_bad(self) -> str:
        """Which of this rank's own numbers were not finite before they were reduced."""
        bad = [kind for kind, value in self._own if not bool(torch.isfinite(value).all())]
        return "" if not bad else "loss" if "loss" in bad else "gradient"
