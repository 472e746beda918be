"""Columns of the profiler against independent float64 computations: mean, dead and saturated shares, update ratios."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from support.profiles import figure, measure, row
from torch import nn
from torch.nn import functional as F

from lcw_ops import optim
from lcw_ops.nn import OrthogonalFilterMLP
from lcw_ops.profile import statistics
from lcw_ops.profile.result import SCHEMA_VERSION

pytestmark = pytest.mark.usefixtures("one_thread")


def flat_entries(function, x):
    """Beyond the arguments, on either side, up to which all derivatives are at most 5 % of the largest, in float64."""
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    (on_grid,) = torch.autograd.grad(function(grid).sum(), grid)
    steep = (on_grid.abs() > 0.05 * on_grid.abs().max()).nonzero()[:, 0]
    grid, x = grid.detach(), x.detach().double()
    return (x < grid[steep[0]]) | (x > grid[steep[-1]])


TWO_SIDED = [
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 2.0),
    nn.Hardsigmoid(),
]
ONE_SIDED = [
    nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.ELU(), nn.ELU(0.5), nn.ELU(2.0), nn.CELU(2.0),
    nn.SELU(), nn.Softplus(), nn.Softplus(2.0), nn.Hardswish(),
]  # fmt: skip


class Functional(nn.Module):
    """Calls the activation function in its own forward, between two layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(5, 40), nn.Linear(40, 3)
        self.apply_function = function.forward

    def forward(self, x):
        return self.second(self.apply_function(self.first(x)))


@pytest.mark.parametrize("is_functional", [False, True])
@pytest.mark.parametrize("block", [2**16, 256])
@pytest.mark.parametrize("activation", [*TWO_SIDED, *ONE_SIDED], ids=str)
def test_flat_shares_are_those_of_the_derivative(activation, is_functional, block, monkeypatch):
    """``block``: 256 entries read the same tensors in parts."""
    monkeypatch.setattr(statistics, "BLOCK", block)
    x = torch.randn(16, 5)
    if is_functional:
        model = Functional(activation)
        first, place = model.first, "first"
    else:
        model = nn.Sequential(nn.Linear(5, 40), activation)
        first, place = model[0], "1"
    # Units of every kind: nearly linear, flat at some samples, flat at all.
    first.weight.data.mul_(torch.linspace(0.1, 8, 40)[:, None])
    first.bias.data = torch.linspace(-9, 6, 40)[torch.randperm(40)]
    result = measure(model, x, jacobian=False)
    if isinstance(activation, (nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU)):
        # float32 and float64 may round a single entry to the two sides of the limit, but the shares agree here.
        assert 0 < figure(result, "dead", place) < 1
    is_flat = flat_entries(activation, first(x))
    assert figure(result, "dead", place) == pytest.approx(is_flat.all(0).double().mean().item(), rel=1e-6)
    share = is_flat.double().mean().item()
    if any(activation is one for one in TWO_SIDED):
        assert figure(result, "saturated", place) == pytest.approx(share, rel=1e-6)
        assert figure(result, "saturated_error", place) == pytest.approx(math.sqrt(share * (1 - share) / 16), rel=1e-6)
    else:
        assert "flat on one side only" in result.reason("saturated", row(result, place))
    dead = figure(result, "dead", place)
    assert figure(result, "dead_error", place) == pytest.approx(math.sqrt(dead * (1 - dead) / 16), abs=1e-12)


class Block(nn.Module):
    """The sum is activated in place, so its row is the block's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(40, 40)

    def forward(self, x):
        return torch.relu_(self.linear(x) + x)


def test_a_functional_activation_of_a_sum_belongs_to_the_block():
    model, x = nn.Sequential(Block(), Block()), torch.randn(1, 40).repeat(4, 1)
    result = measure(model, x, jacobian=False)
    for name, output in (("0", model[0](x)), ("1", model(x))):
        assert figure(result, "dead", name) == pytest.approx((output == 0).all(0).double().mean().item())
        assert "no activation function" in result.reason("dead", row(result, f"{name}.linear"))
    assert 0 < figure(result, "dead", "0") < 1


def test_channels_of_images_are_units_and_in_place_modules_change_nothing():
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(inplace=True), nn.Conv2d(10, 5, 1), nn.SiLU(inplace=True))
    model[0].bias.data[:4] = -10
    model[2].bias.data[0] = -60
    result = measure(model, x, jacobian=False)
    hidden = model[0](x)
    assert figure(result, "dead", "1") == pytest.approx((hidden <= 0).all(3).all(2).all(0).double().mean().item())
    assert figure(result, "state_mean", "0") == pytest.approx(hidden.double().mean().item(), rel=1e-5)
    assert figure(result, "state_mean", "1") == pytest.approx(hidden.relu().double().mean().item(), rel=1e-5)
    assert figure(result, "dead", "3") == 0.2


def test_leaky_rectifiers_and_linear_layers_have_no_flat_part():
    result = measure(nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU()), torch.randn(5, 4), jacobian=False)
    assert all("no activation function with a flat part" in result.reason("dead", place) for place in range(2))


# --- updates


def net():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 2))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.02),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, weight_decay=0.1),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.8),
    "our sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9),
    "our sgd, momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, activate="momentum", gradient_activation="log"),
    "our adamw": lambda p: optim.AdamW(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
}


def contents(optimizer):
    """All tensors and numbers of the state, by parameter."""
    return {
        key: {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for key, entry in optimizer.state.items()
    }


def same(left, right):
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_ratios_are_those_of_a_step_which_is_not_made(name, steps):
    model, x, y = net().double(), torch.randn(8, 6).double(), torch.randn(8, 2).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    values, state = [parameter.clone() for parameter in model.parameters()], contents(optimizer)
    gradients, groups = [parameter.grad for parameter in model.parameters()], copy.deepcopy(optimizer.param_groups)
    random_state = torch.get_rng_state()
    result = measure(model, x, y, optimizer=optimizer, jacobian=False)

    assert all(map(torch.equal, values, model.parameters()))
    assert all(old is parameter.grad for old, parameter in zip(gradients, model.parameters(), strict=True))
    assert contents(optimizer).keys() == state.keys()
    for key, entry in state.items():
        assert entry.keys() == optimizer.state[key].keys()
        assert all(same(value, optimizer.state[key][part]) for part, value in entry.items())
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in before.items() if k != "params"}
    assert torch.equal(random_state, torch.get_rng_state())

    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    for place, old in ((0, values[0]), (2, values[2]), (4, values[3])):
        expected = (model[place].weight - old).norm() / old.norm()
        assert figure(result, "update_ratio", str(place)) == pytest.approx(expected.item(), rel=1e-6)
    assert "no parameters" in result.reason("update_ratio", row(result, "1"))


def test_update_ratios_of_a_recurrence_are_by_layer():
    model, x, y = OrthogonalFilterMLP(6, 8, 5, 2), torch.randn(8, 6), torch.randn(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = measure(model, x, y, optimizer=optimizer, jacobian=False)
    old = model.weight.detach().clone()
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    expected = ((model.weight - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)).detach()
    np.testing.assert_allclose(result.columns["update_ratio"][1:-1], expected, rtol=1e-3)
    assert "fused" in result.reason("dead", 1)


def test_an_update_that_is_not_known_has_a_reason():
    model, x = net(), torch.randn(8, 6)
    closure = measure(model, x, optimizer=torch.optim.LBFGS(model.parameters()), jacobian=False)
    assert "not known: the optimizer's step failed" in closure.reason("update_ratio", 0)
    partial = measure(model, x, optimizer=torch.optim.SGD(model[0].parameters(), 0.1), jacobian=False)
    assert partial.reason("update_ratio", 0) is None
    assert "does not have this parameter" in partial.reason("update_ratio", 2)
    assert "no optimizer was given" in measure(model, x, jacobian=False).reason("update_ratio", 0)
    with pytest.raises(TypeError, match=r"optimizer is a float; expected a torch\.optim\.Optimizer"):
        measure(model, x, optimizer=0.1)


def test_hooks_of_a_step_are_part_of_the_update():
    model, x, y = net(), torch.randn(8, 6), torch.randn(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def halve(optimizer, args, kwargs):
        for parameter in model.parameters():
            parameter.grad *= 0.5

    plain = measure(model, x, y, optimizer=optimizer, jacobian=False)
    optimizer.register_step_pre_hook(halve)
    halved = measure(model, x, y, optimizer=optimizer, jacobian=False)
    # Both differences of float32 weights lose digits.
    assert figure(halved, "update_ratio", "0") == pytest.approx(figure(plain, "update_ratio", "0") / 2, rel=1e-3)


# --- files


def test_a_reader_finds_the_version_of_the_layout(tmp_path):
    result = measure(net(), torch.randn(8, 6), jacobian=False)
    result.to_json(tmp_path / "profile.json")
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["schema_version"] == SCHEMA_VERSION == 1
    assert {"dead", "saturated", "update_ratio", "state_mean"} <= content["columns"].keys()
    assert len(content["columns"]["state_mean"]) == content["rows"] == 5
