"""The effect of activated gradients f(g) = alpha atan(beta g) on training, beside plain optimizers.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, arXiv 2107.04228, report better accuracy of deep nets, and faster escape from
saddle points. Near a stationary point an activated gradient is K = alpha beta times the gradient, so it has to beat a
plain optimizer with K times the learning rate. The first experiment trains multilayer perceptrons on scikit-learn's
digits, with the authors' CIFAR settings (SGD at 0.1, momentum 0.9, decay 5e-4, cosine schedule). We report the accuracy
after the last epoch; the authors report the best of all epochs. The second experiment counts the steps from y = 1e-8 to
y = 1e-2 at the saddle F = (x^2 - mu y^2) / 2, in float64.
"""

import argparse
import csv
import datetime
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from lcw_ops import optim
from lcw_ops.bench import runner
from lcw_ops.jobs import data

ALPHA, BETA = 0.1, 20.0
GAIN = ALPHA * BETA
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
# With the authors' batches of 256, an epoch would have only 6 steps here.
BATCH, EPOCHS, WIDTH = 64, 40, 64

SADDLE_START, SADDLE_END = 1e-8, 1e-2
CURVATURES = (1.0, 0.1, 0.01)
# The saddle has neither momentum nor decay. Without them the other methods are the same as these.
SADDLE_METHODS = ("plain", "plain, rate K", "activated gradient")


@dataclass(frozen=True)
class Network:
    """A net of ``layers`` hidden layers of WIDTH units, with Glorot weights and zero biases."""

    name: str
    activation: Callable[[], nn.Module]
    layers: int

    def build(self, features: int, classes: int) -> nn.Module:
        sizes = [features, *[WIDTH] * self.layers, classes]
        linear = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        for layer in linear:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        hidden = [module for layer in linear[:-1] for module in (layer, self.activation())]
        return nn.Sequential(*hidden, linear[-1])


NETWORKS = (Network("tanh", nn.Tanh, 10), Network("sigmoid", nn.Sigmoid, 4))


@dataclass(frozen=True)
class Method:
    """Factors of LEARNING_RATE and WEIGHT_DECAY, and the activation options of lcw_ops.optim.SGD."""

    rate: float
    decay: float
    activation: dict


GAF = {"gradient_activation": "arctan", "alpha": ALPHA, "beta": BETA}
PLAIN = {"gradient_activation": None}
METHODS = {
    "plain": Method(1.0, 1.0, PLAIN),
    # Near a stationary point, "plain, rate K" equals the activated momentum, in which f acts on the decay too. "plain,
    # rate K, decay 1/K" equals the activated gradient, in which f does not act on the decay.
    "plain, rate K": Method(GAIN, 1.0, PLAIN),
    "plain, rate K, decay 1/K": Method(GAIN, 1 / GAIN, PLAIN),
    "activated momentum": Method(1.0, 1.0, GAF | {"activate": "momentum"}),
    "activated gradient": Method(1.0, 1.0, GAF | {"activate": "gradient"}),
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    date: str
    commit: str
    torch: str
    experiment: str
    setting: str
    method: str
    learning_rate: float
    seed: int
    measure: str
    figure: float


Figures = Iterator[tuple[str, str, int, str, float]]


# ---- Digits ---------------------------------------------------------------------------------------------------------


def train(network: Network, method: Method, seed: int, epochs: int) -> tuple[float, float]:
    """Test accuracy after the last epoch, and that epoch's mean training loss. The seed decides data and weights."""
    digits = data.load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.build(digits.features, digits.classes)
        rate, decay = method.rate * LEARNING_RATE, method.decay * WEIGHT_DECAY
        optimizer = optim.SGD(model.parameters(), rate, momentum=MOMENTUM, weight_decay=decay, **method.activation)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            loss = _epoch(model, optimizer, digits)
            schedule.step()
    with torch.no_grad():
        right = model(digits.x_test).argmax(1) == digits.y_test
    return right.double().mean().item(), loss


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, digits: data.Dataset) -> float:
    total = 0.0
    for batch in torch.randperm(len(digits.x_train)).split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(digits.x_train)


def digits_figures(seeds: int, epochs: int) -> Figures:
    for network in NETWORKS:
        setting = f"{network.layers} {network.name} layers of {WIDTH}, {epochs} epochs"
        for name, method in METHODS.items():
            for seed in range(seeds):
                accuracy, loss = train(network, method, seed, epochs)
                yield setting, name, seed, "test accuracy", accuracy
                yield setting, name, seed, "training loss", loss


# ---- Saddle ---------------------------------------------------------------------------------------------------------


def steps_to_escape(method: Method, curvature: float) -> int:
    """The steps of gradient descent, without momentum or decay, in which y grows from SADDLE_START to SADDLE_END."""
    place = torch.tensor([1e-3, SADDLE_START], dtype=torch.float64, requires_grad=True)
    optimizer = optim.SGD([place], method.rate * LEARNING_RATE, **method.activation)
    slope = torch.tensor([1.0, -curvature], dtype=torch.float64)
    place.grad = torch.empty_like(place)
    steps = 0
    while place[1].item() < SADDLE_END:
        torch.mul(place.detach(), slope, out=place.grad)
        optimizer.step()
        steps += 1
    return steps


def saddle_figures() -> Figures:
    for curvature in CURVATURES:
        for name in SADDLE_METHODS:
            yield f"mu {curvature:g}", name, 0, "steps to escape", steps_to_escape(METHODS[name], curvature)


# ---- Command --------------------------------------------------------------------------------------------------------


def rows_of(experiment: str, figures: Figures) -> list[Row]:
    # Read it now: it is the commit of the running code, and HEAD may move during the run.
    commit = runner._commit()
    return [
        Row(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            commit=commit,
            torch=torch.__version__,
            experiment=experiment,
            setting=setting,
            method=method,
            learning_rate=METHODS[method].rate * LEARNING_RATE,
            seed=seed,
            measure=measure,
            figure=figure,
        )
        for setting, method, seed, measure, figure in figures
    ]


def table(rows: list[Row]) -> str:
    """Mean and standard deviation over the seeds for every setting, measure and method."""
    of_kind: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        of_kind.setdefault((row.setting, row.measure, row.method), []).append(row.figure)
    lines = [rows[0].experiment, f"{'setting':<34}{'measure':<18}{'method':<26}{'mean':>10}{'spread':>9}"]
    for (setting, measure, method), figures in of_kind.items():
        spread = statistics.stdev(figures) if len(figures) > 1 else math.nan
        lines.append(f"{setting:<34}{measure:<18}{method:<26}{statistics.mean(figures):10.5g}{spread:9.2g}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--experiment", choices=("digits", "saddle"), help="default: both")
    parser.add_argument("--seeds", type=_positive, default=5, help="trainings of each method (5)")
    parser.add_argument("--epochs", type=_positive, default=EPOCHS, help=f"passes over the digits ({EPOCHS})")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every figure here")
    args = parser.parse_args(arguments)
    experiments = {"digits": lambda: digits_figures(args.seeds, args.epochs), "saddle": saddle_figures}
    rows = []
    for name in [args.experiment] if args.experiment else experiments:
        of_experiment = rows_of(name, experiments[name]())
        print(table(of_experiment), end="\n\n", flush=True)
        rows += of_experiment
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
