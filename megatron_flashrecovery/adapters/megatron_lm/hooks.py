"""Put our wrappers in place of functions of Megatron-LM's modules as soon as these are imported.

Nothing of upstream's is imported here by ourselves, so ``install`` may come before a script has set its path, and costs
a script that is not Megatron-LM nothing. What is replaced are names in the modules ``megatron.training.arguments`` and
``megatron.training.training``, in which upstream's own functions look each other up at every call.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from megatron_flashrecovery.adapters.megatron_lm.arguments import add_arguments, check
from megatron_flashrecovery.adapters.megatron_lm.checkpoint import use_newest
from megatron_flashrecovery.adapters.megatron_lm.help_of_arguments import read_help, remember_help
from megatron_flashrecovery.adapters.megatron_lm.wandb_rows import use_one_run
from megatron_flashrecovery.core.errors import SeamChanged
from megatron_flashrecovery.runtime.seat import taken_seat
from megatron_flashrecovery.runtime.session import Session

if TYPE_CHECKING:
    from megatron_flashrecovery.adapters.megatron_lm.loop import Loop

GUARDED = (
    "training_log",
    "evaluate_and_print_results",
    "save_checkpoint_and_time",
    "save_checkpoint",
    "checkpoint_and_decide_exit",
    "post_training_step_callbacks",
    "calc_params_l2_norm",
    "disable_forward_pre_hook",
    "enable_forward_pre_hook",
    "maybe_finalize_async_save",
    "print_datetime",
)
WRAPPED = {
    "load_checkpoint": "load_checkpoint",
    "build_pretraining_data_loader": "build_loader",
    "build_train_valid_test_data_iterators": "build_iterators",
    "train": "train",
    "train_step": "train_step",
    "update_num_microbatches": "calculate",
    "logical_and_across_model_parallel_group": "agree",
    "reduce_max_stat_across_model_parallel_group": "agree",
}
"""Name in upstream's module -> method of ``Loop`` that is called with the original function first."""

_installed = False
_session: Session | None = None
_loop: Loop | None = None


def install() -> Callable[[], None]:
    """Once per process, before the script is loaded. Returns what may be done once for all workers when it has been."""
    global _installed
    _installed = True
    wrapt.register_post_import_hook(remember_help, "megatron.training.argument_utils")
    wrapt.register_post_import_hook(_hook_arguments, "megatron.training.arguments")
    wrapt.register_post_import_hook(_hook_training, "megatron.training.training")
    wrapt.register_post_import_hook(_hook_timers, "megatron.core.timers")
    return read_help


def require_launcher() -> None:
    """A patched checkout knows the flag under any launcher. Ends a process that `flashrecovery run` did not start."""
    if not _installed:
        taken_seat()


def _hook_arguments(module: ModuleType) -> None:
    add, validate = _function(module, "add_megatron_arguments"), _function(module, "validate_args")

    @functools.wraps(add)
    def add_with_ours(parser: Any) -> Any:
        return add_arguments(add(parser))

    @functools.wraps(validate)
    def validate_and_begin(args: Any, *rest: Any, **named: Any) -> Any:
        validated = validate(args, *rest, **named)
        if args.enable_flash_recovery:
            _begin(args)
        return validated

    module.add_megatron_arguments = add_with_ours  # type: ignore[attr-defined]
    module.validate_args = validate_and_begin  # type: ignore[attr-defined]


def _begin(args: Any) -> None:
    """The arguments are known, and no group exists: every group that is made from here on is a handle."""
    global _session
    if _session is None:
        check(args)
        _session = Session.from_environment()
        _session.install_groups()
        if _session.must_load:
            use_newest(args)
        seat, _channel = taken_seat()
        if getattr(args, "wandb_project", "") and seat.rank == seat.world_size - 1:
            use_one_run(seat.token, os.environ)


def _hook_training(module: ModuleType) -> None:
    _loop_type()  # once in the fork server, instead of once in each worker
    _wrap_pretrain(module)
    for name, method in WRAPPED.items():
        _wrap(module, name, operator.attrgetter(method))
    for name in GUARDED:
        _wrap(module, name, functools.partial(_guard, name))


def _hook_timers(module: ModuleType) -> None:
    """A timer may meet all other ranks before it starts or stops; the rest of it must not be done twice."""
    for name in ("start", "stop"):
        original = getattr(module.Timer, name)

        def wrapped(timer: Any, barrier: bool = False, original: Any = original) -> Any:
            if barrier and _loop is not None:
                _loop.barrier_of_timer(timer)
                barrier = False
            return original(timer, barrier=barrier)

        setattr(module.Timer, name, functools.wraps(original)(wrapped))


def _guard(name: str, loop: Loop) -> Callable[..., Any]:
    return functools.partial(loop.guarded, name)


def _wrap(module: ModuleType, name: str, method_of: Callable[[Loop], Callable[..., Any]]) -> None:
    """The method is called with the original function first."""
    original = _function(module, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **named: Any) -> Any:
        loop = _the_loop(module)
        return original(*args, **named) if loop is None else method_of(loop)(original, *args, **named)

    setattr(module, name, wrapped)


def _wrap_pretrain(module: ModuleType) -> None:
    """In it the arguments become known, so only at its end there is a loop. Upstream also leaves by ``sys.exit``, which
    is an end like any other if all ranks come to it."""
    original = _function(module, "pretrain")

    @functools.wraps(original)
    def wrapped(*args: Any, **named: Any) -> Any:
        try:
            result = original(*args, **named)
        except SystemExit as leaving:
            if _loop is not None and leaving.code in (None, 0):
                _loop.finish()
            raise
        except BaseException:
            if _loop is not None:
                _loop.give_up()
            raise
        if _loop is not None:
            _loop.finish()
        return result

    module.pretrain = wrapped  # type: ignore[attr-defined]


def _the_loop(module: ModuleType) -> Loop | None:
    """There is one as soon as the arguments ask for it."""
    global _loop
    if _loop is None and _session is not None:
        _loop = _loop_type()(_session, module, module.get_args())
    return _loop


def _loop_type() -> type[Loop]:
    """Its modules import upstream's, which must not happen before the script does it."""
    from megatron_flashrecovery.adapters.megatron_lm.loop import Loop

    return Loop


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise SeamChanged(f"{module.__name__} has no {name}: `flashrecovery patch check` says what has moved")
    return function
