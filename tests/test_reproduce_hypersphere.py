"""The GmP paper's experiments: their data, and that the command runs and learns. Their figures are in bench/results."""

import csv

import numpy as np
import pytest
import torch

from lcw_ops.bench.reproduce import hypersphere
from lcw_ops.bench.reproduce.hypersphere import BANANA, LEVY, METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(data) -> list[torch.Tensor]:
    return [data.x_train, data.y_train, data.x_test, data.y_test]


def test_known_values_of_the_levy_function():
    assert hypersphere.levy(np.array([1.0, 5.0, -3.0])) == pytest.approx([0.0, 1.0, 1.0], abs=1e-15)
    # w = 1 + (x - 1) / 4 is 2.25 and -1.75, where sin(pi w)^2 = 1/2 and sin(2 pi w)^2 = 1.
    assert hypersphere.levy(np.array([6.0, -10.0])) == pytest.approx([0.5 + 2 * 1.25**2, 0.5 + 2 * 2.75**2])
    grid = np.linspace(-10, 10, 2001)
    assert grid[hypersphere.levy(grid).argmin()] == pytest.approx(1.0)


@pytest.mark.parametrize(("experiment", "train", "test", "features"), [(LEVY, 50, 201, 1), (BANANA, 800, 200, 2)])
def test_a_seed_gives_the_same_data(experiment, train, test, features):
    data, again, other = experiment.draw(3), experiment.draw(3), experiment.draw(4)
    shapes = [(train, features), (train, 1), (test, features), (test, 1)]
    assert [tuple(tensor.shape) for tensor in tensors(data)] == shapes
    assert all(tensor.dtype == torch.float64 for tensor in tensors(data))
    assert all(torch.equal(*pair) for pair in zip(tensors(data), tensors(again), strict=True))
    assert not torch.equal(data.x_train, other.x_train)


def test_bananas_are_standardised_and_both_classes_occur():
    data = BANANA.draw(0)
    torch.testing.assert_close(data.x_train.mean(0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(data.x_train.std(0, correction=0), torch.ones(2, dtype=torch.float64))
    for y in (data.y_train, data.y_test):
        assert y.unique().tolist() == [0.0, 1.0]
        assert 0.4 < y.mean() < 0.6


def test_learning_rate_and_weights_follow_the_watched_value():
    """After half the patience without a fall the rate is divided by 10. After all of it the run ends.

    The model then has its best weights.
    """
    rates, weights = [], []
    model = hypersphere.plain(1, 3).double()

    def watch(loss, model, data):
        weights.append(model[0].weight.detach().clone())
        return [3.0, 2.0, 1.0][len(weights) - 1] if len(weights) <= 3 else 1.0

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    experiment = hypersphere.replace(LEVY, watch=watch, patience=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Adam)
        assert hypersphere.train(experiment, model, LEVY.draw(0), 0.1, epochs=100) == 3 + 4
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 2)
    assert torch.equal(model[0].weight, weights[2])


@pytest.mark.parametrize("method", METHODS)
def test_training_reduces_the_error(method):
    y = LEVY.draw(0).y_test
    figure, done = hypersphere.run(LEVY, method, seed=0, epochs=100)
    assert done == 100
    assert figure < 0.6 * y.std().item()
    right, _ = hypersphere.run(BANANA, method, seed=0, epochs=5)
    assert right > 0.75


def test_a_seed_gives_the_same_figure():
    torch.manual_seed(1)
    first = hypersphere.run(BANANA, "GmP", seed=0, epochs=2)
    torch.manual_seed(2)
    assert hypersphere.run(BANANA, "GmP", seed=0, epochs=2) == first
    assert hypersphere.run(BANANA, "GmP", seed=1, epochs=2) != first


def test_the_command_reports_every_method(tmp_path, capsys):
    path = tmp_path / "figures.csv"
    assert hypersphere.main(["--seeds", "2", "--steps", "1", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "1-D Levy function (drawn): test RMSE" in printed
    assert "2-D banana (drawn): test accuracy" in printed
    lines = [line for line in printed.splitlines() if line.startswith(tuple(METHODS))]
    assert len(lines) == 2 * len(METHODS)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [(name, seed) for name in METHODS for seed in "01"] * 2
    of_first = [float(row["figure"]) for row in rows[:2]]
    mean, spread, published = map(float, lines[0].removeprefix("GmP").split())
    assert mean == pytest.approx(np.mean(of_first), abs=6e-4)
    assert spread == pytest.approx(np.std(of_first, ddof=1), abs=6e-4)
    assert published == float(rows[0]["published"]) == 0.496
    # The control with GmP's learning rate is ours, so the authors have no figure for it.
    assert {row["method"] for row in rows if row["published"] == "nan"} == {"plain, GmP's learning rate"}
    assert {row["learning_rate"] for row in rows if row["method"].endswith("learning rate")} == {"0.1"}


def test_one_seed_has_no_spread(capsys):
    assert hypersphere.main(["--experiment", "levy", "--seeds", "1", "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "nan" in printed
    assert "banana" not in printed


def test_the_benchmarks_file_of_bananas(tmp_path, capsys):
    generator = np.random.default_rng(0)
    points = generator.normal(5.0, 3.0, (1200, 2))
    classes = np.where(points.sum(1) > 10, 1, -1)
    path = tmp_path / "banana.csv"
    lines = [f"{a},{b},{label}" for (a, b), label in zip(points, classes, strict=True)]
    path.write_text("\n".join(["At1,At2,Class", *lines, ""]))
    data = hypersphere.banana_file_data(path, 0)
    assert [len(tensor) for tensor in tensors(data)] == [800, 800, 200, 200]
    torch.testing.assert_close(data.x_train.mean(0), torch.zeros(2, dtype=torch.float64))
    sums = data.x_train.sum(1)
    assert sums[data.y_train[:, 0] == 1].min() > sums[data.y_train[:, 0] == 0].max() - 0.1
    options = ["--experiment", "banana", "--banana-file", str(path), "--seeds", "1", "--steps", "1"]
    assert hypersphere.main(options) == 0
    assert "2-D banana (banana.csv): test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_counts_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        hypersphere.main([option, "0"])
    assert "0 is not positive" in capsys.readouterr().err
