"""The recurrence in parallel over depth, in windows of several sizes, against our sequential kernel.

A window is the range of layers that the solver computes at once, by sweeps over all of them. A sweep does the same
arithmetic as the sequential kernel, which goes layer by layer, and the solver needs two or three sweeps. So it cannot
save arithmetic, only the time in which a processor waits for the layer before. The sizes are those of
bench/orthogonal_filter.py, and those with the longest waits: one sample, wide layers.
``python -m lcw_ops.bench.parallel_depth rows.csv`` turns rows of this benchmark into the lines for
lcw_ops/ops/parallel_depth/crossover.py.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from lcw_ops import functional as F
from lcw_ops.bench import orthogonal_filter as layer_by_layer
from lcw_ops.bench.registry import EAGER, Case, Run, is_noisy, ours
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops.parallel_depth.crossover import Region, device_key
from lcw_ops.ops.parallel_depth.op import SWEEP

STEM = "parallel_depth"

# A window that is measured besides the whole depth and the default window, the one that solver="auto" would use.
WINDOW = 1000

# The solver needs eight times the memory of all states, and must leave room for weights and gradients.
MOST_STATES_BYTES = 2**29

# beta = c / L in all cases.
MEASURED_C = 1.0

# A region of sizes is listed only if the parallel solver saves this share of the sequential kernel's time with initial
# weights. Trained nets take up to three times as many sweeps (docs/parallel_depth.md), and must not be slower.
LEAST_GAIN = 2 / 3


def cases(device_type: str) -> list[Case]:
    quick_depth, quick_time = [(500, 8, 32)], [(500, 1, 32)]
    if device_type == "cuda":
        depth = [(50_000, 128, 64), (50_000, 1, 64), (10_000, 128, 128), (2000, 32, 256), (2000, 32, 512)]
        time = [(10_000, 64, 128), (10_000, 1, 128), (784, 128, 256)]
    else:
        depth = [
            (50_000, 32, 64),
            (50_000, 128, 64),
            (50_000, 1, 64),
            (10_000, 128, 128),
            (10_000, 1, 128),
            (2000, 32, 256),
            (2000, 1, 512),
            (2000, 32, 512),
        ]
        time = [(10_000, 32, 128), (10_000, 1, 128), (784, 128, 256)]
    return [
        _case(device_type, over_time, *shape, filter, backward, quick)
        for quick, over_time, shapes in (
            (True, False, quick_depth),
            (True, True, quick_time),
            (False, False, depth),
            (False, True, time),
        )
        for shape in shapes
        for filter in ("haar", "cyclic")
        for backward in (False, True)
    ]


def _case(
    device_type: str, over_time: bool, steps: int, rows: int, width: int, filter: str, backward: bool, quick: bool
) -> Case:
    base = layer_by_layer._case(device_type, over_time, steps, rows, width, quick, backward)
    by_name = {one.name: one for one in base.competitors}
    sequential = (dataclasses.replace(one, name=f"{one.name}, sequential") for one in base.competitors if one.ours)
    parallel = (
        # The solver waits on the host for the last sweep's change, which a graph cannot do.
        dataclasses.replace(one, name=f"{one.name}, {label}", captures=False)
        for label, window in _windows(device_type, steps, rows, width).items()
        for one in ours(SWEEP, device_type, functools.partial(_parallel, window), width)
    )
    peers = [by_name[EAGER], by_name["jax lax.scan, jit"]]
    permutes, saved = filter != "haar", 0
    if permutes:
        peers = [dataclasses.replace(peer, missing=lambda: "timed with the Haar filter") for peer in peers]
        # A permutation takes no operations for O h and, in backward, G O, where G is the gradient of a state.
        saved = 2 * rows * width**2 * steps * (2 if backward else 1)

    def make_inputs(device: torch.device) -> dict:
        return base.make_inputs(device) | {"filter": make_filter(filter, width, device=device)}

    def expected(inputs: dict) -> list[Tensor]:
        given = inputs["filter"]
        matrix = torch.eye(width, device=given.device)[given] if permutes else given
        return base.expected(inputs | {"filter": matrix})

    return dataclasses.replace(
        base,
        stem=STEM,
        name=base.name.replace(",", f", {filter},", 1),
        make_inputs=make_inputs,
        expected=expected,
        competitors=(*sequential, *parallel, *peers),
        operations=base.operations - saved,
    )


def _windows(device_type: str, steps: int, rows: int, width: int) -> dict[str, int | None]:
    """Map the name of a competitor to its window; None is the default."""
    windows = {"parallel": None}
    if steps > WINDOW:
        windows[f"by {WINDOW}"] = WINDOW
    # On a GPU the whole depth is the default.
    if device_type == "cpu" and 4 * steps * rows * width <= MOST_STATES_BYTES:
        windows["one window"] = steps
    return windows


def _parallel(window: int | None, inputs: dict) -> Run:
    return layer_by_layer._torch(functools.partial(F.orthogonal_filter, solver="parallel", window=window), inputs)


# ---- Where the parallel solver wins ----------------------------------------------------------------------------------

# Layers, rows, width.
Point = tuple[int, int, int]


def regions(path: Path, key: str) -> list[Region]:
    """The entries of MEASURED that follow from a CSV of measurements on machines of that key (``device_key``).

    The entries are cautious: they lie between measured points at which the parallel solver won in its default window,
    forward as well as with backward. A point with a noisy row does not count as won.
    """
    times: dict[tuple, dict[Point, dict[str, dict[str, float]]]] = {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stem"] == STEM]
        devices = sorted({row["device"] for row in rows})
        if len(devices) > 1:
            raise ValueError(f"{path} has rows of {', '.join(devices)}; expected those of one device")
        for row in rows:
            if _is_of(row, key):
                over, filter, passes = row["case"].split(", ")
                point = tuple(int(size.split("=")[1]) for size in row["shape"].split())
                of_kind = times.setdefault((filter != "haar", over == "over time"), {})
                median, spread = float(row["median_s"]), float(row["spread_s"])
                # If the CSV holds several runs of a case, the last one counts.
                seconds = of_kind.setdefault(point, {}).setdefault(passes, {})
                noisy = row.get("noisy") == "True" or is_noisy(median, spread)
                seconds[row["competitor"]] = math.nan if noisy else median
    return [
        Region(key, permutes, shares_weight, *box, MEASURED_C)
        for (permutes, shares_weight), of_kind in times.items()
        for box in _boxes({point: _is_won_by_both(passes) for point, passes in of_kind.items()})
    ]


def _is_of(row: dict[str, str], key: str) -> bool:
    return key.startswith("sm_") if row["kind"] == "gpu" else key.endswith(f", {row['threads']} threads")


def _is_won_by_both(passes: dict[str, dict[str, float]]) -> bool:
    return len(passes) == 2 and all(map(_is_won, passes.values()))


def _is_won(seconds: dict[str, float]) -> bool:
    sequential = [time for name, time in seconds.items() if name.endswith(", sequential")]
    parallel = [time for name, time in seconds.items() if name.endswith(", parallel")]
    return bool(sequential and parallel) and all(
        ours <= (1 - LEAST_GAIN) * theirs for ours in parallel for theirs in sequential
    )


def _boxes(won: dict[Point, bool]) -> list[tuple]:
    """The largest boxes whose corners and inner points all won, as pairs of ends for layers, rows and width."""
    boxes = []
    for ends in itertools.combinations_with_replacement(sorted(won), 2):
        box = tuple(tuple(sorted(pair)) for pair in zip(*ends, strict=True))
        if all(won.get(corner) for corner in itertools.product(*box)) and all(
            is_won for point, is_won in won.items() if _holds(box, point)
        ):
            boxes.append(box)
    boxes = list(dict.fromkeys(boxes))
    return [box for box in boxes if not any(_is_within(box, other) for other in boxes if other != box)]


def _holds(box: tuple, point: Point) -> bool:
    return all(least <= size <= most for (least, most), size in zip(box, point, strict=True))


def _is_within(box: tuple, other: tuple) -> bool:
    return all(least <= a and b <= most for (a, b), (least, most) in zip(box, other, strict=True))


def line_of(region: Region) -> str:
    """The source line of an entry of MEASURED."""
    device, *rest = region
    return f"    Region({', '.join((json.dumps(device), *map(str, rest)))}),"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("rows", type=Path, help="CSV of lcw-ops bench parallel_depth")
    parser.add_argument("--key", help="kind of machine that measured, such as sm_90; default: this one")
    args = parser.parse_args(arguments)
    key = args.key or device_key(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = regions(args.rows, key)
    print("\n".join(map(line_of, found)) if found else f"no measured size of {key} saves {LEAST_GAIN:.0%} of the time")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
