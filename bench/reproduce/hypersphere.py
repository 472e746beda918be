"""The GmP paper's two small experiments, a 1-D Levy function and two bananas: one figure per method is published.

W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912. The experiments compare GmP, whose units are given by angles, with a
plain layer, weight norm and batch norm. Every net has one hidden layer of ReLUs and is trained by Adam. The settings
are those of the authors' notebooks (TensorFlow, float64), including the learning rates: 0.1 for GmP, 0.01 for the
others. We add a plain layer with GmP's rate, and repeat everything with several seeds, each of which draws data and
initial weights. Our banana points are drawn; the authors' are 1000 points of a benchmark's file (--banana-file).
"""

import argparse
import csv
import datetime
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lcw_ops.bench import runner
from lcw_ops.nn import GmPLinear, WeightNormLinear

# Keras' defaults that differ from torch's.
ADAM_EPS = 1e-7
BATCH_NORM = {"eps": 1e-3, "momentum": 0.01}
PLATEAU_THRESHOLD = 1e-4

LEVY_SAMPLES, LEVY_NOISE = 50, 0.1

BANANA_SAMPLES, BANANA_TEST_SAMPLES = 1000, 200
# The noise of the drawn bananas. The best possible classifier is right for 0.881 of such points. With PRTools' own
# noise of 1 it is right for 0.98, which would leave little difference between methods.
BANANA_RADIUS, BANANA_NOISE = 5.0, 2.0


@dataclass(frozen=True)
class Data:
    """Inputs (samples, features) and targets (samples, 1), float64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Experiment:
    """``watch(training loss of the epoch, model, data)`` should fall. If it has not fallen for half of ``patience``
    epochs, the learning rate drops to a tenth. After ``patience`` epochs without a fall, the best weights are restored
    and training ends.
    """

    name: str
    measure: str
    draw: Callable[[int], Data]
    units: int
    batch: int
    epochs: int
    patience: int
    loss: nn.Module
    watch: Callable[[float, nn.Module, Data], float]
    figure: Callable[[nn.Module, Data], float]
    published: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    date: str
    commit: str
    torch: str
    experiment: str
    data: str
    method: str
    learning_rate: float
    seed: int
    epochs: int
    measure: str
    figure: float
    published: float


# ---- Data -----------------------------------------------------------------------------------------------------------


def levy(x: np.ndarray) -> np.ndarray:
    """The 1-D Levy function sin(pi w)^2 + (w - 1)^2 (1 + sin(2 pi w)^2), w = 1 + (x - 1) / 4; its minimum is 0 at 1."""
    w = 1 + (x - 1) / 4
    return np.sin(np.pi * w) ** 2 + (w - 1) ** 2 * (1 + np.sin(2 * np.pi * w) ** 2)


def levy_data(seed: int) -> Data:
    """50 noisy values at random places of [-10, 10]. The test data are the function's own values on a grid.

    numpy's old generator draws the same numbers as the notebook: seed 0 gives the notebook's data.
    """
    generator = np.random.RandomState(seed)
    x_train = generator.uniform(-10, 10, (LEVY_SAMPLES, 1))
    y_train = levy(x_train) + generator.normal(0, LEVY_NOISE, (LEVY_SAMPLES, 1))
    x_test = np.linspace(-10, 10, 201)[:, None]
    return Data(*map(torch.from_numpy, (x_train, y_train, x_test, levy(x_test))))


def banana_data(seed: int) -> Data:
    """Two interlocked arcs of 5/8 of a circle, with normal noise: PRTools' banana set with twice its noise."""
    generator = np.random.RandomState(seed)
    y = generator.randint(2, size=(BANANA_SAMPLES, 1))
    t = generator.uniform(0, 1.25, (BANANA_SAMPLES, 1))
    angle = np.pi * np.where(y == 1, 0.125 + t, 0.375 - t)
    center = np.where(y == 1, 0.0, -0.75 * BANANA_RADIUS)
    x = BANANA_RADIUS * np.concatenate([np.sin(angle), np.cos(angle)], axis=1) + center
    return _split(x + generator.normal(0, BANANA_NOISE, x.shape), y, seed)


def banana_file_data(path: Path, seed: int) -> Data:
    """1000 of the benchmark's 5300 points; columns At1, At2, Class (-1 or 1). Seed 0 gives the notebook's points."""
    table = np.genfromtxt(path, delimiter=",", names=True)
    chosen = np.random.RandomState(seed).choice(len(table), BANANA_SAMPLES, replace=False)
    x = np.stack([table["At1"], table["At2"]], axis=1)[chosen]
    return _split(x, (table["Class"] == 1)[chosen, None], seed)


def _split(x: np.ndarray, y: np.ndarray, seed: int) -> Data:
    """Split as scikit-learn does, the first of a permutation for the test; standardise all by the training samples."""
    order = np.random.RandomState(seed).permutation(len(x))
    test, train = order[:BANANA_TEST_SAMPLES], order[BANANA_TEST_SAMPLES:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return Data(*(torch.from_numpy(part.astype(np.float64)) for part in (x[train], y[train], x[test], y[test])))


# ---- Networks -------------------------------------------------------------------------------------------------------


def plain(features: int, units: int) -> nn.Module:
    return nn.Sequential(_linear(features, units), nn.ReLU(), _linear(units, 1))


def batch_norm(features: int, units: int) -> nn.Module:
    return nn.Sequential(_linear(features, units), nn.BatchNorm1d(units, **BATCH_NORM), nn.ReLU(), _linear(units, 1))


def weight_norm(features: int, units: int) -> nn.Module:
    """Weight norm, including the output layer."""
    return nn.Sequential(_weight_norm_linear(features, units), nn.ReLU(), _weight_norm_linear(units, 1))


def gmp(features: int, units: int) -> nn.Module:
    return nn.Sequential(GmPLinear(features, units, activation="relu"), _linear(units, 1))


# The network and learning rate of each method.
METHODS: dict[str, tuple[Callable[[int, int], nn.Module], float]] = {
    "GmP": (gmp, 0.1),
    "plain": (plain, 0.01),
    "weight norm": (weight_norm, 0.01),
    "batch norm": (batch_norm, 0.01),
    # We add this to the authors' methods: it shows the effect of the rate alone.
    "plain, GmP's learning rate": (plain, 0.1),
}


def _linear(features: int, units: int) -> nn.Linear:
    """A linear layer with Keras' initialisation."""
    layer = nn.Linear(features, units)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _weight_norm_linear(features: int, units: int) -> nn.Module:
    return WeightNormLinear.from_linear(_linear(features, units))


# ---- Training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _test_outputs(model: nn.Module, data: Data) -> Tensor:
    return model.eval()(data.x_test)


def root_mean_square_error(model: nn.Module, data: Data) -> float:
    return (_test_outputs(model, data) - data.y_test).square().mean().sqrt().item()


def accuracy(model: nn.Module, data: Data) -> float:
    return ((_test_outputs(model, data) > 0) == (data.y_test == 1)).double().mean().item()


def train(experiment: Experiment, model: nn.Module, data: Data, learning_rate: float, epochs: int) -> int:
    """Train, and return the number of epochs."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, eps=ADAM_EPS, fused=True)
    # torch's patience is Keras' minus one.
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=experiment.patience // 2 - 1, threshold=PLATEAU_THRESHOLD, threshold_mode="abs", eps=0.0
    )
    best, best_epoch, best_state = math.inf, 0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(data.x_train)).split(experiment.batch):
            optimizer.zero_grad()
            loss = experiment.loss(model(data.x_train[batch]), data.y_train[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        watched = experiment.watch(total / len(data.x_train), model, data)
        plateau.step(watched)
        if watched < best:
            best, best_epoch = watched, epoch
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        elif epoch - best_epoch >= experiment.patience:
            model.load_state_dict(best_state)
            return epoch
    return epochs


LEVY = Experiment(
    name="1-D Levy function",
    measure="test RMSE",
    draw=levy_data,
    units=100,
    batch=LEVY_SAMPLES,
    epochs=10_000,
    patience=1000,
    loss=nn.L1Loss(),
    watch=lambda loss, model, data: loss,
    figure=root_mean_square_error,
    published={"GmP": 0.496, "plain": 1.104, "weight norm": 1.219, "batch norm": 1.244},
)
BANANA = Experiment(
    name="2-D banana",
    measure="test accuracy",
    draw=banana_data,
    units=10,
    batch=128,
    epochs=5000,
    patience=100,
    loss=nn.BCEWithLogitsLoss(),
    # As in the notebook, the test accuracy itself decides when the learning rate drops and which weights are kept. So
    # the reported accuracy is optimistic.
    watch=lambda loss, model, data: -accuracy(model, data),
    figure=accuracy,
    published={"GmP": 0.885, "plain": 0.800, "weight norm": 0.810, "batch norm": 0.875},
)
EXPERIMENTS = {"levy": LEVY, "banana": BANANA}


def run(experiment: Experiment, method: str, seed: int, epochs: int) -> tuple[float, int]:
    """Train once. Returns the figure and the number of epochs. The seed alone decides data and weights."""
    build, learning_rate = METHODS[method]
    data = experiment.draw(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(data.x_train.shape[1], experiment.units).double()
        done = train(experiment, model, data, learning_rate, epochs)
    return experiment.figure(model, data), done


def rows_of(experiment: Experiment, source: str, seeds: int, epochs: int) -> Iterator[Row]:
    # Read it now: it is the commit of the running code, and HEAD may move during the run.
    commit = runner._commit()
    for method, (_, learning_rate) in METHODS.items():
        for seed in range(seeds):
            figure, done = run(experiment, method, seed, epochs)
            yield Row(
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                commit=commit,
                torch=torch.__version__,
                experiment=experiment.name,
                data=source,
                method=method,
                learning_rate=learning_rate,
                seed=seed,
                epochs=done,
                measure=experiment.measure,
                figure=figure,
                published=experiment.published.get(method, math.nan),
            )


def table(rows: list[Row]) -> str:
    """Mean and standard deviation over the seeds, beside the published figure."""
    lines = [
        f"{rows[0].experiment} ({rows[0].data}): {rows[0].measure}",
        f"{'method':<28}{'mean':>8}{'spread':>8}{'published':>11}",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method]
        figures = [row.figure for row in of_method]
        spread = statistics.stdev(figures) if len(figures) > 1 else math.nan
        lines.append(f"{method:<28}{statistics.mean(figures):8.3f}{spread:8.3f}{of_method[0].published:11.3f}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--experiment", choices=EXPERIMENTS, help="default: both")
    parser.add_argument("--seeds", type=_positive, default=5, help="trainings of each method (5)")
    parser.add_argument("--steps", type=_positive, help="most passes over the data (Levy 10000, banana 5000)")
    parser.add_argument("--banana-file", type=Path, metavar="CSV", help="the benchmark's file, with At1, At2, Class")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every figure here")
    args = parser.parse_args(arguments)
    rows = []
    for name in [args.experiment] if args.experiment else EXPERIMENTS:
        experiment, source = EXPERIMENTS[name], "drawn"
        if name == "banana" and args.banana_file:
            experiment = replace(experiment, draw=functools.partial(banana_file_data, args.banana_file))
            source = args.banana_file.name
        of_experiment = list(rows_of(experiment, source, args.seeds, args.steps or experiment.epochs))
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
