"""A profile as one HTML file without any link: verdict, plots by depth with zoom, a table of all rows.

The style, the script and the data are inlined. The script draws on canvases and keeps only the visible rows of the
table in the document, so 50,000 rows open in well under two seconds. The data is a compressed block: the names as JSON,
then the columns, then the numbers of the reasons of missing figures. A column is the upper bytes of its float64 values,
byte by byte, which compresses several times better than the values one after another.
"""

import base64
import html
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np

from lcw_ops._files import write_atomically
from lcw_ops.profile.headline import headline

# Bits of the mantissa that are kept: a relative error of 5e-7, 8e-6 or 1.2e-4. The first that keeps the file this small
# is taken.
MANTISSA_BITS = (20, 16, 12)
MOST_BYTES = 4_500_000

# Columns that are drawn as a band around a line, or as a band alone: title -> (line, lower edge, upper edge).
BANDS = {
    "gradient_norm": ("gradient_norm", "gradient_lower", "gradient_upper"),
    "state_rms": ("state_rms", None, "state_rms_bound"),
    "gain": (None, "gain_lower", "gain_upper"),
}


def write_html(profile, path: str | Path, figures: list[list[str]], meanings: dict[str, str]) -> None:
    """Write the page; see :func:`make_page`. Raises OSError if the file cannot be written."""
    page = make_page(profile, figures, meanings)
    write_atomically(path, lambda file: file.write(page))


def make_page(profile, figures: list[list[str]], meanings: dict[str, str]) -> str:
    """The text of the page. ``figures``: pairs (figure, value) of the whole model. ``meanings``: of the columns."""
    for bits in MANTISSA_BITS:
        block, columns = _pack(profile, bits, meanings)
        if len(block) < MOST_BYTES:
            break
    finding, details = headline(profile)
    header = {
        "name": profile.name,
        "rows": len(profile),
        "columns": columns,
        "panels": _panels(profile),
        "reasons": profile.reasons,
        "bits": bits,
    }
    parts = {
        "title": html.escape(profile.name),
        "headline": re.sub(r"10\^([-\d.]+)", r"10<sup>\1</sup>", html.escape(finding)),
        "details": html.escape(details),
        "verdict": _verdict(profile),
        "figures": _figures(profile, figures),
        "missing": _missing(profile),
        "meanings": _definitions([(column["name"], column["meaning"]) for column in columns]),
        # A name such as </script> must not end the element.
        "header": json.dumps(header, allow_nan=False).replace("<", "\\u003c"),
        "data": block,
        "style": _part("page.css"),
        "script": _part("page.js"),
    }
    # One pass over the template: a name that looks like a marker of the template stays a name.
    pieces = _part("page.html").split("{{")
    page = pieces[0] + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:]))
    # A name may hold half of a surrogate pair, which UTF-8 cannot express.
    return page.encode("utf-8", "replace").decode("utf-8")


def _part(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def _pack(profile, bits: int, meanings: dict[str, str]) -> tuple[str, list[dict]]:
    """(the compressed block as base64, the description of the columns in it)."""
    names = json.dumps([str(name) for name in profile.columns["name"]]).encode()
    parts, columns = [np.uint32(len(names)).tobytes(), names], []
    for name, values in profile.columns.items():
        if name == "name":
            continue
        values = np.asarray(values, np.float64)
        missing = profile.is_missing(name)
        # Counts stay exact.
        is_whole = bool((values[~missing] == np.rint(values[~missing])).all())
        kept = 8 if is_whole else math.ceil((12 + bits) / 8)
        parts.append(_upper_bytes(values if is_whole else _rounded(values, bits), kept).tobytes())
        numbers = profile.missing.get(name)
        if numbers is not None and numbers.any():
            parts.append(_upper_bytes(np.asarray(numbers, np.uint16), 2).tobytes())
        columns.append(
            {
                "name": name,
                "meaning": meanings.get(name, name),
                "bytes": kept,
                "reasons": numbers is not None and bool(numbers.any()),
                # Without numbers of reasons, a NaN is a missing figure.
                "nan_is_missing": numbers is None,
                "empty": bool(missing.all()),
            }
        )
    return base64.b64encode(zlib.compress(b"".join(parts), 6)).decode(), columns


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Float64 values with ``bits`` bits of the mantissa, rounded to nearest; infinities and NaN stay."""
    raw = np.ascontiguousarray(values).view(np.uint64)
    dropped = np.uint64(52 - bits)
    mask = ~((np.uint64(1) << dropped) - np.uint64(1))
    half = np.uint64(1) << (dropped - np.uint64(1))
    finite = np.isfinite(values)
    truncated = np.where(finite, raw & mask, raw).view(np.float64)
    nearest = np.where(finite, (raw + half) & mask, raw).view(np.float64)
    # The largest numbers would be rounded up to infinity.
    rounded = np.where(finite & ~np.isfinite(nearest), truncated, nearest)
    # A NaN must keep a bit of its mantissa among the upper ones.
    rounded[np.isnan(values)] = math.nan
    return rounded


def _upper_bytes(values: np.ndarray, kept: int) -> np.ndarray:
    """The most significant ``kept`` bytes, as planes (kept, rows): the sign and the exponent first."""
    size = values.dtype.itemsize
    big_endian = values.astype(values.dtype.newbyteorder(">"))
    return np.ascontiguousarray(big_endian.view(np.uint8).reshape(len(values), size)[:, :kept].T)


def _panels(profile) -> list[dict]:
    """The plots, in the order of the columns; those without a figure are left out."""
    in_band = {edge: title for title, band in BANDS.items() for edge in band if edge is not None}
    panels: dict[str, dict] = {}
    for name in profile.columns:
        if name == "name" or bool(profile.is_missing(name).all()):
            continue
        title = in_band.get(name, name)
        line, lower, upper = BANDS.get(title, (name, None, None))
        panel = panels.setdefault(title, {"title": title, "line": None, "lower": None, "upper": None})
        for role, column in (("line", line), ("lower", lower), ("upper", upper)):
            if column == name:
                panel[role] = name
    # First what a reader looks for first.
    first = ["gradient_norm", "state_rms", "activation_shift", "weight_gradient_norm"]
    order = sorted(panels, key=lambda title: first.index(title) if title in first else len(first))
    return [panels[title] for title in order]


def _verdict(profile) -> str:
    """The findings of the profile's verdict, each with its method and its change."""
    verdict = profile.verdict()
    items = []
    for finding in verdict.findings:
        lines = [f"<strong>{html.escape(finding.title)}</strong>, {html.escape(finding.place)}"]
        lines.append(f"<p>{html.escape(finding.words)}</p>")
        if finding.method:
            lines.append(f"<p>Method: {html.escape(finding.method)}</p>")
        if finding.change:
            lines.append(f"<p>Change: <code>{html.escape(finding.change)}</code></p>")
        if finding.outcome is not None:
            lines.append(f"<p>Tried: {html.escape(str(finding.outcome))}</p>")
        items.append(f"<li>{''.join(lines)}</li>")
    if profile.failure is not None and not items:
        items.append("<li>The rows before the failure show no fault by the checks that could be made.</li>")
    elif not items:
        items.append('<li class="well">Nothing is wrong by the checks that could be made.</li>')
    by_reason: dict[str, list[str]] = {}
    for kind, reason in verdict.not_judged.items():
        by_reason.setdefault(str(reason), []).append(str(kind).replace("_", " "))
    not_judged = "".join(
        f'<p class="muted hint">Not judged: {html.escape(", ".join(kinds))} ({html.escape(reason)}).</p>'
        for reason, kinds in by_reason.items()
    )
    return f'<section aria-label="verdict"><ol class="verdict">{"".join(items)}</ol>{not_judged}</section>'


def _figures(profile, figures: list[list[str]]) -> str:
    parameters = int(np.nansum(profile.columns["parameters"])) if "parameters" in profile.columns else None
    rows = [["rows", f"{len(profile):,}"], ["samples", f"{profile.samples:,}"]]
    if parameters is not None:
        rows.append(["parameters", f"{parameters:,}"])
    rows += figures
    machine = profile.machine
    rows.append(["machine", f"{machine.get('device_name', machine.get('device', ''))}, torch {machine.get('torch')}"])
    return "".join(f"<div>{_definitions([row])}</div>" for row in rows)


def _missing(profile) -> str:
    """Missing figures of the whole model, and the columns without any figure, with their reasons."""
    rows = list(profile.absent.items())
    for name in profile.columns:
        if name != "name" and bool(profile.is_missing(name).all()):
            reasons = list(profile.reasons_of(name)) or ["no row has one"]
            more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
            rows.append((name, reasons[0] + more))
    return _definitions(rows)


def _definitions(pairs) -> str:
    return "".join(f"<dt>{html.escape(str(term))}</dt><dd>{html.escape(str(words))}</dd>" for term, words in pairs)
