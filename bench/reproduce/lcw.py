"""The LCW paper's statements: activation shift, a sigmoid net of 100 layers, and batch norm with and without LCW.

T. Kutsuna, ECML PKDD 2019, arXiv 2403.13833. The paper trains on CIFAR-10, CIFAR-100 and SVHN, with settings that we do
not know. All settings here are ours, on scikit-learn's digits, 8 x 8 pixels.

``shift``: the shift of a unit is the mean of its pre-activation over the samples. Reported are its root mean square
over units, divided by that of the deviations over samples, and the variance of the gradient in the first layer relative
to the last one. The nets are as they are initialised.

``sigmoid``: a multilayer perceptron of 100 sigmoid layers. The plain net has Glorot's weights, or weights of a scale
that keeps the variance of the pre-activations. Every method has the same grid of learning rates.

``batch norm``: a perceptron and a convolutional net with batch norm, on a tenth of the training images and on all.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lcw_ops import init
from lcw_ops.bench.reproduce import rows
from lcw_ops.jobs import data
from lcw_ops.nn import LCWConv2d, LCWLinear
from lcw_ops.reference import activation_variance

WIDTH, BATCH, MOMENTUM = 64, 64, 0.9
SIDE, CHANNELS = 8, 32
SIGMOID_LAYERS, BATCH_NORM_LAYERS, CONVOLUTIONS = 100, 5, 4
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SEEDS, EPOCHS = 6, 15
# The seed that chooses the rate is not among those that are reported.
SEARCH_SEED = 100
SHARES = (0.1, 1.0)

LAYERS = (nn.Linear, nn.Conv2d, LCWLinear, LCWConv2d)


# ---- Networks -------------------------------------------------------------------------------------------------------


def make_linear(method: str, inputs: int, units: int, after: str | None) -> nn.Linear | LCWLinear:
    """A layer behind the activation ``after``, or behind the standardised data if that is None."""
    if method == "LCW":
        layer = LCWLinear(inputs, units)
        init.lcw_(layer.weight_u, after)
        return layer
    layer = nn.Linear(inputs, units)
    if method == "plain, Glorot":
        nn.init.xavier_normal_(layer.weight)
    else:
        # E z^2 = m sw^2 E a^2 = 1, where E a^2 = Var a + (E a)^2, and the mean of a sigmoid is 1/2.
        square = 1.0 if after is None else activation_variance(after, 1.0) + 0.25
        nn.init.normal_(layer.weight, std=math.sqrt(1 / (inputs * square)))
    nn.init.zeros_(layer.bias)
    return layer


def sigmoid_net(method: str, features: int, classes: int, layers: int = SIGMOID_LAYERS) -> nn.Sequential:
    sizes = [features, *[WIDTH] * layers, classes]
    after = [None, *["sigmoid"] * layers]
    linear = [make_linear(method, *pair, name) for pair, name in zip(itertools.pairwise(sizes), after, strict=True)]
    hidden = [module for layer in linear[:-1] for module in (layer, nn.Sigmoid())]
    return nn.Sequential(*hidden, linear[-1])


def batch_norm_perceptron(method: str, features: int, classes: int) -> nn.Sequential:
    sizes = [features, *[WIDTH] * BATCH_NORM_LAYERS]
    make = LCWLinear if method == "LCW" else nn.Linear
    hidden = [m for pair in itertools.pairwise(sizes) for m in (make(*pair), nn.BatchNorm1d(WIDTH), nn.ReLU())]
    for layer in hidden[::3]:
        nn.init.kaiming_normal_(layer.weight_u if method == "LCW" else layer.weight, nonlinearity="relu")
    return nn.Sequential(*hidden, nn.Linear(WIDTH, classes))


def batch_norm_convolutions(method: str, features: int, classes: int) -> nn.Sequential:
    make = LCWConv2d if method == "LCW" else nn.Conv2d
    channels = [1, *[CHANNELS] * CONVOLUTIONS]
    hidden = []
    for number, pair in enumerate(itertools.pairwise(channels)):
        layer = make(*pair, 3, stride=2 if number == CONVOLUTIONS // 2 else 1, padding=1)
        nn.init.kaiming_normal_(layer.weight_u if method == "LCW" else layer.weight, nonlinearity="relu")
        hidden += [layer, nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Unflatten(1, (1, SIDE, SIDE)), *hidden, *pooled, nn.Linear(CHANNELS, classes))


@dataclass(frozen=True)
class Experiment:
    """``build(method, features, classes)``, for every method."""

    build: Callable[[str, int, int], nn.Sequential]
    methods: tuple[str, ...]
    shares: tuple[float, ...] = (1.0,)


SIGMOID = {"sigmoid": Experiment(sigmoid_net, ("plain, Glorot", "plain, same variance", "LCW"))}
BATCH_NORM = {
    f"{BATCH_NORM_LAYERS} ReLU layers": Experiment(batch_norm_perceptron, ("plain", "LCW"), SHARES),
    f"{CONVOLUTIONS} convolutions": Experiment(batch_norm_convolutions, ("plain", "LCW"), SHARES),
}


# ---- Training -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, dataset: data.Dataset, share: float, rate: float, epochs: int) -> tuple[float, float]:
    """(test accuracy, the last epoch's mean loss) by SGD with momentum and a cosine schedule. 0 and inf if it fails."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    used = torch.randperm(len(dataset.x_train))[: round(share * len(dataset.x_train))]
    for _ in range(epochs):
        total = 0.0
        for batch in used[torch.randperm(len(used))].split(BATCH):
            # Batch norm has no variance of one sample.
            if len(batch) < 2:
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(dataset.x_train[batch]), dataset.y_train[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        if not math.isfinite(total):
            return 0.0, math.inf
    model.eval()
    with torch.no_grad():
        right = model(dataset.x_test).argmax(1) == dataset.y_test
    return right.double().mean().item(), total / len(used)


def _run(
    experiment: Experiment, method: str, dataset: data.Dataset, share: float, rate: float, seed: int, epochs: int
) -> tuple[float, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return train(experiment.build(method, dataset.features, dataset.classes), dataset, share, rate, epochs)


def training_figures(name: str, experiments: dict[str, Experiment], seeds: int, epochs: int) -> Iterator[rows.Figure]:
    """The rate of each method is the one with the smallest training loss from one seed; then the seeds are reported."""
    for kind, experiment in experiments.items():
        for share in experiment.shares:
            setting = f"{kind}, {share:.0%} of the images"
            for method in experiment.methods:
                found = {}
                for rate in RATES:
                    accuracy, loss = _run(
                        experiment, method, data.load_digits(SEARCH_SEED), share, rate, SEARCH_SEED, epochs
                    )
                    found[rate] = loss
                    yield name, setting, method, rate, SEARCH_SEED, "search: training loss", loss
                best = min(found, key=found.__getitem__)
                for seed in range(seeds):
                    accuracy, loss = _run(experiment, method, data.load_digits(seed), share, best, seed, epochs)
                    yield name, setting, method, best, seed, "test accuracy", accuracy
                    yield name, setting, method, best, seed, "training loss", loss


# ---- Activation shift -----------------------------------------------------------------------------------------------


def shifts(model: nn.Sequential, x: Tensor) -> list[float]:
    """For every layer with weights: the root mean square of the units' shifts over that of the deviations."""
    shifts = []

    def watch(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        # A unit of a convolution is a channel.
        units = output.double().transpose(0, 1).flatten(1)
        shift, deviation = units.mean(1).square().mean(), units.var(1, correction=0).mean()
        shifts.append((shift / deviation).sqrt().item())

    handles = [m.register_forward_hook(watch) for m in model if isinstance(m, LAYERS)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return shifts


def gradient_ratio(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """The variance of the gradient of the first layer's pre-activations, relative to the last hidden layer's."""
    outputs = []
    layers = [module for module in model if isinstance(module, LAYERS)]
    handles = [module.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for module in layers]
    loss = nn.functional.cross_entropy(model(x), y)
    for handle in handles:
        handle.remove()
    first, last = torch.autograd.grad(loss, (outputs[0], outputs[-2]))
    return (first.double().square().mean() / last.double().square().mean()).item()


def shift_figures(seeds: int) -> Iterator[rows.Figure]:
    nets = {
        **{f"{SIGMOID_LAYERS} sigmoid layers": (sigmoid_net, SIGMOID["sigmoid"].methods)},
        **{f"{kind}, batch norm": (e.build, e.methods) for kind, e in BATCH_NORM.items()},
    }
    for kind, (build, methods) in nets.items():
        for method, seed in itertools.product(methods, range(seeds)):
            dataset = data.load_digits(seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                # Float64, because the plain net's gradient is 1e-80 times as large at the other end.
                model = build(method, dataset.features, dataset.classes).double()
            x = dataset.x_train.double()
            # The first layer sees the standardised data, and the last one is plain in the nets with batch norm.
            yield "shift", kind, method, 0.0, seed, "shift", statistics.median(shifts(model, x)[1:-1])
            if build is sigmoid_net:
                ratio = gradient_ratio(model, x, dataset.y_train)
                yield "shift", kind, method, 0.0, seed, "gradient variance, first / last", ratio


# ---- Command --------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    makers = {
        "shift": lambda args: shift_figures(args.seeds),
        "sigmoid": lambda args: training_figures("sigmoid", SIGMOID, args.seeds, args.epochs),
        "batch norm": lambda args: training_figures("batch norm", BATCH_NORM, args.seeds, args.epochs),
    }
    parser.add_argument("--experiment", choices=makers, help="default: all")
    parser.add_argument("--seeds", type=rows.positive, default=SEEDS, help=f"trainings of each method ({SEEDS})")
    parser.add_argument("--epochs", type=rows.positive, default=EPOCHS, help=f"passes over the digits ({EPOCHS})")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every figure here")
    args = parser.parse_args(arguments)
    names = [args.experiment] if args.experiment else list(makers)
    figures = itertools.chain.from_iterable(makers[name](args) for name in names)
    collected = rows.collect("lcw", _count(names, args.seeds), figures)
    print(rows.table(collected))
    if args.out:
        rows.write(collected, args.out)
    return 0


def _count(names: list[str], seeds: int) -> int:
    """The number of figures."""
    counts = {"shift": seeds * (2 * len(SIGMOID["sigmoid"].methods) + 2 * len(BATCH_NORM))}
    for name, experiments in (("sigmoid", SIGMOID), ("batch norm", BATCH_NORM)):
        counts[name] = sum(len(e.methods) * len(e.shares) * (len(RATES) + 2 * seeds) for e in experiments.values())
    return sum(counts[name] for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
