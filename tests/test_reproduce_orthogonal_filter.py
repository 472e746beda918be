"""The experiments with the orthogonal filter: exact at small sizes, and the command compares the methods it names."""

import csv
import math

import pytest
import torch

from lcw_ops.bench.reproduce import orthogonal_filter as experiments
from lcw_ops.jobs import data
from lcw_ops.nn.orthogonal_filter import make_filter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net():
    """(weight, filter, x) of 20 layers of 8, in float64."""
    torch.manual_seed(0)
    weight = torch.randn(20, 8, 8, dtype=torch.float64) / math.sqrt(8)
    return weight, make_filter("haar", 8, torch.float64), torch.randn(8, dtype=torch.float64)


def run(weight, filter, c, x):
    beta = c / len(weight)
    for w in weight:
        x = (1 - beta) * filter @ x + beta * torch.tanh(w @ x)
    return x


def test_the_jacobian_is_autograds(net):
    weight, filter, x = net
    expected = torch.autograd.functional.jacobian(lambda h: run(weight, filter, 2.0, h), x)
    torch.testing.assert_close(experiments.jacobian(weight, filter, 2.0, x), expected, rtol=1e-12, atol=1e-13)


def test_gradient_norms_are_autograds(net):
    weight, filter, x = net
    norms = []
    for first in range(20):
        h = run(weight[:first], filter, 2.0 * first / 20, x) if first else x
        h = h.detach().requires_grad_()
        run(weight[first:], filter, 2.0 * (20 - first) / 20, h).sum().backward()
        norms.append(h.grad.norm().item() / math.sqrt(8))
    smallest, largest = experiments.gradient_norms(weight, filter, 2.0, x[None])
    assert smallest == pytest.approx(min(norms), rel=1e-12)
    assert largest == pytest.approx(max(norms), rel=1e-12)


def test_singular_values_are_close_together_with_the_filter_and_vanish_without():
    figures = {(method, measure): figure for *_, method, _, _, measure, figure in experiments.isometry_figures(1, 500)}
    ours, plain = "orthogonal filter, c = 1", "plain tanh"
    assert 0.33 < figures[ours, "smallest singular value"] < figures[ours, "largest singular value"] < 0.41
    assert figures[plain, "largest singular value"] < 0.2
    assert 0.3 < figures[ours, "smallest gradient norm"] < figures[ours, "largest gradient norm"] < 1.05


@pytest.mark.parametrize(("method", "alpha", "beta"), [("plain", 0.0, 1.0), ("residual", 1.0, 0.2)])
def test_a_deep_net_without_filter_is_the_net_of_its_name(method, alpha, beta):
    digits = data.load_digits(0)
    model = experiments.deep_net(method, digits, 5)
    h = model.input_layer(digits.x_test)
    for weight, bias in zip(model.weight, model.bias, strict=True):
        h = alpha * h + beta * torch.tanh(h @ weight.T + bias)
    torch.testing.assert_close(model(digits.x_test), model.output_layer(h), rtol=1e-4, atol=1e-5)


def test_two_numbers_of_an_adding_sequence_are_marked():
    x, target = experiments.adding_batch(50, 40, torch.Generator().manual_seed(0))
    values, marks = x.unbind(-1)
    assert ((marks == 0) | (marks == 1)).all()
    assert (marks[:25].sum(0) == 1).all()
    assert (marks[25:].sum(0) == 1).all()
    torch.testing.assert_close((values * marks).sum(0), target)
    assert values.min() >= 0
    assert values.max() < 1


def test_a_short_memory_is_learned():
    accuracy, loss = experiments.train_memory("orthogonal filter", 0.06, 0, steps=60, length=100)
    assert accuracy > 0.7
    assert loss < 1.5


def test_methods_over_time_have_about_as_many_parameters():
    counts = {
        method: sum(p.numel() for p in experiments.network_over_time(method, 1, 10, 100, 64).parameters())
        for method in experiments.TIME_RATES
    }
    assert max(counts.values()) < 1.1 * min(counts.values())


def test_the_command_writes_every_figure(tmp_path, capsys):
    path = tmp_path / "a.csv"
    sizes = ["--seeds", "1", "--depth", "30", "--length", "64", "--steps", "2"]
    assert experiments.main([*sizes, "--out", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == experiments._count(["isometry", "deep", "memory", "adding"], 1)
    assert {row["experiment"] for row in rows} == {"isometry", "deep", "memory", "adding"}
    for task, (_, measures) in experiments.TASKS.items():
        for method in experiments.TIME_RATES:
            own = [row for row in rows if (row["experiment"], row["method"]) == (task, method)]
            searched = {r["learning_rate"]: float(r["figure"]) for r in own if r["measure"].startswith("search")}
            (used,) = {row["learning_rate"] for row in own if row["measure"] == measures[0]}
            assert searched[used] == min(searched.values())
    assert "plain RNN" in capsys.readouterr().out
