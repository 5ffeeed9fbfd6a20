"""The real modules and optimizers of Transformer Engine and Apex: what they carry comes back (`make gpu`)."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_flashrecovery.adapters.megatron import random_state
from megatron_flashrecovery.adapters.megatron.fp8_state import fp8_utils, parallel_state
from megatron_flashrecovery.adapters.megatron.model_state import ModelState
from megatron_flashrecovery.adapters.megatron.optimizer_state import OptimizerState
from megatron_flashrecovery.state.encoding import decode_values, encode_values

pytestmark = pytest.mark.gpu
WIDTH = 64


def carried(value: Any) -> Any:
    return decode_values(encode_values({"": value}))[""]


def chunk(module: torch.nn.Module) -> Any:
    config = SimpleNamespace(fp8="hybrid", fp8_amax_history_len=8)
    return SimpleNamespace(module=module, config=config, bucket_groups=[], expert_parallel_bucket_groups=[])


@pytest.mark.parametrize("replaced", [False, True], ids=["survivor", "replacement"])
@pytest.mark.parametrize("passes", [0, 1, 12])
def test_delayed_scaling_goes_on_where_it_was(monkeypatch, passes, replaced):
    te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    recipe_module = pytest.importorskip("transformer_engine.common.recipe")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no FP8")
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    recipe = recipe_module.DelayedScaling(amax_history_len=8, amax_compute_algo="max")
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: recipe)
    monkeypatch.setattr(parallel_state, "get_amax_reduction_group", lambda **_: None)

    def network() -> torch.nn.Module:
        torch.manual_seed(5)
        parts = [te.LayerNormLinear(WIDTH, WIDTH), te.LayerNormMLP(WIDTH, 4 * WIDTH), te.Linear(WIDTH, WIDTH)]
        return torch.nn.Sequential(*parts).cuda()

    def run(module: torch.nn.Module, count: int, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        results = []
        for _ in range(count):
            values = torch.randn(WIDTH, WIDTH, device="cuda", generator=generator, requires_grad=True)
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                output = module(values)
            output.sum().backward()
            results += [output.detach().clone(), values.grad.clone()]
        return results

    model = network()
    run(model, passes, seed=1)
    captured = carried(ModelState([chunk(model)], sharded=True).capture())
    expected = run(model, 3, seed=2)
    run(model, 2, seed=3)
    if replaced:
        FP8GlobalStateManager.reset()
        model = network()
    ModelState([chunk(model)], sharded=True).restore(captured)
    found = run(model, 3, seed=2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("library", "flags"),
    [
        pytest.param("transformer_engine.pytorch.optimizers", {}, id="te"),
        pytest.param("transformer_engine.pytorch.optimizers", {"master_weights": True}, id="te-masters"),
        pytest.param(
            "transformer_engine.pytorch.optimizers",
            {"master_weights": True, "exp_avg_dtype": torch.float16, "exp_avg_sq_dtype": torch.float16},
            id="te-fp16-moments",
        ),
        pytest.param("apex.optimizers", {}, id="apex"),
    ],
)
def test_a_fused_optimizer_goes_on_where_it_was(library, flags):
    fused = pytest.importorskip(library, reason=f"needs {library}").FusedAdam

    def build() -> tuple[torch.nn.Parameter, Any, OptimizerState]:
        dtype = torch.bfloat16 if flags else torch.float32
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1024, device="cuda").to(dtype))
        optimizer = fused([{"params": [parameter]}], lr=0.1, weight_decay=0.1, **flags)
        state = OptimizerState.__new__(OptimizerState)
        state._optimizer = None
        state._inner = [SimpleNamespace(optimizer=optimizer, grad_scaler=None)]
        state._name_of = {id(parameter): "weight"}
        state.sharded = True
        state.materialise()
        return parameter, optimizer, state

    def steps(parameter: torch.nn.Parameter, optimizer: Any, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        for _ in range(count):
            parameter.grad = torch.randn(1024, device="cuda", generator=generator).to(parameter.dtype)
            optimizer.step()
        return parameter.detach().clone()

    parameter, optimizer, state = build()
    steps(parameter, optimizer, 3, seed=1)
    tensors = [parameter.detach().clone(), *(piece.tensor.clone() for piece in state.pieces())]
    values = carried(state.capture())
    expected = steps(parameter, optimizer, 2, seed=2)
    for again, its_optimizer, its_state in ((parameter, optimizer, state), build()):
        with torch.no_grad():
            again.copy_(tensors[0])
            for piece, kept in zip(its_state.pieces(), tensors[1:], strict=True):
                piece.tensor.copy_(kept)
        its_state.restore(copy.deepcopy(values))
        assert torch.equal(steps(again, its_optimizer, 2, seed=2), expected)


def test_the_tracker_of_transformer_engine_goes_on_where_it_was(monkeypatch):
    distributed = pytest.importorskip("transformer_engine.pytorch.distributed", reason="needs Transformer Engine")
    tracker = distributed.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 3)
    monkeypatch.setattr(random_state, "get_cuda_rng_tracker", lambda: tracker)
    captured = carried(random_state.RandomState().capture())

    def draw() -> list[float]:
        with tracker.fork():
            inside = torch.rand(1, device="cuda").item()
        return [inside, torch.rand(1, device="cuda").item()]

    first = draw()
    assert draw() != first
    random_state.RandomState().restore(captured)
    assert draw() == first
