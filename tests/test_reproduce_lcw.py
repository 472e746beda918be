"""The LCW paper's statements: the nets begin as they should, and the command compares the methods that it names."""

import csv

import pytest
import torch
from torch import nn

from lcw_ops.bench.reproduce import lcw as experiments
from lcw_ops.bench.reproduce.lcw import BATCH_NORM, SIGMOID
from lcw_ops.jobs import data
from lcw_ops.nn import LCWConv2d, LCWLinear

pytestmark = pytest.mark.usefixtures("one_thread")

TEN_LAYERS = experiments.Experiment(
    lambda method, features, classes: experiments.sigmoid_net(method, features, classes, layers=10),
    SIGMOID["sigmoid"].methods,
)


def build(experiment, method):
    torch.manual_seed(0)
    return experiment.build(method, 64, 10)


@pytest.mark.parametrize("method", ["plain, same variance", "LCW"])
def test_pre_activations_keep_their_variance(method):
    model = build(SIGMOID["sigmoid"], method)
    x, squares = data.load_digits(0).x_train, []
    for module in model:
        x = module(x)
        if isinstance(module, experiments.LAYERS):
            squares.append(x.square().mean().item())
    # The first layer sees data whose constant pixels lower the variance. A layer of 64 units has a spread of its own.
    assert all(0.4 < square < 2.5 for square in squares[:20])


@pytest.mark.parametrize("kind", BATCH_NORM)
def test_methods_differ_only_in_the_constraint(kind):
    plain, constrained = (build(BATCH_NORM[kind], method) for method in ("plain", "LCW"))
    assert {type(m) for m in plain} - {type(m) for m in constrained} <= {nn.Linear, nn.Conv2d}
    assert {type(m) for m in constrained} - {type(m) for m in plain} <= {LCWLinear, LCWConv2d}
    assert [p.shape for p in plain.parameters()] == [p.shape for p in constrained.parameters()]
    for first, second in zip(plain.parameters(), constrained.parameters(), strict=True):
        if first.dim() > 1 and first.numel() > 1000:
            # Both are drawn with the same deviation.
            torch.testing.assert_close(first.std(), second.std(), rtol=0.1, atol=0)


def test_the_shift_of_a_known_layer():
    layer = nn.Linear(2, 3, bias=False)
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    model = nn.Sequential(layer).double()
    z = x @ layer.weight.T
    expected = (z.mean(0).square().mean() / z.var(0, correction=0).mean()).sqrt().item()
    assert experiments.shifts(model, x) == [pytest.approx(expected, rel=1e-12)]


def test_the_shift_is_smaller_and_the_gradient_survives_with_lcw():
    rows = list(experiments.shift_figures(1))
    figures = {(kind, method, measure): figure for _, kind, method, _, _, measure, figure in rows}
    for kind, experiment in BATCH_NORM.items():
        shifts = [figures[f"{kind}, batch norm", method, "shift"] for method in experiment.methods]
        assert shifts[1] < 0.3 * shifts[0]
    ratio = "gradient variance, first / last"
    deep = f"{experiments.SIGMOID_LAYERS} sigmoid layers"
    # Predicted for infinite width: 26, 4e-82 and 2e-125.
    assert 5 < figures[deep, "LCW", ratio] < 500
    assert 1e-84 < figures[deep, "plain, same variance", ratio] < 1e-79
    assert 1e-129 < figures[deep, "plain, Glorot", ratio] < 1e-121


def test_ten_layers_train_with_lcw_and_not_without():
    digits = data.load_digits(0)
    accuracies = [
        experiments._run(TEN_LAYERS, method, digits, share=1.0, rate=0.03, seed=0, epochs=4)[0]
        for method in ("plain, Glorot", "LCW")
    ]
    assert accuracies[0] < 0.3
    assert accuracies[1] > 0.8


def test_a_training_that_diverges_counts_as_failed():
    digits = data.load_digits(0)
    figures = experiments._run(TEN_LAYERS, "LCW", digits, share=0.1, rate=1e38, seed=0, epochs=1)
    assert figures[0] in (0.0, pytest.approx(0.1, abs=0.06))


def test_the_command_writes_every_figure_and_prints_the_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "SIGMOID", {"sigmoid": TEN_LAYERS})
    monkeypatch.setattr(experiments, "RATES", (0.01, 0.1))
    path = tmp_path / "a.csv"
    arguments = ["--experiment", "sigmoid", "--seeds", "1", "--epochs", "1", "--out", str(path)]
    assert experiments.main(arguments) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (2 + 2) == experiments._count(["sigmoid"], 1)
    printed = capsys.readouterr().out
    for method in TEN_LAYERS.methods:
        searched = {
            float(row["learning_rate"]): float(row["figure"])
            for row in rows
            if row["method"] == method and row["measure"] == "search: training loss"
        }
        (reported,) = {
            float(r["learning_rate"]) for r in rows if r["method"] == method and r["measure"] == "test accuracy"
        }
        assert searched[reported] == min(searched.values())
        assert method in printed
