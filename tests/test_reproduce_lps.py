"""The experiments with initial weights: the laws of the rules, the exact bound, and that the command reports each rule.

The experiments' figures are in bench/results. tests/test_lps.py tests the shares of dead nets of three rules.
"""

import csv
import math

import pytest
import torch
from torch import nn

from lcw_ops.bench.reproduce import lps as experiments
from lcw_ops.bench.reproduce.lps import BOUND, METHODS, NETWORKS, RULES

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_constant_of_the_asymmetric_rule():
    sigma = -2 * math.sqrt(2) / (3 * math.sqrt(math.pi)) + math.sqrt(1 + 8 / (9 * math.pi))
    assert pytest.approx(sigma, abs=1e-4) == experiments.RAI_DEVIATION


def test_the_asymmetric_rule_has_one_beta_entry_in_every_group():
    units, inputs = 40_000, 3
    group = torch.column_stack(RULES["RAI"](units, torch.empty(0, inputs, dtype=torch.float64), False, generator()))
    # A mixture: 3 of 4 entries are normal, and one is Beta(2, 1), of mean 2/3 and second moment 1/2.
    normal_variance = experiments.RAI_DEVIATION**2 / inputs
    for column in group.T:
        assert abs(column.mean() - (2 / 3) / 4) < 5 * math.sqrt(0.5 / units)
        assert column.square().mean().item() == pytest.approx(0.75 * normal_variance + 0.5 / 4, rel=0.05)
    # The median of Beta(2, 1) is sqrt(1/2). A normal entry of deviation 0.35 is above it with a probability of 0.021.
    above = (group > math.sqrt(0.5)).double().sum(1).mean().item()
    tail = math.erfc(math.sqrt(0.5 / normal_variance) / math.sqrt(2)) / 2
    assert above == pytest.approx(0.5 + 3 * tail, abs=5 * math.sqrt(0.25 / units))
    assert group.max() < 6 * math.sqrt(normal_variance)


@pytest.mark.parametrize("rule", ["PyTorch's default", "Xavier", "He"])
def test_the_usual_rules_have_the_laws_of_torch(rule):
    units, inputs = 20_000, 5
    weight, bias = RULES[rule](units, torch.empty(0, inputs, dtype=torch.float64), False, generator())
    layer = nn.Linear(inputs, units)
    if rule == "Xavier":
        nn.init.xavier_uniform_(layer.weight)
    elif rule == "He":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if rule != "PyTorch's default":
        nn.init.zeros_(layer.bias)
    assert weight.square().mean().item() == pytest.approx(layer.weight.square().mean().item(), rel=0.03)
    assert bias.square().mean().item() == pytest.approx(layer.bias.square().mean().item(), rel=0.05)
    if rule != "He":
        assert weight.abs().max().item() == pytest.approx(layer.weight.abs().max().item(), rel=1e-3)


def test_a_net_is_constant_if_and_only_if_a_layer_is(monkeypatch):
    """Nets with known layers: alive, dead, dead but for the rounding at an anchor, and with a tiny slope only."""
    one, up = torch.ones(2, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    nets = {
        "alive": ([(one, zero), (up, zero)], False),
        "off": ([(one, zero), (up, zero - 10)], True),
        # -|x| + 2, then off except at the grid's point of the largest value, where rounding leaves 1e-16.
        "rounding": ([(one, zero), (-up, zero + 1e-16)], True),
        "saturated by the bias": ([(1e-9 * one, zero + 1), (1e-9 * up, zero + 1)] * 3, False),
        "on for negative inputs": ([(-one, zero), (up, zero)], False),
    }
    for name, (layers, constant) in nets.items():
        remaining = iter(layers)
        monkeypatch.setitem(RULES, name, lambda *_, remaining=remaining: next(remaining))
        # The second weight of the repeated net has two inputs, as all but the first one of the others.
        if name == "saturated by the bias":
            layers[2] = layers[4] = layers[1]
            remaining = iter(layers)
            monkeypatch.setitem(RULES, name, lambda *_, remaining=remaining: next(remaining))
        assert experiments.is_constant(name, 2, len(layers), generator()) is constant


@pytest.mark.parametrize("rule", RULES)
def test_shares_of_dead_nets_are_as_rare_as_the_bound_says(rule):
    nets = 60
    share = sum(experiments.is_constant(rule, 3, 10, g) for g in [generator(5)] for _ in range(nets)) / nets
    bound = experiments.bound(3, 10)
    assert bound == pytest.approx(1 - (7 / 8) ** 10)
    error = 5 * math.sqrt(bound * (1 - bound) / nets)
    # A whole layer that is constant on the grid is off at its first point, or on everywhere there, so a net dies less
    # often than at one input. Only the asymmetric and the anchored rule are far below.
    assert share < bound + error
    if rule in ("RAI", "LPS, anchored"):
        assert share < bound / 2
    else:
        assert share > bound / 2


def test_binomial_errors():
    assert experiments.binomial_error(0.5, 100) == pytest.approx(0.05)
    assert experiments.binomial_error(0.0, 100) == pytest.approx(math.sqrt(0.01 * 0.99 / 100))
    assert experiments.binomial_error(1.0, 100) == pytest.approx(experiments.binomial_error(0.0, 100))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_rule_fills_every_layer(name, method):
    x = torch.randn(300, 64, generator=generator())
    models = []
    for seed in (1, 1, 2):
        model = NETWORKS[name](64, 10)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        experiments.fill(model, method, x, generator(seed))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model(x).shape == (300, 10)
        models.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_training_learns_and_a_seed_gives_the_same_figures():
    (build,) = (network for name, network in NETWORKS.items() if "convolutions" in name)
    torch.manual_seed(1)
    first = experiments.train(build, "He", seed=0, epochs=2)
    torch.manual_seed(2)
    assert experiments.train(build, "He", seed=0, epochs=2) == first
    accuracy, loss = first
    assert accuracy > 0.7
    assert loss < 1.0


def test_the_command_reports_every_rule(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "WIDTHS", (2,))
    monkeypatch.setattr(experiments, "DEPTHS", (4,))
    methods = ("He", "LPS, joint", "LPS, anchored")
    monkeypatch.setattr(experiments, "METHODS", methods)
    path = tmp_path / "figures.csv"
    assert experiments.main(["--nets", "8", "--seeds", "2", "--epochs", "1", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    dying = [row for row in rows if row["experiment"] == "dying"]
    assert [row["method"] for row in dying] == [BOUND, *RULES]
    assert float(dying[0]["figure"]) == pytest.approx(1 - 0.75**4)
    for row in dying[1:]:
        share = float(row["figure"])
        assert (8 * share).is_integer()
        assert float(row["standard_error"]) == pytest.approx(experiments.binomial_error(share, 8))
    digits = [row for row in rows if row["experiment"] == "digits"]
    assert len(digits) == len(NETWORKS) * len(methods) * 2 * 2
    assert {row["method"] for row in digits} == set(methods)
    losses = [float(row["figure"]) for row in digits if row["measure"] == "training loss"][:2]
    line = next(line for line in printed.splitlines() if "training loss" in line)
    assert float(line.split()[-2]) == pytest.approx(sum(losses) / 2, abs=6e-4)


@pytest.mark.parametrize("option", ["--nets", "--seeds", "--epochs"])
def test_counts_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        experiments.main([option, "0"])
    assert "0 is not positive" in capsys.readouterr().err
