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
) -> None:
    """Once per model, after the schedule's functions are set on its config and before the first step."""
    config = get_model_config(model[0])
    if config.finalize_model_grads_func is None:
        raise ConfigError("set config.finalize_model_grads_func before flash.protect: gradients are reduced in it")
    for chunk in model:
        _check_bucket_groups(chunk)
        _mark_middle(chunk, session)
    _before(config, "finalize_model_grads_func", lambda: session.mark(Moment.GRAD_SYNC))
    if config.no_sync_func is not None:
        config.no_sync_func = partial_step.no_sync.tracked(config.no_sync_func)
    # Ahead of prepare_grads, which must not run twice on the same gradients: it unscales them in place.
    _before(optimizer, "prepare_grads", session.gate)
    _surround_updates(inner_optimizers(optimizer), session)


def _check_bucket_groups(chunk: DistributedDataParallel) -> None:
    for group in bucket_groups(chunk):
        for field in _BUCKET_GROUP_FIELDS:
            if not hasattr(group, field):
                raise SeamChanged(f"megatron-core {megatron.core.__version__}: a bucket group has no {field}")


def _mark_middle(chunk: DistributedDataParallel, session: StepSeams) -> None:
    """FORWARD before the layer in the middle, BACKWARD after it and before the layers ahead of it."""

    def on_backward(gradient: torch.Tensor) -> None:
        session.mark(Moment.BACKWARD)

    def on_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        session.mark(Moment.FORWARD)
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.Tensor) and argument.requires_grad:
                argument.register_hook(on_backward)
                return

    _middle_layer(chunk).register_forward_pre_hook(on_forward, with_kwargs=True)


def _middle_layer(chunk: DistributedDataParallel) -> torch.nn.Module:
    lists = [module for module in chunk.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if lists:
        return lists[0][len(lists[0]) // 2]
    return chunk.module


def _surround_updates(inner: Sequence[Any], session: StepSeams) -> None:
    """The update begins with the first inner optimizer's first write. It is applied when the last one is done and its
    masters are copied to the parameters, and before these are gathered."""
    for index, optimizer in enumerate(inner):
        if index == 0:
            _before(optimizer.optimizer, "step", session.before_update)
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


def _function(owner: Any, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(owner, name, None)
    if function is None:
        raise SeamChanged(f"megatron-core {megatron.core.__version__}: {type(owner).__name__} has no {name}")
    return function
