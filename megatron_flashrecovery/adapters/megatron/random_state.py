"""Every generator that a step draws from: Python, NumPy, torch on CPU and device, and Megatron's tracker."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_flashrecovery.state.pieces import Value


class RandomState:
    def capture(self) -> Value:
        version, python_state, gauss = random.getstate()
        algorithm, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
        tracker = get_cuda_rng_tracker()
        return {
            "python": [version, torch.tensor(python_state, dtype=torch.int64), gauss],
            "numpy": [
                algorithm,
                torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ],
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "tracker": {name: _as_tensor(state) for name, state in tracker.get_states().items()},
        }

    def restore(self, captured: Any) -> None:
        version, python_state, gauss = captured["python"]
        random.setstate((version, tuple(python_state.tolist()), gauss))
        algorithm, keys, position, has_gauss, cached = captured["numpy"]
        numpy.random.set_state((algorithm, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
        torch.set_rng_state(captured["torch"])
        if captured["device"] is not None:
            torch.cuda.set_rng_state(captured["device"])
        _restore_tracker(captured["tracker"])


def _as_tensor(state: Any) -> torch.Tensor:
    """The tracker holds generators in place of states when CUDA graphs use it."""
    return state.get_state() if isinstance(state, torch.Generator) else state.clone()


def _restore_tracker(captured: dict[str, torch.Tensor]) -> None:
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, state in captured.items():
        if isinstance(states.get(name), torch.Generator):
            states[name].set_state(state)
        else:
            states[name] = state.clone()
    tracker.set_states(states)
    # A step that was cut short in a fork of the tracker has left it in that fork's name.
    if hasattr(tracker, "_current_state_name"):  # Transformer Engine's keeps no such name
        tracker._current_state_name = "default-rng"
