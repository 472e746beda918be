"""The experiments with activated gradients: the command runs and compares the methods that it names.

The experiments' figures are in bench/results. test_gradient_activation_facts.py tests the numbers of steps on a saddle.
"""

import csv
import math

import pytest
import torch
from torch import nn

from lcw_ops.bench.reproduce import gradient_activation as experiments
from lcw_ops.bench.reproduce.gradient_activation import METHODS, NETWORKS, Network

pytestmark = pytest.mark.usefixtures("one_thread")

SHALLOW = Network("tanh", nn.Tanh, 1)


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(method):
    accuracy, loss = experiments.train(SHALLOW, METHODS[method], seed=0, epochs=2)
    assert accuracy > 0.85
    assert loss < 0.5


def test_a_seed_gives_the_same_figures():
    figures = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(figures))
        figures.append(experiments.train(SHALLOW, METHODS["activated momentum"], seed, epochs=1))
    assert figures[0] == figures[1] != figures[2]


def test_all_methods_begin_with_the_same_weights_and_samples(monkeypatch):
    firsts = []

    def epoch(model, optimizer, digits):
        (weight, *_) = model.parameters()
        firsts.append((weight.detach().clone(), torch.randperm(9), digits.x_train[:3]))
        optimizer.step()
        return 0.0

    monkeypatch.setattr(experiments, "_epoch", epoch)
    for method in METHODS.values():
        experiments.train(SHALLOW, method, seed=3, epochs=1)
    for other in firsts[1:]:
        assert all(torch.equal(*pair) for pair in zip(firsts[0], other, strict=True))


@pytest.mark.parametrize(
    ("plain", "activated"),
    [("plain, rate K", "activated momentum"), ("plain, rate K, decay 1/K", "activated gradient")],
)
def test_near_a_stationary_point_each_activation_is_its_plain_method(plain, activated):
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 20, dtype=torch.float64) * 1e-6
    ends = []
    for name in (plain, activated):
        method = METHODS[name]
        param = start.clone().requires_grad_()
        optimizer = experiments.optim.SGD([param], method.rate, 0.9, weight_decay=method.decay, **method.activation)
        for _ in range(5):
            param.grad = gradient.clone()
            optimizer.step()
        ends.append(param.detach())
    # beta |v| is below 1e-3 for a gradient or momentum v. There the activation is linear up to a relative (beta v)^2.
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5 * start.abs().max().item())
    assert (ends[0] - start).abs().max() > 0.1 * start.abs().max()


def test_networks_have_the_stated_layers():
    for network in NETWORKS:
        model = network.build(64, 10)
        assert sum(isinstance(module, nn.Linear) for module in model) == network.layers + 1
        assert sum(isinstance(module, network.activation) for module in model) == network.layers


def test_the_command_reports_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "CURVATURES", (1.0,))
    path = tmp_path / "figures.csv"
    assert experiments.main(["--seeds", "2", "--epochs", "1", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    digits = [row for row in rows if row["experiment"] == "digits"]
    assert len(digits) == len(NETWORKS) * len(METHODS) * 2 * 2
    assert {(row["method"], row["learning_rate"]) for row in digits} == {
        (name, str(method.rate * 0.1)) for name, method in METHODS.items()
    }
    saddle = {row["method"]: float(row["figure"]) for row in rows if row["experiment"] == "saddle"}
    assert saddle == {"plain": 145, "plain, rate K": 76, "activated gradient": 76}
    first = [float(row["figure"]) for row in digits if row["measure"] == "test accuracy"][:2]
    line = next(line for line in printed.splitlines() if "test accuracy" in line and "plain " in line)
    mean, spread = map(float, line.split()[-2:])
    assert mean == pytest.approx(sum(first) / 2, rel=1e-4)
    assert spread == pytest.approx(abs(first[0] - first[1]) / math.sqrt(2), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
def test_counts_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        experiments.main([option, "0"])
    assert "0 is not positive" in capsys.readouterr().err
