"""Permuted sequential digits: the networks, the split, and a record that goes on where a run was cut off."""

import csv

import numpy as np
import pytest
import torch

from lcw_ops.bench.reproduce import permuted_digits as experiments
from lcw_ops.bench.reproduce.permuted_digits import NETWORKS, CoRNN, Record
from lcw_ops.jobs import images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def digits():
    """Images of 6 pixels, whose class is the brightest pixel."""
    source = np.random.default_rng(0)
    y = source.integers(0, 6, 250)
    x = source.integers(0, 60, (250, 6))
    x[np.arange(250), y] = 255
    return images.scaled("pixels", x[:200], y[:200], x[200:], y[200:])


@pytest.fixture
def run(digits, monkeypatch):
    monkeypatch.setattr(images, "load_mnist5k", lambda seed: digits)

    def main(path, *arguments):
        sizes = ["--trials", "2", "--search-epochs", "1", "--seeds", "2", "--epochs", "2"]
        networks = ["--network", "orthogonal filter", "--network", "plain RNN"]
        return experiments.main(["--out", str(path), *sizes, *networks, *arguments])

    return main


def figures(path):
    """The rows without dates and seconds, which differ from run to run."""
    with path.open() as file:
        return [
            {name: cell for name, cell in row.items() if name not in ("date", "seconds")}
            for row in csv.DictReader(file)
        ]


def test_networks_have_about_as_many_parameters():
    counts = []
    for network in NETWORKS.values():
        setting = network.draw(1)[0]
        counts.append(experiments.parameter_count(network.build(experiments._options(setting))))
    assert counts[0] == 17_930
    assert max(counts) == counts[0]
    assert min(counts) > 0.98 * counts[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_setting_of_a_search_can_be_built_and_differs(name):
    drawn = NETWORKS[name].draw(8)
    assert len({str(setting) for setting in drawn}) == 8
    for setting in drawn:
        model = NETWORKS[name].build(experiments._options(setting))
        assert model(torch.randn(3, 2)).shape == (2, 10)


def test_cornn_is_the_oscillator_of_its_formula():
    torch.manual_seed(0)
    model = CoRNN(2, 3, dt=0.1, gamma=2.0, epsilon=0.5).double()
    x = torch.randn(4, 1, 2, dtype=torch.float64)
    states, _ = model(x)
    w, v = model.state.weight.split(3, 1)
    y = z = torch.zeros(3, dtype=torch.float64)
    for step, state in zip(x[:, 0], states[:, 0], strict=True):
        force = torch.tanh(w @ y + v @ z + model.input.weight @ step + model.input.bias)
        z = z + 0.1 * (force - 2.0 * y - 0.5 * z)
        y = y + 0.1 * z
        torch.testing.assert_close(state, y, rtol=1e-13, atol=1e-13)


def test_the_search_never_sees_the_test_images(digits):
    search, test = experiments.splits(digits)
    assert (search.x.shape, search.x_judged.shape) == ((6, 160), (6, 40))
    assert (test.x.shape, test.x_judged.shape) == ((6, 200), (6, 50))
    seen = {tuple(column.tolist()) for part in (search.x, search.x_judged) for column in part.T}
    assert seen == {tuple(column.tolist()) for column in test.x.T}
    order = torch.randperm(6, generator=torch.Generator().manual_seed(experiments.ORDER_SEED))
    assert torch.equal(test.x_judged, digits.x_test[:, order].T)


def test_training_learns(digits):
    _, split = experiments.splits(digits)
    setting = NETWORKS["orthogonal filter"].draw(1)[0] | {"beta": 0.3, "rate": 0.01}
    *_, last = experiments.train(NETWORKS["orthogonal filter"], setting, split, 15, seed=0)
    assert last.accuracy > 0.9
    assert last.number == 15


def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_figures(run, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    assert run(whole) == 0
    trained = experiments.train

    def stop_after(runs):
        def train(*arguments, **options):
            nonlocal runs
            runs -= 1
            if runs < 0:
                raise KeyboardInterrupt
            yield from trained(*arguments, **options)

        return train

    for runs in (1, 2, 3):
        monkeypatch.setattr(experiments, "train", stop_after(runs))
        with pytest.raises(KeyboardInterrupt):
            run(parts)
    monkeypatch.setattr(experiments, "train", trained)
    # A process that was killed while it wrote leaves half a line.
    parts.write_text(parts.read_text() + "2026-01-01,abc,2.13")
    capsys.readouterr()
    assert run(parts) == 0
    assert "search: 4 runs, 4 of them done before" in capsys.readouterr().out
    assert figures(parts) == figures(whole)
    assert len(figures(parts)) == 4 + 2 * 2 * 2


def test_the_best_setting_by_validation_is_tested(run, tmp_path, capsys):
    path = tmp_path / "a.csv"
    run(path, "--picture", str(tmp_path / "a.png"))
    rows = figures(path)
    for name in ("orthogonal filter", "plain RNN"):
        of_network = [row for row in rows if row["network"] == name]
        search = {row["setting"]: float(row["accuracy"]) for row in of_network if row["stage"] == "search"}
        (tested,) = {row["setting"] for row in of_network if row["stage"] == "test"}
        assert search[tested] == max(search.values())
        assert {row["seed"] for row in of_network if row["stage"] == "test"} == {"1", "2"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # The whole grid is printed.
    assert capsys.readouterr().out.count('"rate"') == 4


def test_a_record_of_other_data_is_not_mixed_in(run, tmp_path):
    path = tmp_path / "a.csv"
    run(path)
    searched = experiments.search_runs(2, 1, ["plain RNN"])
    assert Record(path, "pixels").find(searched[0]) is not None
    assert Record(path, "mnist5k").find(searched[0]) is None
