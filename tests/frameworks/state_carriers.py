"""What carries state as Transformer Engine's and Apex's modules and optimizers do, on CPU and from scratch.

Only the interface is theirs: the names of the hooks, of what the adapter reads, and when what is made and changed.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

HISTORY = 4


class FP8GlobalStateManager:
    """The buffers in which the modules of a process enter their tensors, in the order of their first forward pass."""

    global_amax_history_buffer: ClassVar[dict[str, list[torch.Tensor]]] = {}
    global_scale_buffer: ClassVar[dict[str, list[torch.Tensor]]] = {}
    fp8_tensors_recompute_buffer: ClassVar[list[list[Any]]] = []

    @classmethod
    def reset(cls) -> None:
        for buffer in (cls.global_amax_history_buffer, cls.global_scale_buffer, cls.fp8_tensors_recompute_buffer):
            buffer.clear()

    @classmethod
    def add_fp8_tensors_to_global_buffer(cls, fp8_meta: dict[str, Any]) -> None:
        if "buffer_index_and_autocast_key" in fp8_meta:
            return
        fp8_meta["buffer_index_and_autocast_key"] = []
        for direction in ("scaling_fwd", "scaling_bwd"):
            cls.global_amax_history_buffer.setdefault(direction, []).append(fp8_meta[direction].amax_history)
            cls.global_scale_buffer.setdefault(direction, []).append(fp8_meta[direction].scale)
            fp8_meta["buffer_index_and_autocast_key"] += [len(cls.global_scale_buffer[direction]) - 1, direction]

    @classmethod
    def reduce_and_update(cls, direction: str, group: dist.ProcessGroup | None) -> None:
        """Of all that has been entered, in one reduction: whoever entered in another order mixes modules up."""
        histories = cls.global_amax_history_buffer.get(direction, [])
        if not histories:
            return
        newest = torch.cat([history[0] for history in histories])
        if group is not None:
            dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
        parts = newest.split([history.shape[1] for history in histories])
        for history, scale, amax in zip(histories, cls.global_scale_buffer[direction], parts, strict=True):
            history[0].copy_(amax)
            scale.copy_(448.0 / history.amax(dim=0).clamp(min=1e-6))
            history.copy_(torch.roll(history, 1, 0))
            history[0].zero_()


def take_the_place_of_transformer_engine() -> None:
    """Only where its manager is looked for: megatron-core must not find the library itself."""
    module = ModuleType("transformer_engine.pytorch.fp8")
    module.FP8GlobalStateManager = FP8GlobalStateManager  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module


class DelayedScaling(torch.nn.Module):
    """Rounds by a scale that follows from the largest values of the passes before; has no tensor before the first."""

    def __init__(self, gemms: int = 1) -> None:
        super().__init__()
        self._gemms = gemms
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        for direction, each in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            if direction not in self.fp8_meta:
                count = each * self.fp8_meta["num_gemms"]
                self.fp8_meta[direction] = SimpleNamespace(
                    scale=torch.ones(count), amax_history=torch.zeros(HISTORY, count)
                )

    def get_extra_state(self) -> torch.Tensor:
        raise AssertionError("nobody needs its pickle")

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.fp8_meta["num_gemms"] = self._gemms
        self.init_fp8_meta_tensors(None)
        FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(self.fp8_meta)
        result = _Rounded.apply(values, self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"])
        assert isinstance(result, torch.Tensor)
        return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, forth: Any, back: Any) -> torch.Tensor:
        ctx.back = back
        return _round(values, forth)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _round(gradients[0], ctx.back), None, None


def _round(values: torch.Tensor, state: Any) -> torch.Tensor:
    state.amax_history[0].copy_(torch.maximum(state.amax_history[0], values.detach().abs().amax().float()))
    scale = float(state.scale[0])
    return (values * scale).round() / scale


class Remembering(torch.nn.Module):
    """Its forward changes what it forgets unless ``get_extra_state`` is asked: ``kind`` says as what that is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self._seen = 1.0
        # Larger than what was once a value: 128 KiB.
        self.register_buffer("running", torch.ones(1 << 15))
        self.running: torch.Tensor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._seen = 0.5 * self._seen + float(values.detach().abs().mean())
            self.running.mul_(0.75).add_(self._seen)
        return values * (1.0 + 1e-3 * self._seen + 1e-3 * float(self.running[-1]))

    def get_extra_state(self) -> torch.Tensor | bytes | io.BytesIO:
        told = repr(self._seen).encode()
        match self._kind:
            case "tensor":
                return torch.frombuffer(bytearray(told), dtype=torch.uint8)
            case "file":
                return io.BytesIO(told)
            case _:
                return told

    def set_extra_state(self, state: Any) -> None:
        match state:
            case torch.Tensor():
                told = state.numpy().tobytes()
            case io.BytesIO():
                told = state.read()
            case _:
                told = state
        self._seen = float(told)


class FusedAdam(torch.optim.Optimizer):
    """Counts steps in the group, and keeps masters, and moments in other dtypes with a scale each, if it is told to."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.master_weights = master_weights
        self.store_param_remainders = False
        self.name_to_dtype_map = {"exp_avg": moments, "exp_avg_sq": moments, "master_param": torch.float32}
        self._scales: dict[Any, dict[str, torch.Tensor]] = {}

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = self.name_to_dtype_map[name]
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
            if dtype != torch.float32:
                self._scales.setdefault(param, {})[name] = torch.ones(1)
        if self.master_weights:
            self.state[param]["master_param"] = param.detach().clone().float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, False)
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), step = self.state[param], group["betas"], group["step"]
        first = self._read(param, "exp_avg").mul_(beta1).add_(param.grad.float(), alpha=1 - beta1)
        second = (
            self._read(param, "exp_avg_sq")
            .mul_(beta2)
            .addcmul_(param.grad.float(), param.grad.float(), value=1 - beta2)
        )
        self._write(param, "exp_avg", first)
        self._write(param, "exp_avg_sq", second)
        master = state.get("master_param", param)
        master.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
        master.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))
        if master is not param:
            param.copy_(master)

    def _read(self, param: torch.Tensor, name: str) -> torch.Tensor:
        scale = self._scales.get(param, {}).get(name)
        moment = self.state[param][name].float()
        return moment.clone() if scale is None else moment * scale

    def _write(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        scale = self._scales.get(param, {}).get(name)
        if scale is not None:
            scale.copy_(value.abs().amax().clamp(min=1e-20) / 1024.0)
            value = value / scale
        self.state[param][name].copy_(value)


class Tracker:
    """Of generators that are not megatron-core's: neither a name of what is forked, nor states in place of them."""

    def __init__(self) -> None:
        self.generators: dict[str, torch.Generator] = {}

    def add(self, name: str, seed: int) -> None:
        self.generators[name] = torch.Generator().manual_seed(seed)

    def get_states(self) -> dict[str, torch.Generator]:
        return dict(self.generators)

    def set_states(self, states: dict[str, torch.Generator]) -> None:
        self.generators = states

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.generators[name].get_state())
        try:
            yield
        finally:
            self.generators[name].set_state(torch.get_rng_state())
            torch.set_rng_state(before)
