"""The table's selection, the plot, files read back, and the comparison of two profiles."""

import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib import image
from support.profiles import made_profile, measure
from torch import nn

from lcw_ops.profile import compare, headline, plot, read
from lcw_ops.profile.compare import match
from lcw_ops.profile.headline import elided
from lcw_ops.profile.result import COLUMNS, SCHEMA_VERSION, notable_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def net(layers=10, width=8):
    return nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())])


# ---- Names and rows of the table ----


@pytest.mark.parametrize(
    ("name", "most", "expected"),
    [
        ("encoder.layers.119.attention.self.query", 39, "encoder.layers.119.attention.self.query"),
        ("encoder.layers.119.attention.self.query", 30, "encoder.layers.119…self.query"),
        ("encoder.layers.119.attention.self.query", 20, "encoder…119…query"),
        ("encoder.layers.119.attention.self.query", 11, "…119…query"),
        ("encoder.layers.119.attention.self.query", 9, "…119…uery"),
        ("a_name_without_any_dot", 9, "a_na…_dot"),
        ("layer[12345]", 12, "layer[12345]"),
        ("", 5, ""),
    ],
)
def test_names_lose_words_in_their_middle(name, most, expected):
    assert elided(name, most) == expected
    assert len(expected) <= most


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 14, 50, 5000])
def test_the_table_shows_each_row_once_and_the_ends(rows):
    shown = notable_rows(made_profile(rows, gradient_norm=np.linspace(1, 2, rows)), 12)
    assert len(shown) == min(rows, 12)
    assert list(shown) == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, rows - 1)


def test_the_table_shows_rows_where_something_happens():
    rows = 1000
    norms, states, seconds = np.ones(rows), np.ones(rows), np.full(rows, 1e-3)
    norms[:500] = 1e-6
    states[321] = math.nan
    seconds[777] = 1.0
    result = made_profile(rows, gradient_norm=norms, state_rms=states, forward_seconds=seconds)
    assert {0, 321, 499, 500, 777, 999} <= set(notable_rows(result, 12))
    # Rows between two that differ by much are shown too: here all changes are in 50 of 1000 rows.
    norms = np.exp(np.interp(np.arange(rows), [0, 200, 250, 999], [0, 0, 20, 20]))
    shown = notable_rows(made_profile(rows, gradient_norm=norms), 12)
    assert np.sum((shown >= 199) & (shown <= 250)) >= 5


def test_an_even_net_is_shown_evenly():
    shown = notable_rows(made_profile(1000, gradient_norm=np.exp(-np.arange(1000) / 100)), 12)
    assert np.diff(shown).max() < 200


def test_long_names_fit_the_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"model.encoder.layers.{row}.attention.self.attention.query_projection.linear" for row in range(20)]
    table = made_profile(20, names, gradient_norm=np.ones(20), state_rms=np.ones(20)).table()
    rows = [line for line in table.splitlines() if re.search(r"^ ?\S*…\S*\.linear ", line)]
    assert len(rows) == 12
    assert all(len(line) <= 80 for line in rows)
    assert all(re.search(rf"\b{row}….*\.linear ", rows[place]) for place, row in ((0, 0), (-1, 19)))


# ---- The plot ----


def test_the_plot_has_a_headline_names_and_no_empty_margins(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    names = [f"encoder.layers.{row}.attention" for row in range(30)]
    columns = {"gradient_norm": np.logspace(-6, 0, 30), "state_rms": np.ones(30)}
    result = made_profile(30, names, activation_shift=np.ones(30), **columns)
    result.plot(tmp_path / "a.png")
    (figure,) = drawn
    assert figure.texts[0].get_text() == headline.headline(result)[0]
    gradient, state, shift = figure.axes
    for axes in (gradient, state, shift):
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert len(labels) >= 2
        assert set(labels) <= {elided(name, plot.MOST_OF_NAME) for name in names}
    monkeypatch.undo()
    result.plot(tmp_path / "a.png")
    ink = np.argwhere(image.imread(tmp_path / "a.png")[..., :3].min(-1) < 0.9)
    assert ink.min(0).max() < 60
    assert (np.array([900, 1600]) - ink.max(0)).max() < 60


def test_rows_without_a_figure_are_not_drawn_as_overflow(monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    result = made_profile(10, gradient_norm=[1.0] * 10, weight_gradient_norm=[1.0, math.nan] * 5)
    result.missing["weight_gradient_norm"][1::2] = 1
    result.plot("a.png")
    assert "overflow" not in [tick.get_text() for axes in drawn[0].axes for tick in axes.get_yticklabels()]


@pytest.mark.parametrize("norms", [[math.nan] * 3, [0.0] * 3, [math.inf, 1.0, 1.0], [5.0, 5.0, 5.0]])
def test_headlines_and_plots_of_any_gradient(norms, tmp_path):
    result = made_profile(3, gradient_norm=norms)
    result.plot(tmp_path / "a.png")
    finding, _ = headline.headline(result)
    assert finding


# ---- Files ----


def test_json_is_read_back_whole(tmp_path):
    result = measure(net(), torch.randn(4, 8))
    result.columns["state_rms"][:3] = math.nan, math.inf, -math.inf
    result.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["schema_version"] == SCHEMA_VERSION
    again = read(tmp_path / "a.json")
    for name, values in result.columns.items():
        np.testing.assert_array_equal(again.columns[name], values)
        if name != "name":
            assert [again.reason(name, row) for row in range(20)] == [result.reason(name, row) for row in range(20)]
    assert again.jacobians == result.jacobians
    assert again.timing == result.timing
    for figure in ("name", "loss", "samples", "peak_memory_bytes", "backend", "machine", "absent", "not_finite"):
        assert getattr(again, figure) == getattr(result, figure)
    assert again._figures() == result._figures()
    again.to_json(tmp_path / "b.json")
    contents = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("column", [*(name for name in COLUMNS if name != "name"), "a column of the future"])
def test_a_json_file_without_a_column_has_every_form(column, tmp_path):
    result = made_profile(12, state_rms=[1.0] * 12, gradient_norm=10.0 ** np.arange(12), parameters=[3.0] * 12)
    result.to_json(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    content["columns"].pop(column, None)
    content["missing"][column] = {"it was left out": [[0, 11]]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    again = read(tmp_path / "a.json")
    kinds = [one.kind for one in again.verdict()]
    assert ("vanishing" in kinds) == (column != "gradient_norm")
    assert again.table().startswith("Verdict: ")
    again.to_html(tmp_path / "a.html")
    again.to_json(tmp_path / "b.json")
    assert read(tmp_path / "b.json").table() == again.table()
    assert compare(result, again).table()
    if column in COLUMNS:
        assert again.reason(column, 11) == "the file does not have this column"


def test_a_profile_from_csv_has_its_table_page_and_plot(tmp_path):
    measure(net(), torch.randn(8, 8)).to_csv(tmp_path / "a.csv")
    again = read(tmp_path / "a.csv")
    assert "Verdict: " in again.table()
    assert "threads" not in again.table()
    assert "GFLOP" not in again.table()
    again.to_html(tmp_path / "a.html")
    again.plot(tmp_path / "a.png")
    assert (tmp_path / "a.html").stat().st_size > 10_000
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_csv_is_read_back(tmp_path):
    result = measure(net(), torch.randn(4, 8))
    result.columns["state_rms"][:2] = math.nan, math.inf
    result.to_csv(tmp_path / "a.csv")
    again = read(tmp_path / "a.csv")
    assert again.is_missing("state_rms").sum() == 0
    for name, values in result.columns.items():
        if name == "name":
            assert list(again.columns[name]) == list(values)
        else:
            np.testing.assert_allclose(again.columns[name], values, rtol=1e-6)
            np.testing.assert_array_equal(again.is_missing(name), result.is_missing(name))
    assert compare(result, again).is_equal


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "no columns"),
        ("a.json", '{"columns": {"name": "which"}}', "Read its layers.csv"),
        ("a.json", '{"name": "a", "schema_version": 99, "columns": {"name": []}}', "schema 99"),
        ("a.csv", "", "no column name"),
        ("a.csv", "name,state_rms\na,b\n", "not a number"),
        ("a.csv", "name,state_rms\na\n", "fewer cells"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


# ---- Comparison ----


def random_profile(rows, seed=0, names=None):
    random = np.random.default_rng(seed)
    columns = ("state_rms", "gradient_norm", "activation_shift", "weight_gradient_norm")
    return made_profile(rows, names, **{name: np.exp(random.normal(size=rows)) for name in columns})


def test_five_percent_in_one_of_50_000_layers_is_the_top_row():
    before, after = random_profile(50_000), random_profile(50_000)
    after.columns["weight_gradient_norm"][31_415] *= 1.05
    after.columns["state_rms"] *= 1 + 1e-4 * np.random.default_rng(1).normal(size=50_000)
    result = compare(before, after)
    assert [(change.name, change.column) for change in result.changes] == [("layers.31415", "weight_gradient_norm")]
    assert result.changes[0].change == pytest.approx(0.05)
    assert "layers.31415" in result.table()


@pytest.mark.parametrize("layer", [0, 20, 39])
def test_the_changed_layer_is_above_the_rows_that_follow_from_it(layer):
    """A weight that is larger by 5 % changes the states after it, and the gradients before it."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(40)])
    for each in model:
        nn.init.orthogonal_(each.weight)
    x = torch.randn(8, 16)
    before = measure(model, x, jacobian=False)
    with torch.no_grad():
        model[layer].weight.mul_(1.05)
    result = compare(before, measure(model, x, jacobian=False))
    assert len(result.changes) == 40
    assert (result.changes[0].row, result.changes[0].column) == (layer, "state_rms")


def test_equal_runs_differ_in_nothing():
    """Two profiles of one model: other times, the same figures."""
    model, x = net(50), torch.randn(4, 8)
    first, second = (measure(model, x, jacobian=False) for _ in range(2))
    random = np.random.default_rng(0)
    for result in (first, second):
        # Times with a heavy tail, on a machine that is twice as slow the second time.
        times = 1e-4 * np.exp(0.2 * random.standard_t(4, size=len(result))) * (1 if result is first else 2)
        result.columns["forward_seconds"], result.missing["forward_seconds"] = times, np.zeros(len(result), np.uint16)
    result = compare(first, second)
    assert result.is_equal
    assert not result.times
    assert "no difference" in result.table()


def test_a_layer_that_became_slow_is_told_from_noise():
    random = np.random.default_rng(0)
    first, second = (made_profile(100, forward_seconds=1e-4 * np.exp(0.1 * random.normal(size=100))) for _ in range(2))
    second.columns["forward_seconds"][42] *= 5
    result = compare(first, second)
    assert [change.name for change in result.times] == ["layers.42"]
    assert result.is_equal


def test_noise_around_zero_is_no_change():
    first, second = random_profile(10), random_profile(10)
    first.columns["activation_shift"][:] = 1e-9
    second.columns["activation_shift"][:] = -3e-9
    first.columns["gradient_norm"][3], second.columns["gradient_norm"][3] = 1e-43, 5e-44
    assert compare(first, second).is_equal


@pytest.mark.parametrize(
    ("before", "after", "differs"), [(1, "nan", True), ("inf", "inf", False), ("nan", "nan", False)]
)
def test_nan_and_infinity_are_compared(before, after, differs):
    first, second = random_profile(10), random_profile(10)
    first.columns["state_rms"][4], second.columns["state_rms"][4] = float(before), float(after)
    second.columns["gradient_norm"][8] *= 100
    result = compare(first, second)
    assert [change.row for change in result.changes] == ([4, 8] if differs else [8])


def test_signs_of_the_figures_do_not_matter():
    """Means of both signs that grow by 5 % change alike: no row stands out but the first."""
    first, second = random_profile(10), random_profile(10)
    means = np.array([(-1.0) ** row for row in range(10)])
    for result, factor in ((first, 1), (second, 1.05)):
        result.columns["state_mean"], result.missing["state_mean"] = factor * means, np.zeros(10, np.uint16)
    assert compare(first, second).changes[0].row == 0
    assert {round(change.step, 3) for change in compare(first, second).changes} == {0.048, 0.0}


def test_nan_that_spreads_begins_at_the_top_row():
    first, second = random_profile(10), random_profile(10)
    second.columns["state_rms"][4:] = math.nan
    assert compare(first, second).changes[0].row == 4
    second = random_profile(10)
    second.columns["gradient_norm"][:7] = math.inf
    assert compare(first, second).changes[0].row == 6


def test_rows_are_matched_by_name_and_then_by_depth():
    same = [f"layers.{row}" for row in range(5)]
    assert match(np.array(same), np.array(same)).tolist() == [[row, row] for row in range(5)]
    # Two new rows at the end have no partners; renamed rows between others have.
    assert match(np.array(["a", "b", "c"]), np.array(["a", "x", "c", "d", "e"])).tolist() == [[0, 0], [1, 1], [2, 2]]
    pairs = match(np.array([f"a{row}" for row in range(10)]), np.array([f"b{row}" for row in range(20)]))
    assert len(pairs) == 10
    assert np.abs((pairs[:, 0] + 0.5) / 10 - (pairs[:, 1] + 0.5) / 20).max() < 0.06
    assert match(np.array(["a"]), np.array([], dtype=str)).tolist() == []
    result = compare(random_profile(3, names=["a", "b", "c"]), random_profile(5, names=["a", "x", "c", "d", "e"]))
    assert result.only_second == ["d", "e"]
    assert not result.is_equal
    assert "rows only after" in result.table()


def test_figures_that_only_one_profile_has_are_counted(tmp_path):
    first, second = random_profile(10), random_profile(10)
    second.missing["state_rms"][:4] = 1
    result = compare(first, second)
    assert result.availability == {"state_rms": (4, 0)}
    second.columns["gradient_norm"][2] = 7.0
    result = compare(first, second)
    result.to_csv(tmp_path / "changes.csv")
    assert (tmp_path / "changes.csv").read_text().splitlines()[1].startswith("layers.2,layers.2,2,2,gradient_norm,")


def test_comparisons_refuse_other_things():
    with pytest.raises(TypeError, match="Read a file"):
        compare("a.json", random_profile(2))
    with pytest.raises(ValueError, match="tolerance"):
        compare(random_profile(2), random_profile(2), tolerance=math.nan)
