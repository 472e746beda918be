"""``convert`` and ``fold`` at the edges of what they reach: what else holds a layer, and what else a layer holds."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import lcw_ops
from lcw_ops import nn as ours
from lcw_ops.conversion import building
from lcw_ops.nn._refusals import base_of_ours, refusal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm. is deprecated:FutureWarning")


def reasons(report: lcw_ops.conversion.Report) -> dict[str, str]:
    return {left.name: left.reason for left in report.left}


# ---- Classes ---------------------------------------------------------------------------------------------------------


class Annotated(nn.Linear):
    weight: Tensor
    bias: Tensor | None


class DoubledWeight(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return 2 * self._parameters["weight"]


class WithoutBias(nn.Linear):
    bias = None


def test_an_annotation_of_the_weight_is_harmless_and_a_class_attribute_is_not():
    assert refusal(Annotated(4, 4)) is None
    model = nn.Sequential(Annotated(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    # Their constructors would not get past torch's own check.
    model[1].__class__, model[2].__class__ = DoubledWeight, WithoutBias
    report = lcw_ops.convert(model, "weight_norm")
    assert [changed.name for changed in report.changed] == ["0"]
    assert "members that a replacement lacks: weight" in reasons(report)["1"]
    assert "members that a replacement lacks: bias" in reasons(report)["2"]


class Longer(ours.LCWLinear):
    def length(self) -> Tensor:
        return self.weight.norm()


def with_buffer(layer: nn.Module) -> nn.Module:
    layer.register_buffer("mask", torch.ones(3))
    return layer


def with_parameter(layer: nn.Module) -> nn.Module:
    layer.extra = nn.Parameter(torch.ones(3))
    return layer


def with_child(layer: nn.Module) -> nn.Module:
    layer.adapter = nn.Linear(3, 3)
    return layer


def tanh_of(layer: nn.Module, name: str) -> nn.Module:
    return parametrize.register_parametrization(layer, name, nn.Tanh(), unsafe=True)


def lcw_with_both() -> nn.Module:
    layer = ours.LCWLinear(3, 3)
    layer.register_parameter("weight_v", nn.Parameter(torch.ones(3, 2)))
    return layer


def recurrence() -> nn.Module:
    return ours.OrthogonalFilterMLP(3, 4, 2, 3, "identity")


OF_OURS = {
    "a buffer": (lambda: with_buffer(ours.LCWLinear(3, 3)), "more than its class's tensors: mask"),
    "a parameter": (lambda: with_parameter(ours.GmPLinear(3, 3)), "more than its class's tensors: extra"),
    "a child": (lambda: with_child(ours.WeightNormLinear(3, 3)), "more than its class's tensors: adapter"),
    "the other form's tensor": (lcw_with_both, "more than its class's tensors: weight_v"),
    "weight norm, hook": (
        lambda: nn.utils.weight_norm(ours.LCWLinear(3, 3), "weight_u"),
        "a hook of WeightNorm computes its tensor weight_u",
    ),
    "spectral norm, hook": (
        lambda: spectral_norm(ours.LCWLinear(3, 3), "weight_u"),
        "a hook of SpectralNorm computes its tensor weight_u",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(ours.LCWLinear(3, 3), "weight_u"),
        "parametrizations compute its tensors weight_u",
    ),
    "a parametrized bias": (lambda: tanh_of(ours.WeightNormLinear(3, 3), "bias"), "compute its tensors bias (Tanh)"),
    "pruned": (lambda: prune.l1_unstructured(ours.GmPLinear(3, 3), "angles", amount=1), "it is pruned"),
    "pruned bias": (lambda: prune.l1_unstructured(ours.LCWLinear(3, 3), "bias", amount=1), "it is pruned"),
    "a method": (lambda: Longer(3, 3), "members that a replacement lacks: length"),
    "a recurrence with a buffer": (lambda: with_buffer(recurrence()), "more than its class's tensors: mask"),
    "a pruned recurrence": (lambda: prune.l1_unstructured(recurrence(), "bias", amount=1), "it is pruned"),
}


@pytest.mark.parametrize("name", OF_OURS)
def test_our_layers_that_hold_or_do_more_are_left(name):
    make, reason = OF_OURS[name]
    layer = make()
    model, x = nn.Sequential(layer, nn.Linear(3, 3)), torch.randn(5, 3)
    report = lcw_ops.fold(model, inplace=True)
    assert reason in reasons(report)["0"]
    assert not [changed for changed in report.changed if changed.name == "0"]
    assert model[0] is layer
    assert torch.isfinite(model(x)).all()
    if isinstance(layer, building.OURS):
        target = ours.WeightNormLinear if isinstance(layer, ours.LCWLinear) else ours.LCWLinear
        report = lcw_ops.convert(model, {base_of_ours(layer): target})
        assert reason in reasons(report)["0"]
        assert model[0] is layer


@pytest.mark.parametrize("kind", building.OURS)
def test_our_layers_as_they_are_made_are_not_refused(kind):
    sizes = (2, 2) if kind._plain is nn.Linear else (2, 2, 1)
    assert refusal(kind(*sizes)) is None
    assert refusal(kind(*sizes, bias=False)) is None
    if "LCW" in kind.__name__:
        assert refusal(kind(*sizes, basis=True)) is None
    # Of one input: empty tensors and signs are buffers.
    one = (1, 2) if kind._plain is nn.Linear else (1, 2, 1)
    assert refusal(kind(*one)) is None
    assert type(lcw_ops.fold(kind(*one)).model) is kind._plain
