"""Where in a model the first value comes from that is not finite."""

from types import SimpleNamespace

import pytest
import torch

from megatron_flashrecovery.adapters.megatron.examination import Examination


class Half(torch.nn.Module):
    """A function between modules: its backward divides by zero."""

    def forward(self, values):
        return (values * 0.0).sqrt() + values


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        self.second = torch.nn.Linear(4, 2)
        self.odd = torch.nn.Identity()
        self.input_tensor = None

    def forward(self, values):
        values = values if self.input_tensor is None else self.input_tensor
        return self.odd(self.second(self.first(values))).sum()


def examined(model, values=None):
    chunk = SimpleNamespace(module=model, ddp_config=SimpleNamespace(overlap_grad_reduce=False))
    examination = Examination([chunk])
    model(torch.ones(3, 4, requires_grad=True) if values is None else values).backward()
    for parameter in model.parameters():
        parameter.main_grad = parameter.grad
    return examination


def test_finite_numbers_begin_nowhere():
    examination = examined(Model())
    examination.look_at_gradients()
    assert examination.finding is None


def test_a_parameter_that_is_no_number_is_named_with_its_module():
    model = Model()
    with torch.no_grad():
        model.first[1].weight[0, 0] = float("nan")
    finding = examined(model).finding
    assert finding.where == "model0.first.1"
    assert "has parameters that are not finite" in finding.what


def test_the_module_whose_backward_makes_it_is_named():
    model = Model()
    model.odd = Half()
    finding = examined(model).finding
    assert (finding.where, finding.what) == ("model0.odd", "gradient of the input")


class Residual(torch.nn.Module):
    """Its gradient is handed on as it is."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Identity()

    def forward(self, values):
        return values + self.inner(values).detach()


def test_a_gradient_that_is_handed_on_keeps_the_name_of_who_made_it():
    model = Model()
    model.first = torch.nn.Sequential(torch.nn.Linear(4, 4), Residual(), Residual())
    model.second = torch.nn.Sequential(Half(), torch.nn.Linear(4, 2))
    finding = examined(model).finding
    assert finding.where == "model0.second.0"


def test_what_comes_from_another_stage_began_there():
    model = Model()
    model.input_tensor = torch.full((3, 4), float("inf"), requires_grad=True)
    assert examined(model).finding is None


def test_a_gradient_that_alone_is_no_number_is_named_by_its_parameter():
    model = Model()
    examination = examined(model)
    model.second.bias.main_grad[0] = float("nan")
    examination.look_at_gradients()
    assert (examination.finding.where, examination.finding.what) == ("model0.second.bias", "gradient")


def test_the_number_grows_with_what_was_looked_at_before():
    numbers = []
    for module in ("first", "second"):
        model = Model()
        target = model.first[0] if module == "first" else model.second
        with torch.no_grad():
            target.weight.fill_(float("inf"))
        numbers.append(examined(model).finding.number)
    assert numbers[0] < numbers[1]


class Between(torch.nn.Module):
    """What it does between its modules is not finite."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, values):
        return self.behind(self.before(values) / 0.0)


def test_what_is_made_between_modules_counts_from_when_it_is_seen():
    model, other = Model(), Model()
    model.first = Between()
    other.first = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        other.first[1].weight.fill_(float("inf"))
    between, inside = examined(model).finding, examined(other).finding
    assert between.where == "model0.first"
    assert between.number < inside.number, "who is given it by a peer sees it later"


@pytest.mark.parametrize("times", [1, 2])
def test_nothing_of_it_is_left_behind(times):
    model = Model()
    for _ in range(times):
        examined(model).end()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
