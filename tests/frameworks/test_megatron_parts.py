"""What the adapter is made of, each part alone."""

import copy
import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_flashrecovery.adapters.megatron import aux_losses, partial_step
from megatron_flashrecovery.adapters.megatron.no_sync import NoSync
from megatron_flashrecovery.adapters.megatron.optimizer_state import _fresh_adam_state
from megatron_flashrecovery.adapters.megatron.random_state import RandomState
from megatron_flashrecovery.adapters.megatron.replay import ReplayableBatches
from megatron_flashrecovery.state.encoding import decode_values, encode_values

FIRST_LAYER = {MTPLossLoggingHelper: 0, DSAIndexerLossLoggingHelper: 1}


def take(batches: Iterator[int], count: int) -> list[int]:
    return [next(batches) for _ in range(count)]


def numbers_from(opened: list[int]):
    def open_at(consumed_samples: int) -> Iterator[torch.Tensor]:
        opened.append(consumed_samples)
        while True:
            yield consumed_samples
            consumed_samples += 1

    return open_at


def test_batches_of_a_step_are_drawn_again_and_then_the_source_goes_on():
    opened: list[int] = []
    batches = ReplayableBatches(numbers_from(opened))
    for step in range(2):
        batches.begin_step(step, step * 3)
        assert take(batches, 3) == [step * 3, step * 3 + 1, step * 3 + 2]
    batches.begin_step(0, 0)
    assert take(batches, 3) == [0, 1, 2]
    batches.begin_step(1, 3)
    assert take(batches, 3) == [3, 4, 5]
    batches.begin_step(2, 6)
    assert take(batches, 3) == [6, 7, 8]
    assert opened == [0]


def test_a_step_that_was_cut_short_while_drawing_gets_its_other_batches_from_the_source():
    batches = ReplayableBatches(numbers_from([]))
    batches.begin_step(0, 0)
    assert take(batches, 1) == [0]
    batches.begin_step(0, 0)
    assert take(batches, 3) == [0, 1, 2]


@pytest.mark.parametrize("step", [0, 7], ids=["forgotten", "never-drawn"])
def test_where_nothing_is_kept_the_source_is_opened_at_the_position(step):
    opened: list[int] = []
    batches = ReplayableBatches(numbers_from(opened))
    for drawn in range(2):
        batches.begin_step(drawn, drawn * 3)
        take(batches, 3)
    batches.forget_before(1)
    batches.begin_step(step, step * 3)
    assert take(batches, 2) == [step * 3, step * 3 + 1]
    assert opened == [0, step * 3]


def test_what_a_step_does_to_its_batch_is_not_seen_when_it_is_drawn_again():
    batches = ReplayableBatches(lambda _: iter([{"tokens": torch.zeros(2)}]))
    batches.begin_step(0, 0)
    next(batches)["tokens"].fill_(1.0)
    batches.begin_step(0, 0)
    assert next(batches)["tokens"].tolist() == [0.0, 0.0]


def test_every_generator_goes_on_where_it_was():
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 3)
    captured = decode_values(encode_values({"random": RandomState().capture()}))
    first = draw()
    assert draw() != first
    tracker._current_state_name = "model-parallel-rng"  # as a fork leaves it that was cut short
    RandomState().restore(captured["random"])
    assert draw() == first


def draw() -> list[float]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.gauss(), random.random(), numpy.random.normal(), torch.rand(1).item(), tracked]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_that_is_given_zero_state_changes_no_bit(kind):
    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    optimizers = [kind(copy.deepcopy(parameters), lr=1e-2, weight_decay=0.1) for _ in range(2)]
    given = optimizers[1]
    for parameter in given.param_groups[0]["params"]:
        given.state[parameter].update(_fresh_adam_state(given, given.param_groups[0], parameter))
    for _ in range(3):
        gradients = [torch.randn(5, 3) for _ in parameters]
        for optimizer in optimizers:
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    states = [[*o.param_groups[0]["params"], *(t for s in o.state.values() for t in s.values())] for o in optimizers]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True))


def test_a_context_that_was_left_once_is_not_left_again_when_it_is_collected():
    left: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        yield
        left.append("left")

    contexts = NoSync()
    entered = contexts.tracked(no_sync)()
    entered.__enter__()
    contexts.leave()
    assert left == ["left"]
    del entered
    gc.collect()
    assert left == ["left"]


def test_a_context_that_is_left_in_time_is_forgotten():
    left: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        yield
        left.append("left")

    contexts = NoSync()
    with contexts.tracked(no_sync)():
        assert left == []
    contexts.leave()
    assert left == ["left"]


@pytest.mark.parametrize("helper", [MTPLossLoggingHelper, DSAIndexerLossLoggingHelper])
def test_losses_beside_the_main_one_are_those_of_before_the_step_that_was_cut_short(monkeypatch, helper):
    monkeypatch.setattr(helper, "tracker", {})
    helper.save_loss_to_tracker(torch.tensor(2.0), FIRST_LAYER[helper], 1)
    captured = decode_values(encode_values({"losses": aux_losses.capture()}))["losses"]
    helper.save_loss_to_tracker(torch.tensor(3.0), FIRST_LAYER[helper], 1)
    aux_losses.restore(captured)
    assert helper.tracker["values"].tolist() == [2.0]
    monkeypatch.setattr(helper, "tracker", {})
    aux_losses.restore(captured)
    assert helper.tracker["values"].tolist() == [2.0]


def test_gradients_that_a_cut_step_has_put_off_are_not_paired_with_the_activations_of_the_next_one():
    chunk = SimpleNamespace(embedding_activation_buffer=[torch.ones(1)], grad_output_buffer=[torch.ones(1)])
    partial_step._forget_deferred_gradients(chunk)
    assert (chunk.embedding_activation_buffer, chunk.grad_output_buffer) == ([], [])
    partial_step._forget_deferred_gradients(SimpleNamespace(grad_output_buffer=None))
