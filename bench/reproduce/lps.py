"""How often rules for initial weights give dead ReLU nets, and what that means for training.

The paper of LPS (Q. Chen, W. Hao, J. He, Applied Math. and Computation 415 (2022), arXiv 2109.00125) claims a lower
probability of dying ReLU than existing rules have. We do not know its printed constants, so our rules are those that
lcw_ops.reference derives. The first experiment draws narrow ReLU nets of one input, and counts those whose last hidden
layer is constant on a grid of 65 points. Beside it is the exact probability that a hidden layer is off at one fixed
input, which no symmetric rule escapes: 1 - prod_l (1 - 2^-N_l) for layers of N_l units. The second experiment trains a
narrow deep perceptron and a small convolutional net on scikit-learn's digits, by SGD with momentum, with one learning
rate for all rules.
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
from torch import Tensor, nn

from lcw_ops import init
from lcw_ops.bench import runner
from lcw_ops.jobs import data
from lcw_ops.reference import anchored, heavy_tail, hermite_second_moment, joint

WIDTHS, DEPTHS, NETS = (2, 3, 5, 10), (10, 30), 600
# Standardised inputs: the uniform law on [-sqrt(3), sqrt(3)] has the variance 1.
GRID = torch.linspace(-math.sqrt(3), math.sqrt(3), 65, dtype=torch.float64)[:, None]
# A layer is constant if its outputs differ by less than this share of the differences of its pre-activations: at an
# anchor a pre-activation is 0 up to rounding.
CONSTANT = 1e-12

# sigma of the randomised asymmetric initialisation, -2 sqrt(2) / (3 sqrt(pi)) + sqrt(1 + 8 / (9 pi)).
RAI_DEVIATION = 0.6007

MLP_WIDTH, MLP_LAYERS, CHANNELS, CONVOLUTIONS = 8, 10, 8, 4
EPOCHS, BATCH, LEARNING_RATE, MOMENTUM = 15, 64, 0.02, 0.9
# The inputs on which rules that need data are computed.
DATA_SAMPLES = 256

BOUND = "bound of symmetric rules, one input"


@dataclass(frozen=True)
class Row:
    """One line of the CSV. The standard error is the binomial one; a share of 0 or 1 is counted as one net off."""

    date: str
    commit: str
    torch: str
    experiment: str
    setting: str
    method: str
    seed: int
    nets: int
    measure: str
    figure: float
    standard_error: float


Figures = Iterator[tuple[str, str, int, int, str, float, float]]


# ---- Rules ----------------------------------------------------------------------------------------------------------
# A rule gives the weight (units, fan-in) and the bias (units,) of one layer, in float64. Its input x (samples, fan-in)
# is used by the anchored rule only.


def pytorch_default(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """U(+-1 / sqrt(fan-in)) for both, as in nn.Linear."""
    group = (2 * torch.rand(units, x.shape[1] + 1, generator=generator, dtype=x.dtype) - 1) / math.sqrt(x.shape[1])
    return group[:, :-1], group[:, -1]


def xavier(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The uniform law of variance 2 / (fan-in + units), and bias 0."""
    bound = math.sqrt(6 / (x.shape[1] + units))
    weight = bound * (2 * torch.rand(units, x.shape[1], generator=generator, dtype=x.dtype) - 1)
    return weight, x.new_zeros(units)


def he(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """N(0, 2 / fan-in), and bias 0."""
    weight = torch.randn(units, x.shape[1], generator=generator, dtype=x.dtype) * math.sqrt(2 / x.shape[1])
    return weight, x.new_zeros(units)


def asymmetric(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights and bias from N(0, sigma^2 / fan-in), and one entry of each unit's group, at random, from Beta(2, 1).

    L. Lu, Y. Shin, Y. Su, G. E. Karniadakis, "Dying ReLU and Initialization", Commun. Comput. Phys. 28 (2020) 1671,
    arXiv 1903.06733: the randomised asymmetric initialisation (RAI).
    """
    group = (
        torch.randn(units, x.shape[1] + 1, generator=generator, dtype=x.dtype) * RAI_DEVIATION / math.sqrt(x.shape[1])
    )
    place = torch.randint(x.shape[1] + 1, (units, 1), generator=generator)
    # The distribution function of Beta(2, 1) is t^2.
    group.scatter_(1, place, torch.rand(units, 1, generator=generator, dtype=x.dtype).sqrt())
    return group[:, :-1], group[:, -1]


def lps_joint(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    return joint(units, x.shape[1], 1.0 if is_first else RELU_MOMENT, generator=generator)


def lps_heavy_tail(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    return heavy_tail(units, x.shape[1], 1.0 if is_first else RELU_MOMENT, generator=generator)


def lps_anchored(units: int, x: Tensor, is_first: bool, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    return anchored(units, x, generator=generator)


RELU_MOMENT = hermite_second_moment("relu", 4)
RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "PyTorch's default": pytorch_default,
    "Xavier": xavier,
    "He": he,
    "RAI": asymmetric,
    "LPS, joint": lps_joint,  # type: ignore[dict-item]
    "LPS, heavy tail": lps_heavy_tail,  # type: ignore[dict-item]
    "LPS, anchored": lps_anchored,  # type: ignore[dict-item]
}


# ---- Dying ReLU -----------------------------------------------------------------------------------------------------


def is_constant(rule: str, width: int, depth: int, generator: torch.Generator) -> bool:
    """Whether a hidden layer of one net, and so every later one, is constant on the grid.

    The differences to the first point of the grid are computed by themselves. In a net whose outputs vary by less than
    float64 could show beside their mean, as they do after 30 layers of PyTorch's default, no layer is constant.
    """
    base, differences = GRID[:1], GRID - GRID[:1]
    for layer in range(depth):
        weight, bias = RULES[rule](width, base + differences, layer == 0, generator)
        z, change = base @ weight.T + bias, differences @ weight.T
        on, stays_on = z > 0, z + change > 0
        differences = torch.where(on, torch.where(stays_on, change, -z), torch.where(stays_on, z + change, 0.0))
        base = z.relu()
        if differences.abs().max() <= CONSTANT * change.abs().max():
            return True
    return False


def bound(width: int, depth: int) -> float:
    return 1 - (1 - 2.0**-width) ** depth


def binomial_error(share: float, nets: int) -> float:
    """The standard error of a share. A share of 0 or 1 is taken as that of one net, or of all but one."""
    share = min(max(share, 1 / nets), 1 - 1 / nets)
    return math.sqrt(share * (1 - share) / nets)


def dying_figures(nets: int) -> Figures:
    for width in WIDTHS:
        for depth in DEPTHS:
            setting = f"width {width}, {depth} layers"
            yield setting, BOUND, 0, 0, "share of nets", bound(width, depth), 0.0
            for rule in RULES:
                generator = torch.Generator().manual_seed(1000 * width + depth)
                share = sum(is_constant(rule, width, depth, generator) for _ in range(nets)) / nets
                yield setting, rule, 0, nets, "share of nets", share, binomial_error(share, nets)


# ---- Digits ---------------------------------------------------------------------------------------------------------


def mlp(features: int, classes: int) -> nn.Sequential:
    sizes = [features, *[MLP_WIDTH] * MLP_LAYERS]
    hidden = [module for pair in itertools.pairwise(sizes) for module in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(MLP_WIDTH, classes))


def cnn(features: int, classes: int) -> nn.Sequential:
    side = math.isqrt(features)
    channels = [1, *[CHANNELS] * CONVOLUTIONS]
    hidden: list[nn.Module] = []
    for index, pair in enumerate(itertools.pairwise(channels)):
        hidden += [nn.Conv2d(*pair, 3, stride=2 if index == CONVOLUTIONS // 2 else 1, padding=1), nn.ReLU()]
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)), *hidden, nn.Flatten(), nn.Linear(CHANNELS * (side // 2) ** 2, classes)
    )


NETWORKS = {
    f"{MLP_LAYERS} layers of {MLP_WIDTH}": mlp,
    f"{CONVOLUTIONS} convolutions of {CHANNELS} channels": cnn,
}
DATA_FREE = {"LPS, joint": "joint", "LPS, heavy tail": "heavy_tail"}
ON_DATA = {"LPS, joint on data": "joint", "LPS, heavy tail on data": "heavy_tail", "LPS, anchored": "anchored"}
METHODS = (*(rule for rule in RULES if not rule.startswith("LPS")), *DATA_FREE, *ON_DATA)


@torch.no_grad()
def fill(model: nn.Module, method: str, x: Tensor, generator: torch.Generator) -> None:
    """Fill every layer. A filter of a convolution is a unit."""
    if method in DATA_FREE:
        init.lps_model_(model, rule=DATA_FREE[method], generator=generator)
    elif method in ON_DATA:
        init.lps_model_(model, x[:DATA_SAMPLES], rule=ON_DATA[method], generator=generator)
    else:
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None:
                rows = layer.weight.flatten(1)
                # These rules use the number of inputs, and none of their values.
                no_inputs = torch.empty(0, rows.shape[1], dtype=torch.float64)
                weight, bias = RULES[method](len(rows), no_inputs, False, generator)
                if method == "Xavier":
                    # A convolution's fan-out counts the positions of its kernel too.
                    weight = nn.init.xavier_uniform_(torch.empty_like(layer.weight), generator=generator)
                layer.weight.copy_(weight.view_as(layer.weight))
                layer.bias.copy_(bias)


def train(build: Callable[[int, int], nn.Module], method: str, seed: int, epochs: int) -> tuple[float, float]:
    """Test accuracy after the last epoch, and that epoch's mean training loss. The seed decides data and weights."""
    digits = data.load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(digits.features, digits.classes)
        x_train = digits.x_train
        fill(model, method, x_train, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(x_train)).split(BATCH):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x_train[batch]), digits.y_train[batch])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
    with torch.no_grad():
        right = model(digits.x_test).argmax(1) == digits.y_test
    return right.double().mean().item(), total / len(x_train)


def digits_figures(seeds: int, epochs: int) -> Figures:
    for name, build in NETWORKS.items():
        setting = f"{name}, {epochs} epochs"
        for method in METHODS:
            for seed in range(seeds):
                accuracy, loss = train(build, method, seed, epochs)
                yield setting, method, seed, 1, "test accuracy", accuracy, math.nan
                yield setting, method, seed, 1, "training loss", loss, math.nan


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
            seed=seed,
            nets=nets,
            measure=measure,
            figure=figure,
            standard_error=error,
        )
        for setting, method, seed, nets, measure, figure, error in figures
    ]


def table(rows: list[Row]) -> str:
    """For every setting, measure and method: the share and its error, or mean and standard deviation over the seeds."""
    of_kind: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        of_kind.setdefault((row.setting, row.measure, row.method), []).append(row)
    lines = [rows[0].experiment, f"{'setting':<42}{'measure':<16}{'method':<38}{'mean':>8}{'spread':>8}"]
    for (setting, measure, method), of_method in of_kind.items():
        figures = [row.figure for row in of_method]
        spread = statistics.stdev(figures) if len(figures) > 1 else of_method[0].standard_error
        lines.append(f"{setting:<42}{measure:<16}{method:<38}{statistics.mean(figures):8.3f}{spread:8.3f}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--experiment", choices=("dying", "digits"), help="default: both")
    parser.add_argument("--nets", type=_positive, default=NETS, help=f"nets of each rule and size ({NETS})")
    parser.add_argument("--seeds", type=_positive, default=5, help="trainings of each rule (5)")
    parser.add_argument("--epochs", type=_positive, default=EPOCHS, help=f"passes over the digits ({EPOCHS})")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every figure here")
    args = parser.parse_args(arguments)
    experiments = {
        "dying": lambda: dying_figures(args.nets),
        "digits": lambda: digits_figures(args.seeds, args.epochs),
    }
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
