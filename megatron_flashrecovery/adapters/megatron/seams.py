"""Where megatron-core is cut open: the moments of a step, the gate before its update, and the update itself.

Only attributes of instances are replaced, so nothing changes for a model that is not protected. ``SeamChanged`` says
which one an installed version lacks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import megatron.core
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config

from megatron_flashrecovery.adapters.megatron.model_state import bucket_groups
from megatron_flashrecovery.adapters.megatron.optimizer_state import inner_optimizers
from megatron_flashrecovery.adapters.megatron.partial_step import PartialStep
from megatron_flashrecovery.adapters.megatron.session_seam import StepSeams
from megatron_flashrecovery.adapters.megatron.step_numbers import StepNumbers
from megatron_flashrecovery.core.errors import ConfigError, SeamChanged
from megatron_flashrecovery.runtime.moment import Moment

_TESTED = "0.16."
_BUCKET_GROUP_FIELDS = (
    "param_gather_handle",
    "param_gather_dispatched",
    "grad_reduce_handle",
)


def check_version() -> None:
    version = megatron.core.__version__
    if not version.startswith(_TESTED):
        warnings.warn(f"megatron-core {version}: recovery is tested with {_TESTED}x", stacklevel=2)


def install_seams(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    session: StepSeams,
    partial_step: PartialStep,
) -> StepNumbers:
    """Once per model, after the schedule's functions are set on its config and before the first step."""
    config = get_model_config(model[0])
    if config.finalize_model_grads_func is None:
        raise ConfigError("set config.finalize_model_grads_func before flash.protect: gradients are reduced in it")
    for chunk in model:
        _check_bucket_groups(chunk)
        _mark_middle(chunk, session)
    numbers = partial_step.numbers = StepNumbers(model, optimizer, session)
    numbers.take_over_checks()
    _before(config, "finalize_model_grads_func", numbers.before_reduction)
    _before(config, "finalize_model_grads_func", lambda: session.mark(Moment.GRAD_SYNC, _a_gradient(model)))
    if config.no_sync_func is not None:
        config.no_sync_func = partial_step.no_sync.tracked(config.no_sync_func)
    _surround_preparation(optimizer, session, numbers)
    for name in ("get_grad_norm", "clip_grad_norm"):
        _with_result(optimizer, name, numbers.note_norm)
    _surround_updates(inner_optimizers(optimizer), session, numbers)
    return numbers


def _surround_preparation(optimizer: MegatronOptimizer, session: StepSeams, numbers: StepNumbers) -> None:
    """The gate stands ahead of it, because it must not run twice on the same gradients: it unscales them in place. A
    step whose update is left out is for upstream one whose gradients have overflowed."""
    original = _function(optimizer, "prepare_grads")

    def prepare_grads(*args: Any, **named: Any) -> bool:
        numbers.note_objection(session.gate(numbers.objects))
        if session.refusal.skips_update:
            numbers.end()
            return True
        has_overflowed = bool(original(*args, **named))
        numbers.judge_overflow(has_overflowed)
        return has_overflowed

    optimizer.prepare_grads = prepare_grads


def _a_gradient(model: Sequence[DistributedDataParallel]) -> torch.Tensor | None:
    gradients = (getattr(parameter, "main_grad", None) for chunk in model for parameter in chunk.module.parameters())
    return next((gradient for gradient in gradients if gradient is not None), None)


def _check_bucket_groups(chunk: DistributedDataParallel) -> None:
    for group in bucket_groups(chunk):
        for field in _BUCKET_GROUP_FIELDS:
            if not hasattr(group, field):
                raise SeamChanged(f"megatron-core {megatron.core.__version__}: a bucket group has no {field}")


def _mark_middle(chunk: DistributedDataParallel, session: StepSeams) -> None:
    """FORWARD before the layer in the middle, BACKWARD after it and before the layers ahead of it."""

    def on_backward(gradient: torch.Tensor) -> None:
        session.mark(Moment.BACKWARD, gradient)

    def on_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        arguments = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        differentiable = next((each for each in arguments if each.requires_grad), None)
        session.mark(Moment.FORWARD, differentiable)
        if differentiable is not None:
            differentiable.register_hook(on_backward)

    _middle_layer(chunk).register_forward_pre_hook(on_forward, with_kwargs=True)


def _middle_layer(chunk: DistributedDataParallel) -> torch.nn.Module:
    lists = [module for module in chunk.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if lists:
        return lists[0][len(lists[0]) // 2]
    return chunk.module


def _surround_updates(inner: Sequence[Any], session: StepSeams, numbers: StepNumbers) -> None:
    """The update begins with the first inner optimizer's first write. It is applied when the last one is done and its
    masters are copied to the parameters, and before these are gathered."""
    for index, optimizer in enumerate(inner):
        if index == 0:
            _before(optimizer.optimizer, "step", session.before_update)
            _before(optimizer.optimizer, "step", numbers.judge)
        _after(optimizer.optimizer, "step", lambda: session.mark(Moment.OPTIMIZER))
    if inner:
        has_masters = hasattr(inner[-1], "_copy_main_params_to_model_params")
        owner, name = (inner[-1], "_copy_main_params_to_model_params") if has_masters else (inner[-1].optimizer, "step")
        _after(owner, name, session.after_update)


def _before(owner: Any, name: str, call: Callable[[], None]) -> None:
    original = _function(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        call()
        return original(*args, **kwargs)

    setattr(owner, name, called)


def _after(owner: Any, name: str, call: Callable[[], None]) -> None:
    original = _function(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        call()
        return result

    setattr(owner, name, called)


def _with_result(owner: Any, name: str, note: Callable[[Any], None]) -> None:
    original = _function(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        note(result)
        return result

    setattr(owner, name, called)


def _function(owner: Any, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(owner, name, None)
    if function is None:
        raise SeamChanged(f"megatron-core {megatron.core.__version__}: {type(owner).__name__} has no {name}")
    return function
