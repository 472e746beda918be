"""The experiments with depth in parallel: their errors are measured right, and their counts are those of the solver.

Their figures are in bench/results.
"""

import csv
import itertools
import math
from dataclasses import replace

import pytest
import torch

from lcw_ops import functional as F
from lcw_ops.bench.reproduce import parallel_depth as experiments
from lcw_ops.bench.reproduce.parallel_depth import Row
from lcw_ops.bench.reproduce.sweeps_picture import headline_of, plot
from lcw_ops.reference.orthogonal_filter import orthogonal_filter as layer_by_layer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("h_L", "dh0", "dweight", "dbias", "dalpha", "dbeta")


@pytest.fixture
def small_chunks(monkeypatch):
    """With this size even a net of a few layers has several chunks, the last of which is shorter."""
    monkeypatch.setattr(experiments, "CHUNK", 7)


def in_float64(problem):
    tensors = {name: getattr(problem, name).double() for name in (*experiments.LEARNED, "cotangent")}
    filter = problem.filter
    return replace(problem, **tensors, filter=filter.double() if filter.is_floating_point() else filter)


def test_rounding_does_not_decide_a_relu():
    problem = experiments.draw(30, 64, 16, "haar", 10.0, "relu", seed=0)
    states = in_float64(problem).call(layer_by_layer, return_states=True)
    pre_activation = torch.einsum("lmi,loi->lmo", states[:-1], problem.weight.double()) + problem.bias[:, None]
    least = pre_activation.abs().amin((1, 2)) / pre_activation.square().mean((1, 2)).sqrt()
    assert least.min() > 0.9 * experiments.KINK_MARGIN
    # Without the margin, some of that many numbers would be nearer to 0.
    assert 30 * 64 * 16 * experiments.KINK_MARGIN * 0.5 > 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("filter", ["haar", "permutation"])
def test_errors_are_those_of_plain_float64_autograd(filter, shared, small_chunks):
    problem = experiments.draw(24, 3, 6, filter, 2.0, "tanh", seed=1)
    if shared:
        problem = replace(problem, alpha=problem.alpha[:1], beta=problem.beta[:1])
    exact = experiments.results(in_float64(problem), layer_by_layer)
    found = experiments.results(problem, F.orthogonal_filter)
    assert tuple(found) == NAMES
    # Make one element of each result wrong by a known share of the largest exact value.
    wrong = {name: tensor.clone() for name, tensor in found.items()}
    for name, tensor in wrong.items():
        tensor.view(-1)[-1] = exact[name].reshape(-1)[-1] + 0.25 * exact[name].abs().max()
    errors = experiments.errors(problem, {"kernel": found, "wrong": wrong})
    for name in NAMES:
        expected = (found[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        relative = errors[name].relative()
        assert relative["kernel"] == pytest.approx(expected.item(), rel=1e-6, abs=1e-12), name
        assert relative["kernel"] < 1e-4
        assert relative["wrong"] == pytest.approx(0.25, rel=1e-3), name


def test_a_result_that_is_not_finite_has_an_infinite_error(small_chunks):
    problem = experiments.draw(10, 2, 4, "permutation", 1.0, "relu", seed=0)
    found = experiments.results(problem, F.orthogonal_filter)
    found["dweight"][3, 1, 2] = math.nan
    assert experiments.errors(problem, {"kernel": found})["dweight"].absolute["kernel"] == math.inf


def test_state_errors_are_relative_to_their_own_state(small_chunks):
    problem = experiments.draw(20, 3, 6, "haar", 1.0, "sigmoid", seed=0)
    exact = in_float64(problem).call(layer_by_layer, return_states=True)

    def off(*tensors, **options):
        states = F.orthogonal_filter(*tensors, **options).clone()
        states[13, 2, 0] += 0.5 * states[13, 2].abs().max()
        return states

    errors = experiments.state_errors(problem, {"kernel": F.orthogonal_filter, "off": off})
    states = problem.call(F.orthogonal_filter, return_states=True).double()
    expected = ((states - exact).abs().amax(-1) / exact.abs().amax(-1)).max().item()
    assert errors["kernel"] == pytest.approx(expected, rel=1e-6)
    assert errors["off"] == pytest.approx(0.5, rel=1e-4)


def test_the_problem_of_a_net_is_its_training_step():
    settings = experiments.job.Settings(kind="mlp", depth=12, width=8, steps=1, lr=0.01, c=1.0, filter="haar")
    model = experiments.job.make_network(settings, 5, 3)
    x, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
    found = experiments.results(experiments.of_net(model, x, y), F.orthogonal_filter)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found["dweight"], model.weight.grad)
    torch.testing.assert_close(found["dbias"], model.bias.grad)


def test_the_grid_has_the_stated_cells():
    for depth in experiments.DEPTHS:
        cells = experiments.grid_cells(depth)
        assert len(set(cells)) == len(cells) == (288 if depth <= 100 else 48 if depth == 5000 else 16)
        assert {cell[0] for cell in cells} == {depth}
        both = {(cell[1], cell[2]) for cell in cells}
        assert both == set(itertools.product(experiments.CS, experiments.ACTIVATIONS))
        pairs = {(cell[3], cell[4]) for cell in cells}
        assert pairs == set(itertools.product(experiments.ROWS, experiments.WIDTHS))
        assert {cell[5] for cell in cells} == set(experiments.FILTERS)


CELL = (9, 1.0, "tanh", 2, 6, "haar")


def test_a_cell_within_the_rule():
    name, found, allowed = experiments.judge(CELL)
    assert name in NAMES
    assert set(found) == {"parallel", "sequential", "eager"}
    assert 0 <= found["parallel"] <= allowed == 2 * found["eager"] + experiments.EPS


def test_a_wrong_solver_is_caught_after_every_draw(monkeypatch):
    drawn = []

    def wrong(window):
        def solve(h0, weight, *tensors, **options):
            drawn.append(h0)
            return F.orthogonal_filter(h0, weight * (1 + 1e-3), *tensors, **options)

        return solve

    monkeypatch.setattr(experiments, "parallel", wrong)
    _, found, allowed = experiments.judge(CELL, number=3)
    assert found["parallel"] > 2 * allowed
    assert len(drawn) == experiments.MOST_DRAWS
    assert len({tuple(h0.flatten().tolist()) for h0 in drawn}) == len(drawn)


def test_beyond_a_depth_the_sequential_kernel_is_the_yardstick(monkeypatch):
    monkeypatch.setattr(experiments, "MOST_EAGER", 5)
    monkeypatch.setattr(experiments, "WINDOW", 4)
    _, found, allowed = experiments.judge(CELL)
    assert set(found) == {"parallel", "sequential"}
    assert found["parallel"] <= allowed == 2 * found["sequential"] + experiments.EPS


def test_a_lack_of_memory_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(experiments.machine, "available_memory_bytes", lambda device: 10**9)
    monkeypatch.setattr(experiments, "grid_cells", lambda depth: [CELL])
    assert list(experiments.grid_figures((9,))) == []
    assert "left out, because it needs 1.1 GB: L=9 c=1 tanh M=2 N=6 haar" in capsys.readouterr().out


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sweeps_of_a_net_in_training(monkeypatch, tmp_path):
    """The sweeps are counted in a net in training, and plotted."""
    monkeypatch.setattr(experiments, "FILTERS", ("permutation",))
    figures = list(experiments.sweep_figures(24, (0, 1), 10))
    rows = list(experiments.rows_of("sweeps", figures))
    by_place = {(row.step, row.window, row.measure): row for row in rows}
    accuracies = [by_place[step, None, "test accuracy"].figure for step in (0, 1)]
    assert accuracies[1] > accuracies[0] + 0.1
    for step, window, direction in itertools.product((0, 1), (24, 10), ("forward", "backward")):
        sweeps, most, given_up = (
            by_place[step, window, f"{direction} {figure}"].figure
            for figure in ("sweeps", "sweeps, at most", "windows given up")
        )
        assert 2 <= sweeps <= most <= 16
        assert given_up == 0
        assert 0 < by_place[step, window, f"{direction} contraction"].figure < 0.5
        assert by_place[step, window, f"{direction} error estimate"].figure < 1e-6
    for row in rows:
        if row.measure.startswith("error of"):
            assert row.figure <= 4 * row.sequential + 4 * experiments.EPS, row.measure
    plot(rows, tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").read_bytes().startswith(b"\x89PNG")
    headline = headline_of([row for row in rows if row.window is not None], rows[0].setting, 24)
    assert headline.startswith("24 layers at once: ")
    assert headline.endswith("backward after 1 steps")


def test_sweeps_of_initial_nets():
    """Nets that change more in a layer, or in the same way in all layers, take more sweeps."""
    rows = list(experiments.rows_of("initial", experiments.initial_figures(200)))
    sweeps = {row.setting: row.figure for row in rows if row.measure == "forward sweeps"}
    given_up = {row.setting: row.figure for row in rows if row.measure == "forward windows given up"}
    assert tuple(sweeps) == tuple(experiments.STARTS)
    first = sweeps["a weight per layer"]
    assert 2 <= first <= sweeps["c = 3"] <= sweeps["c = 10"]
    assert first < sweeps["one weight for all, inputs"] <= sweeps["one weight for all, inputs, identity"]
    assert given_up["a weight per layer"] == 0


def test_the_command_writes_beside_other_experiments(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "grid_cells", lambda depth: [(depth, *CELL[1:])])
    path = tmp_path / "figures.csv"
    assert experiments.main(["error", "--depth", "12", "--out", str(path)]) == 0
    assert experiments.main(["grid", "--depth", "2", "--depth", "5", "--out", str(path)]) == 0
    assert experiments.main(["grid", "--depth", "3", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "L=5: 1 of 1 within the rule" in printed
    rows = read(path)
    assert list(rows[0]) == list(Row.__dataclass_fields__)
    # The errors are those of two filters with two values of c, in the default window and with all layers at once. Of
    # the grids only the last one is kept.
    assert [row["experiment"] for row in rows] == ["error"] * 8 + ["grid"]
    for row in rows[:8]:
        assert 0 < float(row["figure"]) < 1e-5
        assert float(row["sequential"]) > 0
        assert float(row["eager"]) > 0
    assert rows[-1]["setting"] == "L=3 c=1 tanh M=2 N=6 haar"


def test_a_wrong_cell_sets_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "grid_cells", lambda depth: [CELL])
    monkeypatch.setattr(
        experiments, "judge", lambda *_: ("h_L", {"parallel": 1.0, "sequential": 1e-7, "eager": 1e-7}, 3e-7)
    )
    assert experiments.main(["grid", "--depth", "9"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "L=9: 0 of 1 within the rule" in printed


def test_wrong_arguments(capsys):
    for arguments, message in ((["nothing"], "no experiment is called 'nothing'"), (["--depth", "0"], "not positive")):
        with pytest.raises(SystemExit):
            experiments.main(arguments)
        assert message in capsys.readouterr().err
