"""Where the jobs of a bench run: on the GPUs of this machine, in the layout that they make, or else on CPU."""

from __future__ import annotations

import torch

from tests.processes.layouts import MAIN, Layout, layouts_for
from tests.processes.matrix import REPEATABLE

_ON_GPUS = ("cost", "recovery", "endurance", "undisturbed", "megatron_lm")
"""The benches that train; what the others measure happens on the host."""


def devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def layout() -> Layout:
    return next(iter(layouts_for(devices())), MAIN)


def environment() -> dict[str, str]:
    return REPEATABLE if layouts_for(devices()) else {}


def benches_of_gpus(devices: int) -> tuple[str, ...]:
    """What to measure on a machine with so many of them."""
    return _ON_GPUS if layouts_for(devices) else ()
