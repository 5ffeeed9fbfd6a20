"""A step that is looked at closely: which module made the first value that is not finite.

Each look waits for the device, so this is for a step that is computed again because its numbers were bad, and for no
other. Forward is watched at inputs and outputs of modules, backward at gradients of their inputs: whoever was given
finite values and made others is where it began. What came from another stage of the pipeline began there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_flashrecovery.core.findings import Finding

_STATE = "it has parameters that are not finite"


class Examination:
    """From when it is made until ``end``. ``finding`` is what began on this rank."""

    def __init__(self, model: Sequence[DistributedDataParallel]) -> None:
        self.finding: Finding | None = None
        self._model = list(model)
        self._number = 0
        self._first_seen: int | None = None
        """Number of the first value that was not finite and not foreign: a module that makes one between its own
        modules is known only when it is over, and by then peers have it from us."""
        self._were_finite: list[bool] = []
        self._is_foreign_forward = self._is_foreign_backward = False
        self._same_gradient = -1
        self._handles: list[Any] = []
        for index, chunk in enumerate(self._model):
            for name, module in chunk.module.named_modules():
                self._watch(f"model{index}.{name}".rstrip("."), module, is_outermost=not name)

    def look_at_gradients(self) -> None:
        """Of parameters, before they are reduced. Those that are reduced while backward runs are those of others, too:
        nothing can be said of them."""
        for index, chunk in enumerate(self._model):
            if chunk.ddp_config.overlap_grad_reduce:
                continue
            for name, parameter in chunk.module.named_parameters():
                gradient = getattr(parameter, "main_grad", None)
                if isinstance(gradient, torch.Tensor) and not _is_finite(gradient):
                    self._find(f"model{index}.{name}", "gradient")

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _watch(self, name: str, module: torch.nn.Module, is_outermost: bool) -> None:
        def before(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if is_outermost:
                self._were_finite.clear()
                self._is_foreign_forward = not all(map(_is_finite, _given_by_others(module)))
            inputs = list(_tensors((args, kwargs)))
            self._were_finite.append(all(map(_is_finite, inputs)))
            if not self._were_finite[-1] and not self._is_foreign_forward and self._first_seen is None:
                self._first_seen = self._number
            for tensor in inputs:
                # Not on a parameter that is handed in, such as tied embeddings: it outlives this step.
                if tensor.requires_grad and not tensor.is_leaf:
                    self._handles.append(tensor.register_hook(lambda gradient: self._look_back(name, gradient)))

        def after(_module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            was_finite = self._were_finite.pop()
            outputs = list(_tensors(output))
            self._number += 1
            if was_finite and not self._is_foreign_forward and not all(map(_is_finite, outputs)):
                own = module.parameters(recurse=False)
                self._find(name, "output" if all(map(_is_finite, own)) else f"output ({_STATE})")
            if is_outermost:
                for tensor in outputs:
                    if tensor.requires_grad and not tensor.is_leaf:
                        self._handles.append(tensor.register_hook(self._begin_backward))

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _begin_backward(self, gradient: torch.Tensor) -> None:
        self._is_foreign_backward = not _is_finite(gradient)

    def _look_back(self, name: str, gradient: torch.Tensor) -> None:
        self._number += 1
        if self._is_foreign_backward or _is_finite(gradient):
            self._same_gradient = -1
            return
        found = self.finding
        if found is not None and self._same_gradient == gradient.data_ptr() and name.startswith(f"{found.where}."):
            # Modules inside of each other are given the same tensor, and are asked from the outside in. Others may be
            # given the same gradient: that of a sum is handed on.
            self.finding = Finding(found.number, name, found.what)
        elif found is None:
            self._find(name, "gradient of the input")
            self._same_gradient = gradient.data_ptr()

    def _find(self, where: str, what: str) -> None:
        if self.finding is None:
            number = self._number if self._first_seen is None else self._first_seen
            self.finding = Finding(number, where, what)


def _given_by_others(outermost: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What the stage before has sent is not among the arguments."""
    for module in outermost.modules():
        yield from _tensors(getattr(module, "input_tensor", None))


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    match value:
        case torch.Tensor():
            yield value
        case dict():
            for each in value.values():
                yield from _tensors(each)
        case list() | tuple():
            for each in value:
                yield from _tensors(each)
