"""Everything else: experts, shared and lazy modules, parametrizations, checkpointing, complex numbers, odd outputs."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lcw_ops import nn as constrained
from lcw_ops.nn.utils.parametrizations import hypersphere, zero_sum
from zoo.entry import Entry, registry

MODELS, model = registry()
SLOW_MODELS, slow_model = registry()


def mlp(*widths: int) -> nn.Sequential:
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@slow_model
def plain_3000_layers() -> Entry:
    return Entry(mlp(*[16] * 3001), torch.randn(8, 16), rows=("0", "5998"))


class Experts(nn.Module):
    """A router sends each sample to one of four experts; with few samples an expert may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4), nn.ModuleList(mlp(6, 8, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (choice == number).nonzero()[:, 0]
            if len(chosen):
                result = result.index_add(0, chosen, weight[chosen, None] * expert(x[chosen]))
        return result


@model
def mixture_of_experts() -> Entry:
    return Entry(Experts(), torch.randn(3, 6), rows=("router", "experts.3.0", "Experts"))


@model
def all_parametrizations() -> Entry:
    def layer() -> nn.Linear:
        return nn.Linear(6, 6)

    layers = [getattr(parametrizations, name)(layer()) for name in ("weight_norm", "spectral_norm", "orthogonal")]
    layers.append(parametrizations.orthogonal(layer(), orthogonal_map="householder"))
    uncounted = ("aten.linalg_householder_product",)
    model = nn.Sequential(*layers, zero_sum(layer()), hypersphere(layer()))
    return Entry(model, torch.randn(4, 6), uncounted=uncounted, rows=("0", "1", "2", "3", "4", "5"))


@model
def old_weight_norm() -> Entry:
    return Entry(nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU()), torch.randn(4, 6), rows=("0",))


@model
def all_constrained_linear_layers() -> Entry:
    kinds = (constrained.LCWLinear, constrained.GmPLinear, constrained.WeightNormLinear)
    layers = [*(kind(6, 6) for kind in kinds), constrained.LCWLinear(6, 6, basis=True), constrained.InputMeanNorm(6)]
    return Entry(nn.Sequential(*layers), torch.randn(4, 6), rows=("0", "1", "2", "3", "4"))


def convolutions(dims: int) -> Entry:
    kinds = (getattr(constrained, f"{method}Conv{dims}d") for method in ("LCW", "GmP", "WeightNorm"))
    model = nn.Sequential(*(kind(4, 4, 3, padding=1) for kind in kinds))
    return Entry(model, torch.randn(2, 4, *[5] * dims), rows=("0", "1", "2"))


@model
def all_constrained_convolutions_1d() -> Entry:
    return convolutions(1)


@model
def all_constrained_convolutions_2d() -> Entry:
    return convolutions(2)


@model
def all_constrained_convolutions_3d() -> Entry:
    return convolutions(3)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.block, self.last = nn.Linear(6, 6), mlp(6, 6, 6), nn.Linear(6, 2)
        self.deep = constrained.OrthogonalFilterMLP(6, 8, 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)
        return self.last(checkpoint(self.deep, x, use_reentrant=self.use_reentrant))


@model
def checkpointed() -> Entry:
    return Entry(Checkpointed(False), torch.randn(4, 6), rows=("block.0", "deep.layer[5]"))


@model
def checkpointed_reentrant() -> Entry:
    absent = {"input -> output": "use_reentrant=True"}
    return Entry(Checkpointed(True), torch.randn(4, 6), absent=absent, rows=("block.0", "deep.layer[5]"))


class Spectral(nn.Module):
    """Multiplies by a complex matrix in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(5, 4, 4, dtype=torch.complex64)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.einsum("bfi,fio->bfo", torch.fft.rfft(x, dim=1), self.weight)
        return self.out(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))


@model
def complex_parameters() -> Entry:
    uncounted = ("aten._fft_r2c", "aten._fft_c2r")
    return Entry(Spectral(), torch.randn(3, 8, 4), uncounted=uncounted, rows=("out", "Spectral"))


class ReturnsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return nn.functional.cross_entropy(logits, labels), logits


@model
def loss_and_logits() -> Entry:
    return Entry(ReturnsLoss(), (torch.randn(4, 6), torch.tensor([0, 1, 2, 0])), rows=("net.2",))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, batch: dict[str, Tensor]) -> Output:
        hidden = self.first(input=batch["x"]).tanh()
        return Output(self.last(hidden), hidden)


@model
def dataclass_output() -> Entry:
    return Entry(ReturnsDataclass(), {"x": torch.randn(4, 6)}, rows=("first", "last"))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp(6, 8, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.tower(left) - self.tower(right)).square().sum(-1)


@model
def siamese() -> Entry:
    return Entry(Siamese(), (torch.randn(4, 6), torch.randn(4, 6)), rows=("tower.0", "tower.0#2", "Siamese"))


@model
def frozen_backbone() -> Entry:
    return Entry(
        nn.Sequential(mlp(6, 8, 8).requires_grad_(False), nn.Linear(8, 2)), torch.randn(4, 6), rows=("0.0", "1")
    )


@model
def lazy() -> Entry:
    return Entry(nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d()), torch.randn(3, 2, 8), rows=("0", "1"))


@model
def sixteen_bits() -> Entry:
    return Entry(mlp(6, 8, 3).bfloat16(), torch.randn(4, 6).bfloat16(), rows=("0", "2"))


class OtherInput(nn.Module):
    """The output does not depend on the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Linear(6, 3), nn.Linear(5, 100)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.unused(x)
        return self.used(y)


@model
def independent_of_the_first_input() -> Entry:
    absent = {"input -> output": "does not depend on the input"}
    return Entry(OtherInput(), (torch.randn(4, 6), torch.randn(4, 5)), absent=absent, rows=("unused", "used"))


class GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(()))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            messages = layer(nodes)
            nodes = messages.index_add(0, edges[1], self.scale * messages[edges[0]]).relu()
        return nodes


@model
def graph_convolution() -> Entry:
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return Entry(GraphConvolution(), (torch.randn(4, 6),), {"edges": edges}, rows=("second", "GraphConvolution"))
