"""Initialisers in the manner of torch.nn.init: they fill tensors in place, under no_grad, and return them.

lcw_ draws linearly constrained weights (Kutsuna 2019) from N(0, sv^2) with m sv^2 = s^2 / Var f(s Z). Here m is the
fan-in, f the previous layer's activation, s the standard deviation of pre-activations, and Z ~ N(0, 1). lps_ and
lps_model_ draw a unit's weights and bias as one group (linear product structure; Chen, Hao, He 2022). gmp_ gives a
GmP layer the angles of uniform weights (Chen, Ge 2024, from the authors' code). The scale of lcw_ and the rules of lps_
are derived here.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lcw_ops._checks import (
    accumulation_dtype,
    check_choice,
    check_per_unit,
    check_positive,
    check_rows,
    check_shape,
    describe,
)
from lcw_ops.reference import (
    activation_variance,
    anchored,
    heavy_tail,
    hermite_second_moment,
    hypersphere_angles,
    joint,
)
from lcw_ops.reference.lps import ACTIVATIONS

RULES = ("joint", "heavy_tail", "anchored")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The anchored rule uses at most this many inputs of a layer. Its scale is a mean over them and the units.
MOST_SAMPLES = 1024


@torch.no_grad()
def lcw_(
    weight: Tensor,
    activation: str | None = "sigmoid",
    std: float = 1.0,
    basis: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill an LCW parameter with N(0, sv^2), so that pre-activations keep their standard deviation s over the layers.

    m sv^2 = s^2 / Var f(s Z), with the previous layer's activation f and Z ~ N(0, 1). The bias of an LCW layer starts
    at 0.

    Args:
        weight: (n, m, *k), or (n, m-1) with basis; m is the fan-in of the constrained weight.
        activation: the previous layer's. None for the first layer, on standardised data: m sv^2 = s^2. For data of
            another variance V, divide the weight by sqrt(V).
        std: s, the standard deviation of this layer's and the previous layer's pre-activations.
        basis: whether the weight is the paper's parametrization.
        generator: a torch.Generator, or None for torch's default.

    Returns:
        The weight.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: an unknown activation, a std outside [1e-4, 100], or a rank below 2 (basis: other than 2).

    Source: derived here, not in the paper. For inputs a and a pre-activation z, E z^2 = m sv^2 Var(a) holds exactly in
    both parametrizations.
    """
    accumulation_dtype("lcw_", weight=weight)
    right, expected = (weight.dim() == 2, "(n, m-1)") if basis else (weight.dim() >= 2, "(n, m, *k)")
    check_shape("lcw_", "weight", weight, right, expected)
    check_choice("lcw_", "activation", activation, (None, *ACTIVATIONS))
    check_positive("lcw_", "std", std)
    input_variance = 1.0 if activation is None else activation_variance(activation, std)
    return weight.normal_(0, std / math.sqrt(input_variance * max(_fan_in(weight) + basis, 1)), generator=generator)


@torch.no_grad()
def lps_(
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = "relu",
    rule: str = "joint",
    degree: int | None = 4,
    samples: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fill weight and bias of a linear or convolution layer as one group.

    joint: iid N(0, s^2), s^2 = 1 / (m q + 1), where q = E a^2 over inputs a, so pre-activations z have E z^2 = 1.
    heavy_tail: the same group with a clipped Cauchy scale per unit.
    anchored: every unit's zero set (z = 0) passes through an input. On real inputs this is the only rule that keeps far
    more ReLUs alive than He's initialisation; on drawn inputs it keeps hardly more.

    Args:
        weight: (n, m, *k), n units of m inputs.
        bias: (n,), or None.
        activation: the previous layer's. None for the first layer, on standardised data.
        rule: "joint", "heavy_tail" or "anchored".
        degree: the degree of the polynomial that replaces the activation. None uses the activation itself.
        samples: (S, m), inputs of a unit (convolution: patches), for the anchored rule. None draws them as f(Z), with
            the previous layer's activation f and Z ~ N(0, 1).
        generator: a torch.Generator, or None for torch's default.

    Returns:
        (weight, bias).

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: an unknown rule or activation, a degree below 1, shapes other than those above, anchored without a
            bias, or samples with another rule.

    Source: the rules are derived in lcw_ops.reference.lps. We do not know the paper's printed constants.
    """
    accumulation_dtype("lps_", weight=weight, bias=bias)
    check_shape("lps_", "weight", weight, weight.dim() >= 2, "(n, m, *k)")
    units, fan_in = weight.shape[0], _fan_in(weight)
    if bias is not None:
        check_per_unit("lps_", "bias", bias, units)
    check_choice("lps_", "activation", activation, (None, *ACTIVATIONS))
    check_choice("lps_", "rule", rule, RULES)
    second_moment = 1.0 if activation is None else hermite_second_moment(activation, degree)
    new_bias: Tensor | None
    if rule == "anchored":
        if bias is None:
            remedy = "Use rule='joint' without a bias."
            raise ValueError(describe("lps_", "bias", "is None", "a tensor for rule 'anchored'", remedy))
        if samples is None:
            normal = torch.randn(MOST_SAMPLES, fan_in, generator=generator, device=weight.device)
            samples = normal if activation is None else ACTIVATIONS[activation](normal)
        check_shape("lps_", "samples", samples, samples.shape[1:] == (fan_in,), f"(S, {fan_in}), inputs of a unit")
        new_weight, new_bias = anchored(units, samples, generator=generator)
    else:
        if samples is not None:
            remedy = "Only rule='anchored' uses samples."
            raise ValueError(describe("lps_", "samples", f"is given with rule {rule!r}", "None", remedy))
        rule_function = joint if rule == "joint" else heavy_tail
        new_weight, new_bias = rule_function(units, fan_in, second_moment, bias is not None, generator, weight.device)
    weight.copy_(new_weight.reshape(weight.shape))
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)
    return weight, bias


@torch.no_grad()
def lps_model_(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    activation: str | None = "relu",
    rule: str = "joint",
    degree: int | None = 4,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """`lps_` on every nn.Linear and nn.Conv1d/2d/3d of an MLP or CNN, layer by layer.

    The first layer is assumed to see standardised data (q = 1 in `lps_`), every other layer the activation's output.

    Args:
        model: filled in place.
        inputs: the inputs of one forward pass, in eval mode so that no running statistics change. The pass gives the
            order of execution and the anchored rule's inputs: each layer is filled just before it runs, on the output
            of the filled layers before it (a convolution group by group). Without inputs, and for layers that the pass
            does not reach, the order is that of model.modules().
        activation, rule, degree, generator: as in `lps_`.

    Returns:
        The model.

    Raises:
        ValueError: an unknown rule or activation, a model without such layers, a layer whose weight or bias is computed
            from other parameters (parametrized, pruned), or anchored with a layer that has no bias. An error of the
            forward pass is passed on. After an error the model is unchanged.

    Source: derived here, not in the paper.
    """
    check_choice("lps_model_", "activation", activation, (None, *ACTIVATIONS))
    check_choice("lps_model_", "rule", rule, RULES)
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, *CONVOLUTIONS))}
    if not layers:
        came = "has no nn.Linear or nn.ConvNd layer"
        raise ValueError(describe("lps_model_", "model", came, "at least one", "Use lps_ on tensors."))
    computed = [name for layer, name in layers.items() if _is_computed(layer)]
    if computed:
        came = f"has layers whose weight or bias is computed from other parameters ({', '.join(computed)})"
        remedy = "Fill the model first, then parametrize or prune it."
        raise ValueError(describe("lps_model_", "model", came, "layers that hold their parameters", remedy))
    without_bias = [name for layer, name in layers.items() if layer.bias is None]
    if rule == "anchored" and without_bias:
        came = f"has layers without bias ({', '.join(without_bias)})"
        expected = "a bias in every layer for rule 'anchored'"
        raise ValueError(describe("lps_model_", "model", came, expected, "Use rule='joint', or give them a bias."))
    pending = dict(layers)

    def fill(layer: Any, x: Tensor | None = None) -> None:
        if pending.pop(layer, None) is None:
            return
        previous = None if len(pending) == len(layers) - 1 else activation
        if rule == "anchored" and x is not None:
            groups = getattr(layer, "groups", 1)
            samples = _layer_samples(layer, x, generator)
            for part in zip(layer.weight.chunk(groups), layer.bias.chunk(groups), samples, strict=True):
                lps_(*part[:2], previous, rule, degree, part[2], generator)
        else:
            lps_(layer.weight, layer.bias, previous, rule, degree, generator=generator)

    def fill_on_data(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        fill(layer, args[0])

    before = [(parameter, parameter.clone()) for layer in layers for parameter in layer.parameters(recurse=False)]
    training = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(fill_on_data) for layer in layers]
    try:
        if inputs is not None:
            model.eval()
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        for layer in layers:
            fill(layer)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
    return model


@torch.no_grad()
def gmp_(
    angles: Tensor,
    radius: Tensor,
    location: Tensor,
    out_features: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill angles, radius and location of a GmP layer.

    A matrix W is drawn from U(+-sqrt(6 / (m + out_features))). Its rows give the angles, and their lengths the radius;
    location = 0. With fan-in m = 1 there are no angles and every direction is +1. (If the angles were drawn
    independently, the last component of a direction would shrink like 2^-(m-1).)

    Args:
        angles: (n, m-1).
        radius, location: (n,).
        out_features: None for n, the number of units.
        generator: a torch.Generator, or None for torch's default.

    Returns:
        (angles, radius, location).

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes other than those above, or out_features below 1.

    Source: the authors' code, but with the sign of W's last column kept.
    """
    dtype = accumulation_dtype("gmp_", angles=angles, radius=radius, location=location)
    check_rows("gmp_", "angles", angles, "(n, m-1)")
    units, fan_in = angles.shape[0], angles.shape[1] + 1
    check_per_unit("gmp_", "radius", radius, units)
    check_per_unit("gmp_", "location", location, units)
    if out_features is None:
        out_features = units
    elif out_features < 1:
        expected = "at least 1, or None for the number of units"
        raise ValueError(describe("gmp_", "out_features", f"is {out_features}", expected))
    bound = math.sqrt(6 / (fan_in + out_features))
    weight = torch.empty(units, fan_in, dtype=dtype, device=angles.device).uniform_(-bound, bound, generator=generator)
    return angles.copy_(hypersphere_angles(weight)), radius.copy_(weight.norm(dim=1)), location.zero_()


def _fan_in(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def _is_computed(layer: nn.Module) -> bool:
    """Whether torch computes weight or bias again at every use, as parametrizations, pruning and the older norms do."""
    own = dict(layer.named_parameters(recurse=False))
    return parametrize.is_parametrized(layer) or any(
        f"{name}_{part}" in own for name in ("weight", "bias") for part in ("orig", "g") if name not in own
    )


def _layer_samples(layer: Any, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """At most MOST_SAMPLES random inputs of a unit of the layer, as rows (S, fan_in); one matrix per group."""
    check_shape("lps_model_", "inputs", x, x.numel() > 0, "at least one sample in every layer")
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, layer.in_features)
        return (rows[torch.randperm(len(rows), generator=generator, device=x.device)[:MOST_SAMPLES]],)
    spatial = len(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(x.reshape(-1, *x.shape[-spatial - 1 :]), layer._reversed_padding_repeated_twice, mode)
    for dim, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    positions = (windows.shape[0], *windows.shape[2 : 2 + spatial])
    chosen = [torch.randint(count, (MOST_SAMPLES,), generator=generator, device=x.device) for count in positions]
    patches = windows.movedim(1, spatial + 1)[tuple(chosen)]
    return tuple(group.flatten(1) for group in patches.chunk(layer.groups, dim=1))
