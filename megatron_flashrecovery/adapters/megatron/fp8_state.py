"""The FP8 scaling of Transformer Engine's modules: scales, and histories of largest values, as plain tensors.

TE's own extra state holds the same in a pickle, which its newer versions refuse to load, and we never do. Its modules
make these tensors in their first forward pass, where they also enter them into global buffers, one after the other:
what is reduced over the amax group is all of a buffer, so a replacement enters them in the same order at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import fp8_utils, parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_flashrecovery.core.errors import SeamChanged
from megatron_flashrecovery.state.pieces import Value

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
# What a module has before its first forward pass.
_INITIAL = {"scale": 1.0, "amax_history": 0.0}
_PLACE = "buffer_index_and_autocast_key"
_MOST_GEMMS = 3
_TENSORS_OF_GEMM = 5
_ENTRY_NBYTES = 256


def keeps_fp8_scaling(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "fp8_meta", None), dict)


def forget_recomputation() -> None:
    """What a step that was cut short has put aside for the recomputation of its forward passes."""
    for queue in getattr(_buffers(), "fp8_tensors_recompute_buffer", ()):
        queue.clear()


class Fp8State:
    def __init__(self, model: Sequence[DistributedDataParallel]) -> None:
        self._config = model[0].config
        self._modules = {
            f"model{index}.{name}": module
            for index, chunk in enumerate(model)
            for name, module in chunk.module.named_modules()
            if keeps_fp8_scaling(module)
        }

    def capture(self) -> Value:
        """All tensors in one, so that one copy brings them to the host."""
        made: list[Value] = []
        flat: list[torch.Tensor] = []
        for name, module in self._modules.items():
            tensors = dict(_tensors(module))
            if tensors:
                meta = module.fp8_meta
                place = meta[_PLACE][0] if meta.get(_PLACE) else -1
                # A list, for a mapping comes back in another order, and the order is that of ``flat``.
                shapes: list[Value] = [[key, list(tensor.shape)] for key, tensor in tensors.items()]
                made.append({"name": name, "gemms": meta.get("num_gemms", 1), "place": place, "shapes": shapes})
                flat += [tensor.reshape(-1) for tensor in tensors.values()]
        return {
            "modules": made,
            "flat": torch.cat(flat) if flat else None,
            "room": bytes(0 if made else self._expected_nbytes()),
        }

    @torch.no_grad()
    def restore(self, captured: Any) -> None:
        """In place: the global buffers and the quantizers hold views of these tensors."""
        entries = {entry["name"]: entry for entry in captured["modules"]}
        for name, module in self._modules.items():
            if name not in entries:
                for key, tensor in _tensors(module):
                    tensor.fill_(_INITIAL[key.rpartition(".")[2]])
        for entry in sorted(entries.values(), key=lambda entry: entry["place"]):
            module = self._modules[entry["name"]]
            if not dict(_tensors(module)):
                self._make(module, entry)
        parts = iter(captured["flat"].split(_sizes(entries.values())) if entries else ())
        for name, entry in entries.items():
            tensors = dict(_tensors(self._modules[name]))
            if [[key, list(tensor.shape)] for key, tensor in tensors.items()] != entry["shapes"]:
                raise SeamChanged(f"{name} made other FP8 tensors than its predecessor, {list(tensors)}")
            for key, shape in entry["shapes"]:
                tensors[key].copy_(next(parts).view(shape))

    def _make(self, module: Any, entry: dict[str, Any]) -> None:
        """What the module's first forward pass would make and enter."""
        recipe = fp8_utils.get_fp8_recipe(self._config)
        group = parallel_state.get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=getattr(self._config, "tp_only_amax_red", False)
        )
        module.fp8_meta.update(num_gemms=entry["gemms"], recipe=recipe, fp8_group=group)
        module.init_fp8_meta_tensors(recipe)
        if entry["place"] >= 0:
            _manager().add_fp8_tensors_to_global_buffer(module.fp8_meta)

    def _expected_nbytes(self) -> int:
        """The memory for copies is taken before the first forward pass."""
        if getattr(self._config, "fp8", None) is None:
            return 0
        length = 1 + int(self._config.fp8_amax_history_len)
        return len(self._modules) * (_ENTRY_NBYTES + _MOST_GEMMS * _TENSORS_OF_GEMM * length * 4)


def _tensors(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Only delayed scaling keeps any from step to step."""
    for direction in _DIRECTIONS:
        state = module.fp8_meta.get(direction)
        if all(isinstance(getattr(state, key, None), torch.Tensor) for key in _INITIAL):
            for key in _INITIAL:
                yield f"{direction}.{key}", getattr(state, key)


def _sizes(entries: Any) -> list[int]:
    return [math.prod(shape) for entry in entries for _, shape in entry["shapes"]]


def _manager() -> Any:
    """Only where it has been imported."""
    return getattr(sys.modules.get("transformer_engine.pytorch.fp8"), "FP8GlobalStateManager", None)


def _buffers() -> Any:
    """Newer versions keep them in an instance, older ones in the class."""
    manager = _manager()
    return getattr(manager, "quantization_state", manager)
