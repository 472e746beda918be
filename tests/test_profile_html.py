"""The page of a profile: it holds every row, loads nothing, survives hostile names, and works in a browser."""

import base64
import json
import math
import re
import time
import zlib
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import browser
from support.profiles import made_profile
from torch import nn

from lcw_ops.profile import html, profile
from lcw_ops.profile.result import COLUMNS, Profile

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "{{data}} }} {{",
    "<!-- a.b.c",
    "\"quoted' & <b>bold</b>",
    "einheit.ü.層.\u2028.\ud800",
    "",
    "a." * 200 + "end",
]
HARD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.7976931348623157e308, -1e-300, 1 / 3]


def make_page(result: Profile) -> str:
    return html.make_page(result, result._figure_rows(), COLUMNS)


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and the text of every script by its id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.texts[self._script] = self.texts.get(self._script, "") + data


def not_json(constant):
    raise AssertionError(f"{constant} is not JSON")


def unpacked(page: str) -> tuple[dict, list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(header, names, columns, numbers of reasons), read as the page's script reads them."""
    texts = Elements(page).texts
    header = json.loads(texts["header"], parse_constant=not_json)
    block = zlib.decompress(base64.b64decode(texts["data"]))
    length, rows = int.from_bytes(block[:4], "little"), header["rows"]
    names, at = json.loads(block[4 : 4 + length]), 4 + length
    columns, reasons = {}, {}
    for column in header["columns"]:
        raw = np.zeros((rows, 8), np.uint8)
        planes = np.frombuffer(block, np.uint8, column["bytes"] * rows, at).reshape(column["bytes"], rows)
        raw[:, : column["bytes"]], at = planes.T, at + column["bytes"] * rows
        columns[column["name"]] = raw.view(">f8")[:, 0].astype(float)
        if column["reasons"]:
            reasons[column["name"]] = np.frombuffer(block, np.uint8, 2 * rows, at).reshape(2, rows).T @ [256, 1]
            at += 2 * rows
    assert at == len(block)
    return header, names, columns, reasons


def test_the_page_holds_every_figure():
    result = made_profile(len(HARD), state_rms=HARD, gradient_norm=HARD[::-1], parameters=[123_456_789.0] * len(HARD))
    result.missing["gradient_norm"][2] = 1
    result.reasons = ["because </script>"]
    header, names, columns, reasons = unpacked(make_page(result))
    assert names == list(result.columns["name"])
    assert header["reasons"] == result.reasons
    np.testing.assert_array_equal(columns["parameters"], result.columns["parameters"])
    np.testing.assert_array_equal(reasons["gradient_norm"], result.missing["gradient_norm"])
    for name, values in columns.items():
        # Half of a unit in the 20th bit; the largest number of all is rounded down instead.
        np.testing.assert_allclose(values, result.columns[name], rtol=2.0**-20, atol=5e-324)
        np.testing.assert_array_equal(np.isnan(values), np.isnan(result.columns[name]))
        np.testing.assert_array_equal(np.isinf(values), np.isinf(result.columns[name]))


def test_hostile_names_stay_text():
    result = made_profile(len(HOSTILE))
    result.columns["name"] = np.array(HOSTILE, dtype=object)
    result.name = HOSTILE[0]
    result.not_finite = f"the output of {HOSTILE[1]} is NaN"
    result.absent = {HOSTILE[0]: HOSTILE[3], HOSTILE[5]: HOSTILE[4]}
    page = make_page(result)
    page.encode()
    _, names, _, _ = unpacked(page)
    assert names == HOSTILE
    elements = Elements(page).elements
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not any(tag in ("img", "b") or "onerror" in attributes for tag, attributes in elements)


def test_the_page_loads_nothing():
    page = make_page(made_profile(3))
    for tag, attributes in Elements(page).elements:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
    assert not re.search(r"https?:|//cdn|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
    assert "default-src 'none'" in page


def deep_profile(rows: int = 50_000, columns: int = 12) -> Profile:
    random = np.random.default_rng(0)
    figures = {f"figure_{k}": np.exp(random.normal(size=rows)) for k in range(columns)}
    result = made_profile(rows, gradient_norm=np.exp(random.normal(size=rows)), **figures)
    names = [f"encoder.layers.{i // 2}.attention.{'projection' if i % 2 else 'norm'}" for i in range(rows)]
    result.columns["name"] = np.array(names)
    return result


@pytest.mark.parametrize(("columns", "bits"), [(4, 20), (24, 12)])
def test_deep_profiles_stay_below_5_megabytes(columns, bits):
    """Figures of random digits, which do not compress. More columns leave fewer bits."""
    result = deep_profile(columns=columns)
    page = make_page(result)
    assert len(page) < 5e6
    header, _, unpacked_columns, _ = unpacked(page)
    assert header["bits"] >= bits
    for name, values in unpacked_columns.items():
        np.testing.assert_allclose(values, result.columns[name], rtol=2.0 ** -(bits + 1))


def test_the_headline_is_on_the_page(tmp_path):
    model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(8, 8), nn.Tanh())])
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(0.1)
    result = profile(model, torch.randn(4, 8), jacobian=False, repeats=1, matmul_rate=1.0)
    result.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.search(r"<h1>.*(shrinks|anish).*</h1>", page)
    assert len(page) < 100_000


def test_the_verdict_is_first(monkeypatch):
    finding = SimpleNamespace(
        title="dying units",
        place="layer 3 < 4",
        words="90 % are 0",
        method="LCW",
        change="convert(model)",
        outcome="ok",
    )
    verdict = SimpleNamespace(findings=[finding], headline="dying units & more", not_judged={"frozen": "why"})
    monkeypatch.setattr(Profile, "verdict", lambda self: verdict, raising=False)
    page = make_page(made_profile(3))
    assert "<h1>Dying units &amp; more</h1>" in page
    for words in ("dying units</strong>, layer 3 &lt; 4", "90 % are 0", "Method: LCW", "<code>convert(model)</code>"):
        assert page.index(words) < page.index('class="figures"')
    verdict.findings.clear()
    assert 'class="well"' in make_page(made_profile(3))


needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed (apt install chromium)")
SHOWN = "[...document.querySelectorAll('#body .row')].map((row) => Number(row.dataset.row))"


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def opened(chromium, tmp_path):
    """``opened(result)`` writes the page, opens it in a window of 1280 x 900, and returns the browser and the time."""

    def open_page(result: Profile, width: int = 1280, height: int = 900, is_phone: bool = False):
        chromium.resize(width, height, is_phone)
        chromium.errors.clear()
        chromium.requests.clear()
        result.to_html(tmp_path / "page.html")
        start = time.perf_counter()
        chromium.open(tmp_path / "page.html")
        chromium.wait_for("document.documentElement.dataset.ready")
        return chromium, time.perf_counter() - start

    yield open_page
    assert not chromium.errors
    assert [address.partition(":")[0] for address in chromium.requests] == ["file"]


@pytest.mark.slow
@needs_browser
def test_50_000_rows_open_sort_filter_and_scroll(opened):
    result = deep_profile()
    norms = result.columns["gradient_norm"]
    norms[[7, 40_000]] = math.nan, math.inf
    result.missing["gradient_norm"][100:200], result.reasons = 1, ["the reason"]
    norms[100:200] = math.nan
    # Other processes on the machine only add to the time.
    page, seconds = min((opened(result) for _ in range(3)), key=lambda opening: opening[1])
    assert seconds < 2
    assert page.evaluate("document.querySelectorAll('*').length") < 2500
    assert page.evaluate(SHOWN)[:3] == [0, 1, 2]

    page.evaluate("document.querySelector('[data-column=gradient_norm]').click()")
    finite = [row for row in np.argsort(-norms, kind="stable") if np.isfinite(norms[row])]
    assert page.evaluate(SHOWN)[:5] == [7, 40_000, *finite[:3]]
    page.evaluate("document.querySelector('[data-column=gradient_norm]').click()")
    assert page.evaluate(SHOWN)[:3] == finite[::-1][:3]
    page.evaluate("document.getElementById('scroller').scrollTop = 1e9")
    page.wait_for(f"{SHOWN}.includes(199)")
    cell = "[...document.querySelectorAll('.row[data-row=\"199\"] .none')]"
    assert page.evaluate(f"{cell}.map((cell) => [cell.textContent, cell.title])") == [["–", "the reason"]]

    def filtered(text: str) -> str:
        page.evaluate(
            "(() => { const box = document.getElementById('filter'); "
            f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input')); }})()"
        )
        page.evaluate("new Promise((done) => setTimeout(done, 150))")
        return page.evaluate("document.getElementById('count').textContent")

    assert filtered("LAYERS.77.") == "2 of 50,000"
    assert filtered("norm gradient_norm>2") == f"{int((norms[::2] > 2).sum()):,} of 50,000"
    assert filtered("gradient_norm=nan") == "1 of 50,000"
    assert filtered("gradient_norm=missing") == "100 of 50,000"
    assert filtered(r"/layers\.1\d\..*norm$/") == "10 of 50,000"
    filtered("no_such_column>3")
    assert "no column" in page.evaluate("document.getElementById('filter-error').textContent")
    assert filtered("") == "50,000"


@pytest.mark.slow
@needs_browser
def test_plots_zoom_and_find_rows(opened):
    page, _ = opened(deep_profile(1000, 2))
    page.evaluate("document.getElementById('panels').scrollIntoView()")
    left, top, width, height = page.evaluate(
        "(() => { const box = document.querySelector('canvas').getBoundingClientRect(); "
        "return [box.left, box.top, box.width, box.height]; })()"
    )

    def at(row: float) -> tuple[float, float]:
        # The margins of the script's plots.
        return left + 52 + row / 999 * (width - 60), top + height / 2

    page.drag(at(200), at(400))
    first, last = map(int, re.findall(r"\d+", page.evaluate("document.getElementById('range').textContent")))
    assert abs(first - 201) <= 4
    assert abs(last - 401) <= 4
    page.evaluate("document.getElementById('in-range').click()")
    assert page.evaluate("document.getElementById('count').textContent") == f"{last - first + 1} of 1,000"
    page.evaluate("document.getElementById('everything').click()")
    assert page.evaluate("document.getElementById('range').textContent") == "all 1,000 rows"
    page.evaluate("document.getElementById('in-range').click()")
    page.drag(at(500), at(500))
    found = page.evaluate("Number(document.querySelector('.row.found').dataset.row)")
    assert abs(found - 500) <= 3


@pytest.mark.slow
@needs_browser
def test_light_dark_phone_and_hostile_names_in_the_browser(opened):
    result = made_profile(len(HOSTILE))
    result.columns["name"], result.name = np.array(HOSTILE, dtype=object), HOSTILE[0]
    page, _ = opened(result, 390, 844, is_phone=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("window.broken") is None
    assert HOSTILE[1] in page.evaluate("[...document.querySelectorAll('.row > div')].map((cell) => cell.title)")
    background = "getComputedStyle(document.body).backgroundColor"
    page.prefer("dark")
    assert page.evaluate(background) == "rgb(20, 24, 29)"
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.prefer("light")
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(background) == "rgb(20, 24, 29)"


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("figure", [1.0, 0.0, math.nan, math.inf, -2.0])
def test_one_row_of_any_figure_is_drawn(opened, figure):
    page, _ = opened(made_profile(1, gradient_norm=[figure], state_rms=[figure]))
    assert page.evaluate(SHOWN) == [0]
