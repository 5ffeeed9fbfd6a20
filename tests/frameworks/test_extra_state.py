"""State that modules, optimizers and trackers of other libraries carry comes back, here and on a replacement."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_flashrecovery.adapters.megatron import fp8_state, optimizer_state, random_state
from megatron_flashrecovery.adapters.megatron.framework import refuse_other_tensors
from megatron_flashrecovery.adapters.megatron.model_state import ModelState
from megatron_flashrecovery.adapters.megatron.optimizer_state import OptimizerState
from megatron_flashrecovery.adapters.megatron_lm import arguments
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.state.encoding import decode_values, encode_values
from megatron_flashrecovery.state.pieces import TensorPiece
from tests.frameworks import state_carriers
from tests.frameworks.state_carriers import DelayedScaling, FP8GlobalStateManager, FusedAdam, Remembering, Tracker
from tests.processes.conftest import Equal
from tests.processes.launcher import ROOT, Job
from tests.processes.matrix import OPTIMIZERS, RECOVERY, assert_changes_no_bit, kill

SCRIPT = ROOT / "tests" / "frameworks" / "pretrain_with_extra_state.py"


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", None)
    state_carriers.take_the_place_of_transformer_engine()
    FP8GlobalStateManager.reset()
    monkeypatch.setattr(fp8_state.parallel_state, "get_amax_reduction_group", lambda **_: None)


class Network(torch.nn.Module):
    """Its modules are built in another order than they run in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.second, self.first = DelayedScaling(gemms=2), DelayedScaling()
        self.remembering = Remembering(kind)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.remembering(self.second(self.first(values)))


def chunk(module: torch.nn.Module, **config: Any) -> Any:
    return SimpleNamespace(
        module=module, config=SimpleNamespace(**config), bucket_groups=[], expert_parallel_bucket_groups=[]
    )


def pass_through(network: torch.nn.Module, passes: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(passes):
        values = torch.randn(8, generator=generator).requires_grad_()
        output = network(values)
        output.sum().backward()
        for direction in ("scaling_fwd", "scaling_bwd"):
            FP8GlobalStateManager.reduce_and_update(direction, None)
        assert values.grad is not None
        results += [*output.tolist(), *values.grad.tolist()]
    return results


def carried(value: Any) -> Any:
    """As it comes out of a snapshot."""
    return decode_values(encode_values({"": value}))[""]


@pytest.mark.parametrize("kind", ["tensor", "bytes", "file"])
@pytest.mark.parametrize("passes", [0, 1, 5], ids=["before-the-first-pass", "one-pass", "five-passes"])
@pytest.mark.parametrize("replaced", [False, True], ids=["survivor", "replacement"])
def test_what_modules_carry_comes_back(kind, passes, replaced):
    network = Network(kind)
    pass_through(network, passes, seed=1)
    captured = carried(ModelState([chunk(network)], sharded=True).capture())
    expected = pass_through(network, 3, seed=2)
    pass_through(network, 2, seed=3)
    if replaced:
        FP8GlobalStateManager.reset()
        network = Network(kind)
    ModelState([chunk(network)], sharded=True).restore(captured)
    assert pass_through(network, 3, seed=2) == expected


def test_a_replacement_enters_its_tensors_in_the_order_of_its_predecessor():
    network = Network("bytes")
    pass_through(network, 1, seed=1)
    order = [scale.numel() for scale in FP8GlobalStateManager.global_scale_buffer["scaling_fwd"]]
    captured = carried(ModelState([chunk(network)], sharded=True).capture())
    FP8GlobalStateManager.reset()
    replacement = Network("bytes")
    ModelState([chunk(replacement)], sharded=True).restore(captured)
    assert order == [3, 6]
    assert [scale.numel() for scale in FP8GlobalStateManager.global_scale_buffer["scaling_fwd"]] == order
    scale = replacement.first.fp8_meta["scaling_fwd"].scale
    assert FP8GlobalStateManager.global_scale_buffer["scaling_fwd"][0] is scale


def test_memory_is_taken_for_scaling_that_the_first_pass_will_make():
    network = Network("bytes")
    state = ModelState([chunk(network, fp8="hybrid", fp8_amax_history_len=state_carriers.HISTORY)], sharded=True)
    before = len(encode_values({"": state.capture()}))
    pass_through(network, 1, seed=1)
    assert len(encode_values({"": state.capture()})) <= before


def test_what_was_put_aside_for_a_recomputation_is_forgotten():
    FP8GlobalStateManager.fp8_tensors_recompute_buffer.append([torch.ones(1)])
    fp8_state.forget_recomputation()
    assert FP8GlobalStateManager.fp8_tensors_recompute_buffer == [[]]


def optimizer_state_of(optimizer: FusedAdam, parameter: torch.nn.Parameter) -> OptimizerState:
    state = OptimizerState.__new__(OptimizerState)
    state._optimizer = None  # type: ignore[assignment]
    state._inner = [SimpleNamespace(optimizer=optimizer, grad_scaler=None)]
    state._name_of = {id(parameter): "weight"}
    state.sharded = True
    return state


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        pytest.param({}, {"exp_avg", "exp_avg_sq"}, id="apex"),
        pytest.param({"master_weights": True}, {"exp_avg", "exp_avg_sq", "master_param"}, id="masters"),
        pytest.param(
            {"master_weights": True, "moments": torch.float16},
            {"exp_avg", "exp_avg_sq", "master_param", "exp_avg/scale", "exp_avg_sq/scale"},
            id="scaled-moments",
        ),
    ],
)
def test_a_fused_optimizer_goes_on_where_it_was(monkeypatch, flags, keys):
    monkeypatch.setattr(optimizer_state, "SEPARATE_GRAD_NORM_GROUPS", (), raising=False)

    def build() -> tuple[torch.nn.Parameter, FusedAdam, OptimizerState]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 16).to(torch.bfloat16 if flags else torch.float32))
        # A group that is empty on this rank, of which no step is counted.
        optimizer = FusedAdam([{"params": [parameter]}, {"params": []}], lr=0.1, weight_decay=0.1, **flags)
        state = optimizer_state_of(optimizer, parameter)
        state.materialise()
        return parameter, optimizer, state

    def steps(parameter: torch.nn.Parameter, optimizer: FusedAdam, count: int, seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            parameter.grad = torch.randn(16, generator=generator).to(parameter.dtype)
            optimizer.step()
        return parameter.tolist()

    parameter, optimizer, state = build()
    assert {piece.name.removeprefix("weight/") for piece in state.pieces()} == keys
    steps(parameter, optimizer, 3, seed=1)
    tensors = [parameter.detach().clone(), *(piece.tensor.clone() for piece in state.pieces())]
    values = carried(state.capture())
    expected = steps(parameter, optimizer, 2, seed=2)
    for again, its_optimizer, its_state in ((parameter, optimizer, state), build()):
        with torch.no_grad():
            again.copy_(tensors[0])
            for piece, kept in zip(its_state.pieces(), tensors[1:], strict=True):
                piece.tensor.copy_(kept)
        its_state.restore(values)
        assert its_optimizer.param_groups[1]["step"] == 0
        assert steps(again, its_optimizer, 2, seed=2) == expected


def test_a_tracker_of_another_library_goes_on_where_it_was(monkeypatch):
    tracker = Tracker()
    tracker.add("model-parallel-rng", 3)
    monkeypatch.setattr(random_state, "get_cuda_rng_tracker", lambda: tracker)
    captured = carried(random_state.RandomState().capture())

    def draw() -> float:
        with tracker.fork():
            return torch.rand(1).item()

    first = draw()
    assert draw() != first
    random_state.RandomState().restore(captured)
    assert draw() == first
    assert not hasattr(tracker, "_current_state_name")


def test_a_quantised_tensor_is_refused_by_its_name():
    class Quantised(torch.Tensor):
        pass

    with pytest.raises(ConfigError, match="cannot copy weight, a Quantised"):
        refuse_other_tensors([TensorPiece("weight", torch.ones(1).as_subclass(Quantised), unique=True)])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        pytest.param({"fp8_param_gather": True}, "--fp8-param-gather", id="fp8-parameters"),
        pytest.param({"fp4_param": True}, "--fp4-param-gather", id="fp4-parameters"),
        pytest.param({"use_transformer_engine_op_fuser": True, "fp8": "hybrid"}, "op-fuser", id="op-fuser"),
        pytest.param({"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.uint8}, "--exp-avg", id="moments"),
        pytest.param({"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}, "", id="bf16-moments"),
        pytest.param({"fp8": "hybrid"}, "", id="fp8"),
    ],
)
def test_what_cannot_be_copied_is_refused_at_the_start(args, named):
    if not named:
        arguments.check(SimpleNamespace(**args))
        return
    with pytest.raises(ConfigError, match=named):
        arguments.check(SimpleNamespace(**args))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("optimizer", ["overlap", pytest.param("plain", marks=pytest.mark.slow)])
def test_kills_with_modules_and_an_optimizer_that_carry_state_change_no_bit(
    tmp_path: Path, assert_equal: Equal, optimizer: str
) -> None:
    kills = (kill(5, 3, "backward"), kill(2, 5, "optimizer"), kill(7, 7, "forward"))
    job = Job(SCRIPT, 8, (RECOVERY, "--train-iters", "9", *OPTIMIZERS[optimizer]), kills)
    assert_changes_no_bit(job, tmp_path / "run", assert_equal, "backward", timeout=120.0)
