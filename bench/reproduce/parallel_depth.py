"""Experiments on the solver that is parallel over depth: its sweeps as training goes on, its error against float64.

The solver and the experiments are ours. A sweep is one iteration of the solver over all layers of a window.
``initial`` counts the sweeps of nets at initialisation. ``sweeps`` trains the net of ``lcw-ops train`` and, between
steps, solves all layers at once and in windows. ``grid`` judges the result and every gradient by the rule for all
kernels: at most twice the error of eager torch in float32, plus one unit in the last place of the scale. ``error``
compares the errors of the states of 50,000 layers with those of the sequential kernel. The float64 truth comes from our
sequential kernel, which goes layer by layer.
"""

import argparse
import csv
import datetime
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops.bench import runner
from lcw_ops.jobs import data
from lcw_ops.jobs import train as job
from lcw_ops.jobs.loop import Training, accuracy
from lcw_ops.nn import OrthogonalFilterMLP
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops.parallel_depth.solver import Solve, record_solves
from lcw_ops.profile import machine
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS, apply_filter, scale_tensors
from lcw_ops.reference.orthogonal_filter import orthogonal_filter as eager_torch

DEPTH = 50_000

# The numbers of training steps after which sweeps are counted.
STEPS = (0, 1, 2, 5, 10, 20, 30, 50)
WIDTH, WINDOW = 32, 500
FILTERS = ("permutation", "haar")

# The depths and values of c in the grid.
DEPTHS, CS = (1, 2, 100, 5000, DEPTH), (0.5, 1.0, 3.0, 10.0)
ROWS, WIDTHS = (1, 8, 128), (8, 64, 128)
# Up to this depth all combinations are judged, and an evenly spread selection in deeper nets.
MOST_COMPLETE = 100
# Up to this depth eager torch is affordable. In deeper nets the sequential kernel's error replaces eager torch's.
MOST_EAGER = 5000
# The most draws of a combination before it is called wrong.
MOST_DRAWS = 16

# The least distance of a pre-activation from ReLU's kink in the grid, as a share of the rms of the layer's
# pre-activations: if rounding decides on which side one lies, every method's gradient may be wrong.
KINK_MARGIN = 1e-4

# The number of layers whose weights and gradients are in float64 at a time.
CHUNK = 1000

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Row:
    """One line of the CSV. figure is the parallel solver's; sequential and eager are those of the others, if they ran.

    An error is relative to the largest value of the exact result; an error of "states", to the largest value of its own
    state. allowed is the rule's limit.
    """

    date: str
    commit: str
    torch: str
    experiment: str
    setting: str
    step: int | None
    window: int | None
    measure: str
    figure: float
    sequential: float | None = None
    eager: float | None = None
    allowed: float | None = None


@dataclass(frozen=True)
class Problem:
    """A recurrence in float32, and ``cotangent``, the gradient of its last state.

    For M samples, N units and L layers: h0, cotangent (M, N); weight (L, N, N); bias (L, N); alpha, beta (1,) or (L,).
    """

    h0: Tensor
    weight: Tensor
    bias: Tensor
    filter: Tensor
    alpha: Tensor
    beta: Tensor
    activation: str
    cotangent: Tensor

    @property
    def depth(self) -> int:
        return len(self.weight)

    def call(self, solve: Callable, **options) -> Tensor:
        tensors = (self.h0, self.weight, self.bias, self.filter, self.alpha, self.beta)
        return solve(*tensors, activation=self.activation, **options)

    def exact(self, part: slice, h0: Tensor, cotangent: Tensor | None = None) -> "Problem":
        """The layers of ``part`` in float64, starting from the state ``h0``."""
        filter = self.filter.double() if self.filter.is_floating_point() else self.filter
        layers = self.weight[part].double(), self.bias[part].double()
        scales = ((scale if scale.numel() == 1 else scale[part]).double() for scale in (self.alpha, self.beta))
        return Problem(h0, *layers, filter, *scales, self.activation, cotangent)


def draw(depth: int, rows: int, width: int, filter: str, c: float, activation: str, seed: int) -> Problem:
    """A net with initial weights and random biases. Every layer has its own alpha and beta, and so their gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        matrix = make_filter(filter, width)
    h0, cotangent = normal(rows, width), normal(rows, width)
    weight, bias = normal(depth, width, width).mul_(width**-0.5), normal(depth, width)
    scales = (scale.repeat(depth) for scale in scale_tensors(None, c / depth, depth, h0))
    problem = Problem(h0, weight, bias, matrix, *scales, activation, cotangent)
    if activation == "relu":
        _leave_kinks(problem)
    return problem


def _leave_kinks(problem: Problem) -> None:
    """Move biases until no pre-activation is within KINK_MARGIN of 0."""
    state = problem.h0.double()
    for l in range(problem.depth):
        layer = problem.exact(slice(l, l + 1), state)
        product = state @ layer.weight[0].mT
        margin = KINK_MARGIN * (product + layer.bias[0]).square().mean().sqrt()
        while (near := ((product + problem.bias[l]).abs() < margin).any(0)).any():
            problem.bias[l] += 4 * margin.float() * near
        act = torch.relu(product + problem.bias[l])
        state = layer.alpha * apply_filter(state, layer.filter) + layer.beta * act


def of_net(model: OrthogonalFilterMLP, x: Tensor, y: Tensor) -> Problem:
    """The problem that a training step on these samples solves, forward and backward."""
    with torch.no_grad():
        h0 = model.input_layer(x)
        scales = scale_tensors(model.alpha, model.beta, model.depth, h0)
        layers = model.weight.detach(), model.bias.detach(), model.filter, *scales
        problem = Problem(h0, *layers, model.activation, h0)
        last = problem.call(F.orthogonal_filter)
    last.requires_grad_()
    (cotangent,) = torch.autograd.grad(nn.functional.cross_entropy(model.output_layer(last), y), last)
    return replace(problem, cotangent=cotangent)


# ---- Results and their errors ----------------------------------------------------------------------------------------

LEARNED = ("h0", "weight", "bias", "alpha", "beta")

Results = dict[str, Tensor]


def results(problem: Problem, solve: Callable) -> Results:
    """The last state and all gradients, by name."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in LEARNED}
    output = replace(problem, **leaves).call(solve)
    gradients = torch.autograd.grad(output, list(leaves.values()), problem.cotangent)
    return {"h_L": output.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def parallel(window: int | None) -> Callable:
    return partial(F.orthogonal_filter, solver="parallel", window=window)


def exact_results(problem: Problem) -> Iterator[tuple[str, slice, Tensor]]:
    """(name, layers, exact values) of :func:`results` in float64, part by part: the whole would not fit into memory."""
    parts = [slice(start, min(start + CHUNK, problem.depth)) for start in range(0, problem.depth, CHUNK)]
    starts = [problem.h0.double()]
    for part in parts:
        starts.append(problem.exact(part, starts[-1]).call(F.orthogonal_filter))
    yield "h_L", slice(None), starts.pop()
    gradient, shared = problem.cotangent.double(), {}
    for part, start in reversed(list(zip(parts, starts, strict=True))):
        found = results(problem.exact(part, start, gradient), F.orthogonal_filter)
        gradient = found["dh0"]
        for name in ("weight", "bias", "alpha", "beta"):
            if len(getattr(problem, name)) == problem.depth:
                yield f"d{name}", part, found[f"d{name}"]
            else:
                shared[f"d{name}"] = shared.get(f"d{name}", 0.0) + found[f"d{name}"]
    for name, total in {"dh0": gradient, **shared}.items():
        yield name, slice(None), total


@dataclass
class Errors:
    """For one result: the largest error of an element, by method, and the largest exact element."""

    absolute: dict[str, float]
    scale: float = 0.0

    def add(self, absolute: dict[str, float], scale: float) -> None:
        self.absolute = {method: max(error, absolute[method]) for method, error in self.absolute.items()}
        self.scale = max(self.scale, scale)

    def relative(self) -> dict[str, float]:
        return {method: error / self.scale if error else 0.0 for method, error in self.absolute.items()}

    def allowed(self) -> float:
        relative = self.relative()
        return 2 * relative.get("eager", relative["sequential"]) + EPS

    def share(self) -> float:
        """The parallel solver's error as a share of the allowed one."""
        return self.relative()["parallel"] / self.allowed()


def errors(problem: Problem, methods: dict[str, Results]) -> dict[str, Errors]:
    """The errors by name of the result."""
    largest: dict[str, Errors] = {}
    for name, part, exact in exact_results(problem):
        absolute = {method: _largest(found[name][part].double() - exact) for method, found in methods.items()}
        largest.setdefault(name, Errors(dict.fromkeys(methods, 0.0))).add(absolute, _largest(exact))
    return largest


def _largest(values: Tensor) -> float:
    """The largest element; infinity, not NaN, if one is not finite, so that it counts as wrong."""
    value = values.abs().max().item()
    return math.inf if math.isnan(value) else value


@torch.no_grad()
def state_errors(problem: Problem, methods: dict[str, Callable]) -> dict[str, float]:
    """The largest element error of any state, over the largest element of that state."""
    found = {method: problem.call(solve, return_states=True) for method, solve in methods.items()}
    largest, state = dict.fromkeys(methods, 0.0), problem.h0.double()
    for start in range(0, problem.depth, CHUNK):
        part = slice(start, min(start + CHUNK, problem.depth))
        exact = problem.exact(part, state).call(F.orthogonal_filter, return_states=True)
        scale = exact.abs().amax(-1, keepdim=True)
        for method, states in found.items():
            error = _largest((states[part.start : part.stop + 1].double() - exact) / scale)
            largest[method] = max(largest[method], error)
        state = exact[-1].clone()
    return largest


# (setting, step, window, measure, and the four numbers of a row)
Figures = Iterator[tuple]


# ---- Sweeps of initial nets ------------------------------------------------------------------------------------------

# The default layers, samples and width; and the time steps of an image that is read pixel by pixel.
INITIAL, IMAGE = (2000, 8, 64), 28 * 28


@dataclass(frozen=True)
class Start:
    """A net at initialisation. gain: std(W) sqrt(N) for N units. tied: all layers share a weight and get an input."""

    filter: str = "haar"
    c: float = 1.0
    activation: str = "tanh"
    gain: float = 1.0
    tied: bool = False
    depth: int = INITIAL[0]
    alpha: float | None = None


STARTS = {
    "a weight per layer": Start(),
    "the same, permutation": Start("permutation"),
    "the same, ReLU": Start(activation="relu"),
    "the same, identity (residual net)": Start("identity"),
    "c = 3": Start(c=3.0),
    "c = 10": Start(c=10.0),
    "W four times as large": Start(gain=4.0),
    "W four times as large, cyclic, c = 3": Start("cyclic", c=3.0, gain=4.0),
    "one weight for all, inputs": Start(tied=True),
    "one weight for all, inputs, identity": Start("identity", tied=True),
    "784 time steps, alpha = 0.99, beta = 0.01": Start(tied=True, depth=IMAGE, c=0.01 * IMAGE, alpha=0.99),
    "784 time steps, beta = 1 / sqrt(784)": Start(tied=True, depth=IMAGE, c=math.sqrt(IMAGE)),
}


def initial_figures(depth: int | None = None) -> Figures:
    _, rows, width = INITIAL
    for name, start in STARTS.items():
        depth_of = depth or start.depth
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = () if start.tied else (depth_of,)
            tensors = {
                "h0": torch.randn(rows, width),
                "weight": torch.randn(*layers, width, width) * start.gain * width**-0.5,
                "bias": 0.1 * torch.randn(*layers, width),
                "inputs": torch.randn(depth_of, rows, width) if start.tied else None,
            }
            filter, cotangent = make_filter(start.filter, width), torch.randn(rows, width)
        leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items() if tensor is not None}
        scales = {"alpha": start.alpha, "beta": start.c / depth_of}
        with record_solves() as solves, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            output = parallel(depth_of)(**tensors, filter=filter, **scales, activation=start.activation)
            torch.autograd.grad(output, list(leaves.values()), cotangent)
        for direction in ("forward", "backward"):
            for figure in _of_direction(solves, direction):
                yield name, None, depth_of, *figure


# ---- Sweeps as training goes on --------------------------------------------------------------------------------------


def sweep_figures(depth: int = DEPTH, steps: tuple[int, ...] = STEPS, window: int = WINDOW, seed: int = 0) -> Figures:
    for filter in FILTERS:
        dataset = data.load_digits()
        settings = job.complete(job.Settings(depth=depth, width=WIDTH, filter=filter, seed=seed), dataset)
        model = job.make_network(settings, dataset.features, dataset.classes)
        how = (settings.batch, settings.lr, seed, job.ADAM_BETAS, job.LABEL_SMOOTHING)
        training = Training(model, dataset, max(*steps, 1), *how)
        setting = f"L={depth} M={settings.batch} N={WIDTH} {filter}"
        for step in steps:
            while training.done < step:
                training.step()
            yield setting, step, None, "test accuracy", accuracy(model, dataset)
            problem = of_net(model, dataset.x_train[: settings.batch], dataset.y_train[: settings.batch])
            for of_window, figures in _sweeps(problem, (depth, window)).items():
                for figure in figures:
                    yield setting, step, of_window, *figure


def _sweeps(problem: Problem, windows: tuple[int, ...]) -> dict[int, list[tuple]]:
    """The sweeps, the contraction and the errors, for each window."""
    solved, figures = {}, {}
    for window in windows:
        with record_solves() as solves, warnings.catch_warnings():
            # A window that does not converge is recorded as a figure, so the warning is noise.
            warnings.simplefilter("ignore", RuntimeWarning)
            solved[f"by {window}"] = results(problem, parallel(window))
        figures[window] = [*_of_direction(solves, "forward"), *_of_direction(solves, "backward")]
    methods = solved | {"sequential": results(problem, F.orthogonal_filter)}
    found = {name: of_result.relative() for name, of_result in errors(problem, methods).items()}
    solvers = {"sequential": F.orthogonal_filter} | {f"by {window}": parallel(window) for window in windows}
    found["states"] = state_errors(problem, solvers)
    for window in windows:
        figures[window] += [
            (f"error of {name}", of_result[f"by {window}"], of_result["sequential"])
            for name, of_result in found.items()
            if name in ("states", "h_L", "dh0", "dweight")
        ]
    return figures


def _of_direction(solves: list[Solve], direction: str) -> list[tuple[str, float]]:
    of_direction = [solve for solve in solves if solve.direction == direction]
    converged = [solve for solve in of_direction if solve.converged and solve.sweeps]
    sweeps = [solve.sweeps for solve in converged]
    contractions = [solve.contraction for solve in converged if not math.isnan(solve.contraction)]
    return [
        (f"{direction} sweeps", sum(sweeps) / len(sweeps) if sweeps else math.nan),
        (f"{direction} sweeps, at most", max(sweeps, default=math.nan)),
        (f"{direction} contraction", max(contractions, default=math.nan)),
        (f"{direction} error estimate", max((solve.error for solve in converged), default=math.nan)),
        (f"{direction} windows given up", sum(not solve.converged for solve in of_direction)),
    ]


# ---- The grid of the proof -------------------------------------------------------------------------------------------

# Depth, c, activation, rows, width, filter.
Cell = tuple[int, float, str, int, int, str]


def grid_cells(depth: int) -> list[Cell]:
    """All 288 combinations for depths up to MOST_COMPLETE, and a Latin square of them for deeper nets.

    The square has each c with each activation, at one of the widths, with the filters in turn. Up to MOST_EAGER each of
    these comes with every number of rows (48 cells), and in deeper nets with one (16 cells). All nine pairs of rows and
    width occur.
    """
    if depth <= MOST_COMPLETE:
        return [(depth, *rest) for rest in itertools.product(CS, ACTIVATIONS, ROWS, WIDTHS, FILTERS)]
    cells = []
    for (i, c), (j, activation) in itertools.product(enumerate(CS), enumerate(ACTIVATIONS)):
        width = WIDTHS[(i + 2 * j) % 3]
        for shift in range(3 if depth <= MOST_EAGER else 1):
            cells.append((depth, c, activation, ROWS[(i + j + shift) % 3], width, FILTERS[(i + j + shift) % 2]))
    # The cells that take the most memory come last.
    return sorted(cells, key=lambda cell: cell[3] * cell[4] + cell[4] ** 2)


def grid_figures(depths: tuple[int, ...] = DEPTHS) -> Figures:
    for number, cell in enumerate(itertools.chain.from_iterable(map(grid_cells, depths))):
        depth, c, activation, rows, width, filter = cell
        setting = f"L={depth} c={c:g} {activation} M={rows} N={width} {filter}"
        # Memory for the weights, two of their gradients, and a chunk of layers in float64.
        needed = 4 * 3 * (depth + CHUNK) * width**2 + 2**30
        available = machine.available_memory_bytes("cpu")
        if available is not None and available < needed:
            print(f"left out, because it needs {needed / 1e9:.1f} GB: {setting}", flush=True)
            continue
        name, found, allowed = judge(cell, number)
        yield setting, None, None, name, found["parallel"], found["sequential"], found.get("eager"), allowed


def judge(cell: Cell, number: int = 0) -> tuple[str, dict[str, float], float]:
    """(the result nearest to its limit, or farthest beyond it; the error of each method; the limit).

    A result beyond its limit is judged again together with another draw: the largest error of a few numbers, such as
    alpha's gradient in a single layer, is a matter of luck, eager torch's included.
    """
    depth, c, activation, rows, width, filter = cell
    largest: dict[str, Errors] = {}
    for drawn in range(MOST_DRAWS):
        problem = draw(depth, rows, width, filter, c, activation, seed=MOST_DRAWS * number + drawn)
        methods = {"parallel": parallel(WINDOW if depth > MOST_EAGER else None), "sequential": F.orthogonal_filter}
        if depth <= MOST_EAGER:
            methods["eager"] = eager_torch
        with warnings.catch_warnings():
            # For a large c the solver warns and falls back to the sequential kernel. That result is correct too.
            warnings.simplefilter("ignore", RuntimeWarning)
            found = errors(problem, {method: results(problem, solve) for method, solve in methods.items()})
        for name, of_result in found.items():
            largest.setdefault(name, of_result).add(of_result.absolute, of_result.scale)
        name, worst = max(largest.items(), key=lambda pair: pair[1].share())
        if worst.share() <= 1:
            break
    return name, worst.relative(), worst.allowed()


# ---- Side by side ----------------------------------------------------------------------------------------------------


def error_figures(depth: int = DEPTH, rows: int = 32, width: int = 64) -> Figures:
    """Errors of all states at initialisation: in the default window, all layers at once, and by the other methods."""
    for filter, c in itertools.product(FILTERS, (1.0, 3.0)):
        problem = draw(depth, rows, width, filter, c, "tanh", seed=0)
        found = state_errors(problem, {None: parallel(None), depth: parallel(depth), "sequential": F.orthogonal_filter})
        eager = state_errors(problem, {"eager": eager_torch})["eager"]
        for window in (None, depth):
            setting = f"L={depth} c={c:g} tanh M={rows} N={width} {filter}"
            yield setting, None, window, "error of states", found[window], found["sequential"], eager


# ---- Command ---------------------------------------------------------------------------------------------------------

EXPERIMENTS = {"initial": initial_figures, "sweeps": sweep_figures, "grid": grid_figures, "error": error_figures}


def rows_of(experiment: str, figures: Figures) -> Iterator[Row]:
    # Read it now: it is the commit of the running code, and HEAD may move during the run.
    commit = runner._commit()
    for figure in figures:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        yield Row(date, commit, torch.__version__, experiment, *figure)


def line_of(row: Row) -> str:
    """The row as text for the terminal."""
    where = "" if row.step is None else f" step {row.step}"
    where += "" if row.window is None else f" window {row.window}"
    others = ((name, getattr(row, name)) for name in ("sequential", "eager", "allowed"))
    beside = "".join(f"  {name} {figure:.3g}" for name, figure in others if figure is not None)
    wrong = "  WRONG" if row.allowed is not None and not row.figure <= row.allowed else ""
    return f"{row.setting}{where}  {row.measure} {row.figure:.4g}{beside}{wrong}"


def verdict(rows: list[Row]) -> str:
    """The grid's result for each depth, in words."""
    lines = []
    for depth, of_depth in itertools.groupby(rows, lambda row: row.setting.split()[0]):
        of_depth = list(of_depth)
        worst = max(of_depth, key=lambda row: row.figure / row.allowed)
        passed = sum(row.figure <= row.allowed for row in of_depth)
        better = sum(row.figure <= row.sequential for row in of_depth)
        lines.append(
            f"{depth}: {passed} of {len(of_depth)} within the rule, {better} at least as exact as the sequential "
            f"kernel; the worst is at {worst.figure / worst.allowed:.2f} of its limit, {worst.measure}, "
            f"{worst.setting}"
        )
    return "\n".join(lines)


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows, and keep those of other experiments in the file."""
    names = [field.name for field in fields(Row)]
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["experiment"] not in {row.experiment for row in rows}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *map(asdict, rows)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", nargs="*", help=f"{', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument(
        "--depth", type=_positive, action="append", help="number of layers; grid takes several; default: each its own"
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every figure here")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweeps here")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.experiment if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment is called {unknown[0]!r}; choose from {', '.join(EXPERIMENTS)}")
    wrong = False
    for name in args.experiment or EXPERIMENTS:
        depths = args.depth or []
        figures = EXPERIMENTS[name](*([tuple(depths)] if depths and name == "grid" else depths[:1]))
        rows = []
        for row in rows_of(name, figures):
            print(line_of(row), flush=True)
            rows.append(row)
            if args.out:
                # The run takes hours: keep the rows found so far, whatever happens.
                write(args.out, rows)
        if name == "grid":
            print(verdict(rows))
            wrong |= any(not row.figure <= row.allowed for row in rows)
        if name == "sweeps" and args.plot:
            from lcw_ops.bench.reproduce.sweeps_picture import plot

            plot(rows, args.plot)
    return int(wrong)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
