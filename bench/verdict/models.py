"""Small models of many layouts on scikit-learn's digits, in two halves: one to fix thresholds, one to judge them.

Every model is built so that it trains: initial weights suit the activation, and normalised or residual layouts keep
torch's default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lcw_ops.jobs import data

BATCH = 64
# Images of 8 x 8 pixels, or 8 steps of 8 features.
SIDE, CLASSES = 8, 10


@dataclass
class Subject:
    """A model with its task.

    Attributes:
        layers: the paths of the layers with weights in the order of their calls, the last one being the head.
        traits: what can go wrong with it: "plain" (no skips, no normalisation), "relu", "homogeneous" (a positive
            factor passes through), "saturates", "shifts" (activations of which the mean may grow), "skippable".
        rate: a learning rate of SGD with momentum 0.9 at which it trains.
    """

    model: nn.Module
    layers: list[str]
    traits: frozenset[str]
    rate: float
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (SIDE * SIDE,)
    loss_scale: float = 1.0
    rates: list[tuple[list[nn.Parameter], float]] = field(default_factory=list)

    def optimizer(self, kind: str = "sgd") -> torch.optim.Optimizer:
        """SGD with momentum, or Adam; ``rates``: parameters whose rate is multiplied by a factor."""
        # A scaled loss has scaled gradients, to which Adam is indifferent.
        rate = self.rate / self.loss_scale if kind == "sgd" else 1e-3
        special = {id(parameter) for group, _ in self.rates for parameter in group}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in special]
        groups = [{"params": group, "lr": rate * factor} for group, factor in self.rates]
        groups += [{"params": others, "lr": rate}] if others else []
        return torch.optim.SGD(groups, rate, momentum=0.9) if kind == "sgd" else torch.optim.Adam(groups, rate)

    def inputs(self, x: Tensor) -> Tensor:
        return x.view(len(x), *self.shape).to(self.dtype)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss_scale * nn.functional.cross_entropy(output.float(), target)


class Chain(nn.Sequential):
    """A Sequential that leaves out the children in ``skipped``, which keep their parameters."""

    skipped: frozenset[str] = frozenset()

    def forward(self, x: Tensor) -> Tensor:
        for name, child in self.named_children():
            if name not in self.skipped:
                x = child(x)
        return x


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "leaky": nn.LeakyReLU, "elu": nn.ELU}
# sqrt(1 / E act(z)^2) for z ~ N(0, 1), which keeps the mean square of pre-activations; for tanh 5/3, as in torch.
GAINS = {"tanh": 5 / 3, "relu": math.sqrt(2), "gelu": 1.53, "leaky": math.sqrt(2), "elu": 1.24}


def fill(layer: nn.Module, gain: float) -> nn.Module:
    """Normal weights of deviation gain / sqrt(fan-in), and bias 0."""
    with torch.no_grad():
        layer.weight.normal_(0, gain / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def perceptron(activation: str, width: int, depth: int, traits: str, rate: float, dtype=torch.float32) -> Subject:
    children: list[nn.Module] = [fill(nn.Linear(SIDE * SIDE, width), 1.0), ACTIVATIONS[activation]()]
    for _ in range(depth - 1):
        children += [fill(nn.Linear(width, width), GAINS[activation]), ACTIVATIONS[activation]()]
    model = Chain(*children, fill(nn.Linear(width, CLASSES), 1.0))
    layers = [str(2 * index) for index in range(depth + 1)]
    return Subject(model.to(dtype), layers, frozenset(traits.split()), rate, dtype)


def convolutions(activation: str, channels: int, depth: int, traits: str, rate: float) -> Subject:
    children: list[nn.Module] = [fill(nn.Conv2d(1, channels, 3, padding=1), 1.0), ACTIVATIONS[activation]()]
    for _ in range(depth - 1):
        children += [fill(nn.Conv2d(channels, channels, 3, padding=1), GAINS[activation]), ACTIVATIONS[activation]()]
    head = [nn.AvgPool2d(2), nn.Flatten(), fill(nn.Linear(channels * SIDE * SIDE // 4, CLASSES), 1.0)]
    layers = [str(2 * index) for index in range(depth)] + [str(2 * depth + 2)]
    return Subject(Chain(*children, *head), layers, frozenset(traits.split()), rate, shape=(1, SIDE, SIDE))


class Block(nn.Module):
    """x + second(act(first(norm(x))))."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(self.norm(x))))


def residual(activation: str, width: int, blocks: int, rate: float, dtype=torch.float32) -> Subject:
    model = Chain(
        nn.Linear(SIDE * SIDE, width), *(Block(width, activation) for _ in range(blocks)), nn.Linear(width, CLASSES)
    )
    inside = [f"{block}.{part}" for block in range(1, blocks + 1) for part in ("first", "second")]
    return Subject(model.to(dtype), ["0", *inside, str(blocks + 1)], frozenset({activation} & {"relu"}), rate, dtype)


class ConvBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))


def resnet(channels: int, blocks: int, rate: float) -> Subject:
    stem, tail = nn.Conv2d(1, channels, 3, padding=1), nn.Linear(channels, CLASSES)
    model = Chain(stem, *(ConvBlock(channels) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), tail)
    inside = [f"{block}.{part}" for block in range(1, blocks + 1) for part in ("conv1", "conv2")]
    return Subject(model, ["0", *inside, str(blocks + 3)], frozenset(), rate, shape=(1, SIDE, SIDE))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.read = nn.Linear(SIDE, width)
        self.first, self.second = (kind(width, width, batch_first=True) for _ in range(2))
        self.mix, self.act, self.head = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.mix(self.second(self.first(self.read(x))[0])[0][:, -1])))


def recurrent(kind: type[nn.RNNBase], width: int, rate: float) -> Subject:
    layers = ["read", "first", "second", "mix", "head"]
    return Subject(Recurrent(kind, width), layers, frozenset(), rate, shape=(SIDE, SIDE))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, norm_first: bool, activation: str) -> None:
        super().__init__()
        self.read, self.position = nn.Linear(SIDE, width), nn.Parameter(0.5 * torch.randn(SIDE, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.read(x) + self.position).mean(1))


def transformer(width: int, depth: int, norm_first: bool, activation: str, rate: float) -> Subject:
    inside = [f"encoder.layers.{i}.{part}" for i in range(depth) for part in ("linear1", "linear2")]
    model = Transformer(width, depth, norm_first, activation)
    return Subject(model, ["read", *inside, "head"], frozenset(), rate, shape=(SIDE, SIDE))


# The traits of plain chains by activation.
_TANH = "plain saturates skippable"
_RELU = "plain relu homogeneous shifts skippable"
_SMOOTH = "plain shifts skippable"
_LEAKY = "plain homogeneous shifts skippable"

FAMILIES: dict[str, dict[str, Callable[[], Subject]]] = {
    "training": {
        "tanh MLP, 12 layers": lambda: perceptron("tanh", 32, 12, _TANH, 0.02),
        "ReLU MLP, 10 layers": lambda: perceptron("relu", 48, 10, _RELU, 0.02),
        "GELU MLP, 8 layers": lambda: perceptron("gelu", 40, 8, _SMOOTH, 0.02),
        "ReLU convolutions, 6 layers": lambda: convolutions("relu", 8, 6, _RELU, 0.02),
        "residual MLP, ReLU, 5 blocks": lambda: residual("relu", 32, 5, 0.02),
        "GRU, 2 layers": lambda: recurrent(nn.GRU, 24, 0.05),
        "transformer, post-norm, 2 layers": lambda: transformer(32, 2, False, "relu", 0.02),
        "tanh MLP, 8 layers, bfloat16": lambda: perceptron("tanh", 48, 8, _TANH, 0.02, torch.bfloat16),
    },
    "held out": {
        "tanh MLP, 10 layers": lambda: perceptron("tanh", 40, 10, _TANH, 0.02),
        "tanh MLP, 6 layers, bfloat16": lambda: perceptron("tanh", 64, 6, _TANH, 0.02, torch.bfloat16),
        "ReLU MLP, 8 layers": lambda: perceptron("relu", 64, 8, _RELU, 0.02),
        "GELU MLP, 11 layers": lambda: perceptron("gelu", 32, 11, _SMOOTH, 0.01),
        "ELU MLP, 6 layers": lambda: perceptron("elu", 48, 6, _SMOOTH, 0.02),
        "leaky ReLU convolutions, 7 layers": lambda: convolutions("leaky", 8, 7, _LEAKY, 0.01),
        "residual MLP, ReLU, 4 blocks, bfloat16": lambda: residual("relu", 48, 4, 0.02, torch.bfloat16),
        "ResNet with batch norm, 2 blocks": lambda: resnet(12, 2, 0.02),
        "LSTM, 2 layers, 32 units": lambda: recurrent(nn.LSTM, 32, 0.05),
        "transformer, pre-norm, ReLU, 2 layers": lambda: transformer(32, 2, True, "relu", 0.02),
    },
    # The first held-out half. Its run led to changes of rules, so it is a training half since then.
    "first held out": {
        "tanh MLP, 9 layers": lambda: perceptron("tanh", 48, 9, _TANH, 0.02),
        "ReLU MLP, 14 layers": lambda: perceptron("relu", 40, 14, _RELU, 0.01),
        "leaky ReLU MLP, 8 layers": lambda: perceptron("leaky", 32, 8, _LEAKY, 0.02),
        "ELU MLP, 10 layers": lambda: perceptron("elu", 32, 10, _SMOOTH, 0.01),
        "ReLU convolutions, 8 layers": lambda: convolutions("relu", 6, 8, _RELU, 0.01),
        "ResNet with batch norm, 3 blocks": lambda: resnet(8, 3, 0.02),
        "LSTM, 2 layers": lambda: recurrent(nn.LSTM, 24, 0.05),
        "transformer, pre-norm, GELU, 3 layers": lambda: transformer(32, 3, True, "gelu", 0.02),
        "residual MLP, GELU, 6 blocks, bfloat16": lambda: residual("gelu", 32, 6, 0.02, torch.bfloat16),
    },
}

# The seeds of weights and batches of each half.
SEEDS = {"training": range(0, 5), "first held out": range(100, 105), "held out": range(200, 205)}


def build(half: str, family: str, seed: int) -> Subject:
    """The model with the weights of this seed. The caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[half][family]()


def batches(seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the digits' training set, in an order of this seed."""
    digits = data.load_digits(0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(digits.x_train), generator=generator) for _ in range(1 + steps * BATCH // 1400)]
    )
    parts = order[: steps * BATCH].split(BATCH)
    return [(digits.x_train[part], digits.y_train[part]) for part in parts]
