"""Twelve faults, each put into a model from a given layer on; and the kind of finding that must name it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lcw_ops.bench.verdict.models import Chain, Subject

# The number of decades by which "vanishing" and "exploding" change a gradient between the faulty layer and the head.
DECADES = 6


def _weight(subject: Subject, index: int) -> torch.Tensor:
    layer = subject.model.get_submodule(subject.layers[index])
    return layer.weight if hasattr(layer, "weight") else layer.weight_ih_l0


def vanishing(subject: Subject, index: int) -> None:
    """The weights of all layers from this one on are too small."""
    for later in range(index, len(subject.layers)):
        _weight(subject, later).mul_(10 ** (-DECADES / (len(subject.layers) - index)))


def exploding(subject: Subject, index: int) -> None:
    """They are too large."""
    for later in range(index, len(subject.layers)):
        _weight(subject, later).mul_(10 ** (DECADES / (len(subject.layers) - index)))


def non_finite(subject: Subject, index: int) -> None:
    """One weight is NaN."""
    _weight(subject, index).view(-1)[0] = torch.nan


def dying(subject: Subject, index: int) -> None:
    """A bias far below zero, so that ReLUs never switch on."""
    subject.model.get_submodule(subject.layers[index]).bias.fill_(-30.0)


def saturation(subject: Subject, index: int) -> None:
    """Weights a hundred times too large, before an activation that saturates."""
    _weight(subject, index).mul_(100.0)


def activation_shift(subject: Subject, index: int) -> None:
    """A bias of 40 standard deviations, so that the next layer sees nearly the same input for every sample."""
    subject.model.get_submodule(subject.layers[index]).bias.fill_(40.0)


def ill_conditioned(subject: Subject, index: int) -> None:
    """The scales of a layer's units range over four decades."""
    weight = _weight(subject, index)
    scales = torch.logspace(-2, 2, len(weight), dtype=torch.float64).to(weight.dtype)
    weight.mul_(scales.view(-1, *[1] * (weight.dim() - 1)))


def _change_rate(subject: Subject, index: int, factor: float) -> None:
    later = [p for name in subject.layers[index:] for p in subject.model.get_submodule(name).parameters()]
    subject.rates.append((later, factor))


def rate_too_large(subject: Subject, index: int) -> None:
    """A hundred times the learning rate from this layer on."""
    _change_rate(subject, index, 100.0)


def rate_too_small(subject: Subject, index: int) -> None:
    """A thousandth of the learning rate from this layer on."""
    _change_rate(subject, index, 1e-3)


def frozen(subject: Subject, index: int) -> None:
    """The layers from this one on require no gradient."""
    for name in subject.layers[index:]:
        subject.model.get_submodule(name).requires_grad_(False)


def unused(subject: Subject, index: int) -> None:
    """The model does not call this layer."""
    assert isinstance(subject.model, Chain)
    subject.model.skipped = frozenset({subject.layers[index]})


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


# Activations of 1 become 4000, a sixteenth of the largest number of float16, and gradients of 1e-3 become 2.5e-7.
_SCALE = 4000.0


def underflow(subject: Subject, index: int) -> None:
    """float16 without loss scaling, and a layer between a large and a small factor, which change no gradient else."""
    name = subject.layers[index]
    layer = subject.model.get_submodule(name)
    subject.model.set_submodule(name, nn.Sequential(Scale(_SCALE), layer, Scale(1 / _SCALE)))
    subject.layers[index] = f"{name}.1"
    subject.model.half()
    subject.dtype = torch.float16


class Fault(NamedTuple):
    """``inject(subject, layer)``, the kind that names it, and the trait that a model needs; "" for none."""

    inject: Callable[[Subject, int], None]
    kind: str
    trait: str


FAULTS = {
    "vanishing": Fault(vanishing, "vanishing", "plain"),
    "exploding": Fault(exploding, "exploding", "homogeneous"),
    "non-finite": Fault(non_finite, "non-finite", ""),
    "dying units": Fault(dying, "dying", "relu"),
    "saturation": Fault(saturation, "saturation", "saturates"),
    "activation shift": Fault(activation_shift, "activation shift", "shifts"),
    "ill-conditioned": Fault(ill_conditioned, "ill-conditioned", "shifts"),
    "rate x 100": Fault(rate_too_large, "learning rate too large", ""),
    "rate / 1000": Fault(rate_too_small, "learning rate too small", ""),
    "frozen": Fault(frozen, "frozen", ""),
    "unused": Fault(unused, "unused", "skippable"),
    "float16 underflow": Fault(underflow, "underflow", "homogeneous"),
}


# The second layers of a branch, which no activation function reads.
_WITHOUT_ACTIVATION = (".second", ".conv2", ".linear2")


def places(subject: Subject, fault: str) -> list[int]:
    """Three layers: after about a quarter, a half and three quarters of the layers, neither the first nor the head.

    Faults of an activation are put into layers that have one.
    """
    last = len(subject.layers) - 1
    inside = range(1, last)
    if FAULTS[fault].trait in ("relu", "saturates", "shifts"):
        inside = [index for index in inside if not subject.layers[index].endswith(_WITHOUT_ACTIVATION)]
    return sorted({min(inside, key=lambda index: abs(index - share * last)) for share in (0.25, 0.5, 0.75)})
