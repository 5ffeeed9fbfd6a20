"""Let megatron-core run on CPU tensors where there is no GPU: a stand-in for the parts of ``torch.cuda`` that it uses.

megatron-core names the CUDA device in hundreds of places and offers no other. ``install`` must run before it is
imported, because it binds functions of ``torch.cuda`` by name. It pretends no more than training needs:
``torch.cuda.is_available()`` and ``Tensor.is_cuda`` stay false, so whoever asks is told the truth. Where a CUDA device
exists it does nothing.

What differs from a device: one CPU generator is the device generator too (megatron-core's tracker warns that the CPU
state changed, which is silenced), and streams do nothing, because an operation is over when it returns; the current
one can be told to hang, and then whoever waits for the device is blocked (see ``cpu_streams``).
"""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_flashrecovery.testing.cpu_streams import CpuEvent, CpuStream, current_stream, no_stream_context
from megatron_flashrecovery.testing.cpu_tensors import on_cpu, patched_tensor_methods, wrapped_factories

_MEMORY = 16 << 30
_undo: list[Callable[[], None]] = []


def is_needed() -> bool:
    """Whether this machine has no CUDA device, so that megatron-core can run on CPU tensors only."""
    return not torch.cuda.is_available()


def device_error(code: int, words: str = "an illegal memory access was encountered") -> RuntimeError:
    """What torch raises where a call to the CUDA runtime has failed with this number."""
    error = torch.AcceleratorError(f"CUDA error: {words}")
    error.error_code = code  # type: ignore[attr-defined]  # missing in torch's stub
    return error


def is_installed() -> bool:
    return bool(_undo)


def install() -> None:
    """Put the stand-in in place, once per process; a second call changes nothing, and neither does one beside a GPU."""
    if is_installed() or not is_needed():
        return
    _switch_off_dynamo()
    for name, replacement in _cuda_functions().items():
        _patch(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        _patch(torch.cuda.random, name, getattr(torch.cuda, name))
    for name, factory in wrapped_factories().items():
        _patch(torch, name, factory)
    for name, method in patched_tensor_methods().items():
        _patch(torch.Tensor, name, method)
    _patch(torch.nn.Module, "cuda", lambda module, device=None: module)
    _silence_shared_generator_warning()


def uninstall() -> None:
    """Give torch back as it was. megatron-core modules imported meanwhile keep what they bound: they are of no use."""
    while _undo:
        _undo.pop()()


def _cuda_functions() -> dict[str, object]:
    return {
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: current_stream().synchronize(),
        "empty_cache": lambda: None,
        "Stream": CpuStream,
        "Event": CpuEvent,
        "current_stream": current_stream,
        "default_stream": current_stream,
        "set_stream": lambda stream: None,
        "stream": no_stream_context,
        "device": no_stream_context,
        "_lazy_call": lambda function, **_options: function(),
        "_lazy_init": lambda: None,
        "default_generators": (torch.default_generator,),
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "memory_stats": lambda device=None: defaultdict(int),
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=_MEMORY
        ),
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "cpu",
        "is_current_stream_capturing": lambda: False,
        "ipc_collect": lambda: None,
    }


def _patch(owner: Any, name: str, replacement: object) -> None:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    _undo.append(lambda: setattr(owner, name, original))


def _switch_off_dynamo() -> None:
    # megatron-core decorates small functions with torch.compile: on a CPU compiling them takes longer than training.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    config = sys.modules.get("torch._dynamo.config")
    if config is not None:
        config.disable = True  # type: ignore[attr-defined]


def _silence_shared_generator_warning() -> None:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def is_about_something_else(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

    logger.addFilter(is_about_something_else)
    _undo.append(lambda: logger.removeFilter(is_about_something_else))


__all__ = ["device_error", "install", "is_installed", "is_needed", "on_cpu", "uninstall"]
