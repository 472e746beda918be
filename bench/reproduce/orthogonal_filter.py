"""Random orthogonal additive filters: the Jacobian over 50,000 layers, a net of that depth, memory over 10,000 steps.

A. Ceni, arXiv 2210.01245. The widths, rates and scales of the paper are not known to us; all settings here are ours.
Permuted sequential digits, the paper's benchmark, are in permuted_digits.py.

``isometry``: the singular values of the Jacobian from the first to the last state, of one sample in a net as it is
initialised, beside those of a plain net of tanh layers with Haar weights. For the orthogonal filter also the gradient's
norm at the layer where it is smallest and largest, divided by that of the last layer.

``deep``: the multilayer perceptron of ``lcw-ops train``, with that command's settings, beside a residual net and a
plain net of the same depth, width, data and optimizer. Those two have their own grid of learning rates.

``memory``: a digit of 64 pixels is read, one pixel a step, and zeros until step 10,000; then its class is asked for.

``adding``: two numbers of a long sequence are marked, one in each half, and their sum is the target. A network that
ignores the input has a mean squared error of 1/6. The peers of these two are torch's LSTM and plain RNN (identity
start, ReLU), at the same number of steps of training.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops.bench.reproduce import rows
from lcw_ops.bench.reproduce.permuted_digits import make_lstm, make_rnn
from lcw_ops.jobs import data
from lcw_ops.jobs.loop import Training, accuracy
from lcw_ops.jobs.settings import DEFAULTS
from lcw_ops.jobs.train import ADAM_BETAS, LABEL_SMOOTHING
from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.nn.orthogonal_filter import make_filter

DEPTH, WIDTH, SEEDS = 50_000, 64, 6
BATCH = 64
SEARCH_SEED = 100
# The rates of the two peers of a deep net. Ours has the default of ``lcw-ops train``, which was found by such a grid.
RATES = (0.001, 0.01, 0.04)
LENGTH, TIME_WIDTH = 10_000, 64
MEMORY_STEPS, ADDING_STEPS, ADDING_BATCH = 100, 400, 32
CHANCE = 1 / 6


# ---- Isometry -------------------------------------------------------------------------------------------------------


def jacobian(weight: Tensor, filter: Tensor, c: float, x: Tensor) -> Tensor:
    """The Jacobian (N, N) from h_0 to h_L at the sample x (N,). Its rows are found at once, by N equal samples."""
    width = len(x)
    h = x.expand(width, width).clone().requires_grad_()
    last = F.orthogonal_filter(h, weight, None, filter, beta=c / len(weight))
    (rows,) = torch.autograd.grad(last, h, torch.eye(width, dtype=x.dtype))
    return rows


def plain_jacobian(depth: int, x: Tensor) -> Tensor:
    """The same of h <- tanh(W h), with a Haar matrix W in each layer, which begins as an isometry."""
    product = torch.eye(len(x), dtype=x.dtype)
    for _ in range(depth):
        weight = make_filter("haar", len(x), x.dtype)
        x = torch.tanh(weight @ x)
        product = (1 - x.square())[:, None] * (weight @ product)
    return product


def gradient_norms(weight: Tensor, filter: Tensor, c: float, x: Tensor) -> tuple[float, float]:
    """The smallest and the largest norm of the gradient of a state, relative to that of the last one."""
    states = F.orthogonal_filter(x, weight, None, filter, beta=c / len(weight), return_states=True)
    # The gradient of the state before layer l is J^T g; it is found from the states, layer by layer in plain torch.
    gradient, norms = torch.ones_like(x), []
    beta = c / len(weight)
    for w, state in zip(weight.flip(0), states.flip(0)[1:], strict=True):
        slope = 1 - torch.tanh(state @ w.T).square()
        gradient = (1 - beta) * (gradient @ filter) + (beta * slope * gradient) @ w
        norms.append(gradient.norm().item())
    return min(norms) / math.sqrt(x.numel()), max(norms) / math.sqrt(x.numel())


def isometry_figures(seeds: int, depth: int) -> Iterator[rows.Figure]:
    setting = f"{depth} layers of {WIDTH}"
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x = torch.randn(WIDTH, dtype=torch.float64)
            weight = torch.randn(depth, WIDTH, WIDTH, dtype=torch.float64) / math.sqrt(WIDTH)
            filter = make_filter("haar", WIDTH, torch.float64)
            values = {
                "orthogonal filter, c = 1": torch.linalg.svdvals(jacobian(weight, filter, 1.0, x)),
                "plain tanh": torch.linalg.svdvals(plain_jacobian(depth, x)),
            }
            norms = gradient_norms(weight, filter, 1.0, x[None])
        for method, singular in values.items():
            yield "isometry", setting, method, 0.0, seed, "smallest singular value", singular.min().item()
            yield "isometry", setting, method, 0.0, seed, "largest singular value", singular.max().item()
        for name, norm in zip(("smallest", "largest"), norms, strict=True):
            yield "isometry", setting, "orthogonal filter, c = 1", 0.0, seed, f"{name} gradient norm", norm


# ---- A deep net -----------------------------------------------------------------------------------------------------


class DeepNet(nn.Module):
    """h <- tanh(W h + b), or h <- h + tanh(W h + b) / L if it is residual, with the weights of all layers in one."""

    def __init__(self, features: int, width: int, depth: int, classes: int, is_residual: bool) -> None:
        super().__init__()
        self.input_layer, self.output_layer = nn.Linear(features, width), nn.Linear(width, classes)
        self.weight = nn.Parameter(torch.randn(depth, width, width) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(depth, width))
        self.alpha, self.beta = (1.0, 1 / depth) if is_residual else (0.0, 1.0)
        self.register_buffer("filter", torch.arange(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.orthogonal_filter(
            self.input_layer(x), self.weight, self.bias, self.filter, alpha=self.alpha, beta=self.beta
        )
        return self.output_layer(h)


def deep_net(method: str, dataset: data.Dataset, depth: int) -> nn.Module:
    default = DEFAULTS["mlp"]
    if method == "orthogonal filter":
        options = {"filter": default["filter"], "beta": default["c"] / depth}
        return OrthogonalFilterMLP(dataset.features, default["width"], depth, dataset.classes, **options)
    return DeepNet(dataset.features, default["width"], depth, dataset.classes, method == "residual")


def train_deep(method: str, rate: float, seed: int, steps: int, depth: int) -> tuple[float, float]:
    """(test accuracy, mean loss of the last ten steps)."""
    dataset = data.load_digits(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = deep_net(method, dataset, depth)
    training = Training(model, dataset, steps, BATCH, rate, seed, ADAM_BETAS, LABEL_SMOOTHING)
    losses = [training.step() for _ in range(steps)]
    return accuracy(model, dataset), statistics.mean(losses[-10:])


def deep_figures(seeds: int, steps: int, depth: int) -> Iterator[rows.Figure]:
    setting = f"{depth} layers of {DEFAULTS['mlp']['width']}, {steps} steps"
    for method in ("orthogonal filter", "residual", "plain"):
        rates = {DEFAULTS["mlp"]["lr"]: 0.0} if method == "orthogonal filter" else dict.fromkeys(RATES, 0.0)
        for rate in rates if len(rates) > 1 else ():
            rates[rate] = train_deep(method, rate, SEARCH_SEED, steps, depth)[1]
            yield "deep", setting, method, rate, SEARCH_SEED, "search: training loss", rates[rate]
        best = min(rates, key=rates.__getitem__)
        for seed in range(seeds):
            share, loss = train_deep(method, best, seed, steps, depth)
            yield "deep", setting, method, best, seed, "test accuracy", share
            yield "deep", setting, method, best, seed, "training loss", loss


# ---- Memory over time -----------------------------------------------------------------------------------------------


# Method -> rates that are tried. Every method has as many.
TIME_RATES = {"orthogonal filter": (0.02, 0.06), "LSTM": (0.003, 0.01), "plain RNN": (1e-4, 1e-3)}


class LastState(nn.Module):
    """x (T, B, inputs) -> (B, outputs), linear in the last state times ``scale``."""

    def __init__(self, recurrence: nn.Module, width: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.recurrence, self.output, self.scale = recurrence, nn.Linear(width, outputs), scale

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrence(x)
        return self.output(states[-1] * self.scale)


def network_over_time(method: str, inputs: int, outputs: int, length: int, informative: int) -> nn.Module:
    """A network for sequences of ``length`` steps, of which about ``informative`` carry information.

    Ours has the width 64 and as many parameters as an LSTM of width 32, or nearly as a plain network of width 64.
    """
    if method == "orthogonal filter":
        recurrence = OrthogonalFilterRNN(inputs, TIME_WIDTH, beta=2 / length)
        # A step adds at most beta to a state that starts at 0.
        return LastState(recurrence, TIME_WIDTH, outputs, length / informative)
    if method == "LSTM":
        return LastState(make_lstm(TIME_WIDTH // 2, 1.0, inputs), TIME_WIDTH // 2, outputs)
    return LastState(make_rnn(TIME_WIDTH, "identity", "relu", inputs), TIME_WIDTH, outputs)


def _train_over_time(model: nn.Module, rate: float, batches: Iterator, loss_of, clip: float = 1.0) -> list[float]:
    """The losses of all batches; inf at the end if one is not finite."""
    # The gradients carry the factor beta, so the usual eps of 1e-8 would exceed them.
    optimizer = torch.optim.Adam(model.parameters(), rate, eps=1e-12)
    batches = list(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    losses = []
    for draw in batches:
        x, target = draw()
        optimizer.zero_grad()
        loss = loss_of(model(x), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return [*losses, math.inf]
    return losses


def _drawn(seed: int, build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def train_memory(method: str, rate: float, seed: int, steps: int, length: int) -> tuple[float, float]:
    """(test accuracy, mean loss of the last tenth of the steps)."""
    digits = data.load_digits(0)
    model = _drawn(seed, lambda: network_over_time(method, 1, digits.classes, length, digits.features))
    generator = torch.Generator().manual_seed(seed)

    def sequences(x: Tensor) -> Tensor:
        return nn.functional.pad(x.T, (0, 0, 0, length - x.shape[1])).unsqueeze(-1)

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(digits.y_train), (BATCH,), generator=generator)
        return sequences(digits.x_train[chosen]), digits.y_train[chosen]

    losses = _train_over_time(model, rate, itertools.repeat(draw, steps), nn.functional.cross_entropy)
    with torch.no_grad():
        batches = zip(digits.x_test.split(BATCH), digits.y_test.split(BATCH), strict=True)
        right = sum((model(sequences(x)).argmax(1) == y).sum().item() for x, y in batches)
    return right / len(digits.y_test), statistics.mean(losses[-max(1, steps // 10) :])


def adding_batch(length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (length, batch, 2), numbers from [0, 1) and marks; the sum of the two numbers that are marked (batch,)."""
    values = torch.rand(length, batch, generator=generator)
    first = torch.randint(0, length // 2, (batch,), generator=generator)
    second = torch.randint(length // 2, length, (batch,), generator=generator)
    marks, each = torch.zeros(length, batch), torch.arange(batch)
    marks[first, each] = marks[second, each] = 1.0
    return torch.stack((values, marks), -1), values[first, each] + values[second, each]


def train_adding(method: str, rate: float, seed: int, steps: int, length: int) -> tuple[float]:
    """The mean squared error on the last tenth of the batches, each of which is new."""
    model = _drawn(seed, lambda: network_over_time(method, 2, 1, length, length))
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        return adding_batch(length, ADDING_BATCH, generator)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.squeeze(1) - target).square().mean()

    losses = _train_over_time(model, rate, itertools.repeat(draw, steps), loss)
    return (statistics.mean(losses[-max(1, steps // 10) :]),)


# The last measure decides the rate.
TASKS = {
    "memory": (train_memory, ("test accuracy", "training loss")),
    "adding": (train_adding, ("mean squared error",)),
}


def time_figures(task: str, seeds: int, steps: int, length: int) -> Iterator[rows.Figure]:
    train, measures = TASKS[task]
    setting = f"{length} time steps, {steps} steps of training"
    for method, rates in TIME_RATES.items():
        found = {}
        for rate in rates:
            found[rate] = train(method, rate, SEARCH_SEED, steps, length)[-1]
            yield task, setting, method, rate, SEARCH_SEED, f"search: {measures[-1]}", found[rate]
        best = min(found, key=found.__getitem__)
        for seed in range(seeds):
            for measure, figure in zip(measures, train(method, best, seed, steps, length), strict=True):
                yield task, setting, method, best, seed, measure, figure


# ---- Command --------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    makers = {
        "isometry": lambda args: isometry_figures(args.seeds, args.depth),
        "deep": lambda args: deep_figures(args.seeds, args.steps or DEFAULTS["mlp"]["steps"], args.depth),
        "memory": lambda args: time_figures("memory", args.seeds, args.steps or MEMORY_STEPS, args.length),
        "adding": lambda args: time_figures("adding", args.seeds, args.steps or ADDING_STEPS, args.length),
    }
    parser.add_argument("--experiment", action="append", choices=makers, help="one experiment; default: all")
    parser.add_argument("--seeds", type=rows.positive, default=SEEDS, help=f"trainings of each method ({SEEDS})")
    parser.add_argument("--depth", type=rows.positive, default=DEPTH, help=f"layers ({DEPTH})")
    parser.add_argument("--length", type=rows.positive, default=LENGTH, help=f"time steps ({LENGTH})")
    steps = f"of training ({DEFAULTS['mlp']['steps']}, {MEMORY_STEPS}, {ADDING_STEPS} by experiment)"
    parser.add_argument("--steps", type=rows.positive, help=steps)
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every figure here")
    args = parser.parse_args(arguments)
    names = args.experiment or list(makers)
    figures = itertools.chain.from_iterable(makers[name](args) for name in names)
    collected = rows.collect("orthogonal filter", _count(names, args.seeds), figures)
    print(rows.table(collected))
    if args.out:
        rows.write(collected, args.out)
    return 0


def _count(names: list[str], seeds: int) -> int:
    """The number of figures."""
    counts = {"isometry": 6 * seeds, "deep": 2 * len(RATES) + 3 * 2 * seeds}
    for task, (_, measures) in TASKS.items():
        counts[task] = sum(len(rates) + len(measures) * seeds for rates in TIME_RATES.values())
    return sum(counts[name] for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
