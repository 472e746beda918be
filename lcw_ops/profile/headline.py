"""The result of a profile in one sentence and a line of details, for the plot and the page; and names cut to size.

Sentence and details are computed from the figures that the profile has, whichever these are.
"""

import math
import re

import numpy as np

# float32's smallest normal number: smaller values are rounding errors, or 0.
SMALLEST = 1.1754944e-38

# The gradient changes by less than this factor from one row to the next in a net without a place worth a mention.
NOTABLE_JUMP = 2.0


def headline(profile) -> tuple[str, str]:
    """(headline, details): the most important finding of a :class:`~lcw_ops.profile.Profile`, and figures beside it."""
    return _finding(profile), "; ".join(_details(profile))


def gradient_fate(norms: np.ndarray, names: np.ndarray | None = None) -> str:
    """The fate of the gradient on its way from the last layer (``norms[-1]``) to the first, in words.

    ``names``: of the layers; without them they are counted from 1.
    """

    def place(rows: np.ndarray) -> str:
        return f"layer {rows[-1] + 1:,}" if names is None else str(names[rows[-1]])

    if not np.isfinite(norms).all():
        return f"overflows at {place(np.flatnonzero(~np.isfinite(norms)))}"
    if (norms < SMALLEST).any():
        return f"underflows at {place(np.flatnonzero(norms < SMALLEST))}"
    ratio = norms[0] / norms[-1]
    if 0.1 <= ratio <= 1:
        return f"keeps {ratio:.0%} of its size"
    if 1 < ratio <= 10:
        return f"grows by {ratio - 1:.0%}"
    exponent = abs(math.log10(ratio))
    return f"{'grows' if ratio > 1 else 'shrinks'} by a factor of 10^{exponent:.1f}"


def _finding(profile) -> str:
    if profile.failure is not None:
        return f"The model failed: {profile.failure}"
    if profile.not_finite is not None:
        return _capital(profile.not_finite)
    return _capital(profile.verdict().headline)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _gradient_finding(profile) -> str:
    rows = np.flatnonzero(~profile.is_missing("gradient_norm"))
    if not len(rows):
        return "There is no gradient to follow"
    norms, names = profile.columns["gradient_norm"][rows], profile.columns["name"][rows]
    if len(rows) == 1:
        return f"The gradient norm of the only row with one is {norms[0]:.3g}"
    return f"From the last to the first of {len(rows):,} rows, the gradient {gradient_fate(norms, names)}"


def _details(profile) -> list[str]:
    details = [_gradient_finding(profile)]
    if math.isfinite(profile.loss):
        details.append(f"loss {profile.loss:.4g}")
    rows = np.flatnonzero(~profile.is_missing("gradient_norm"))
    with np.errstate(divide="ignore", invalid="ignore"):
        # From a row's output to the output of the row before it: backpropagation's direction.
        steps = -np.diff(np.log(profile.columns["gradient_norm"][rows]))
    steps = np.where(np.isfinite(steps), steps, 0)
    if len(steps) and np.abs(steps).max() > math.log(NOTABLE_JUMP):
        place = np.abs(steps).argmax()
        verb = "grows" if steps[place] > 0 else "shrinks"
        factor = math.exp(min(abs(steps[place]), 700))
        details.append(f"it {verb} most, by {factor:.3g}, across {profile.columns['name'][rows[place + 1]]}")
    if profile.timing.repeats:
        forward, backward = profile.timing.forward_seconds, profile.timing.backward_seconds
        details.append(f"forward {1e3 * forward:.4g} ms, backward {1e3 * backward:.4g} ms")
    if profile.peak_memory_bytes is not None:
        details.append(f"peak memory {profile.peak_memory_bytes / 1e9:.2f} GB")
    return details


def elided(name: str, most: int) -> str:
    """A name of at most ``most`` letters: words in its middle become "…"; numbers and the last word stay if they fit.

    "encoder.layers.119.attention.self.query" becomes "encoder…119…query".
    """
    if len(name) <= most:
        return name
    parts = name.split(".")
    centre = (len(parts) - 1) / 2
    words = [i for i in range(len(parts) - 1) if not re.search(r"\d", parts[i])]
    text = name
    for dropped in sorted(words, key=lambda i: (abs(i - centre), -i)):
        parts[dropped] = "…"
        text = re.sub(r"\.?…(\.…)*\.?", "…", ".".join(parts))
        if len(text) <= most:
            return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
