"""The initialiser of weight and bias as one group, by the linear product structure."""

import math

import torch
from torch import Tensor

from lcw_ops._checks import accumulation_dtype, check_choice, check_per_unit, check_shape, describe
from lcw_ops.init._fill import check_fillable, fan_in
from lcw_ops.reference import anchored, heavy_tail, hermite_roots, hermite_second_moment, joint
from lcw_ops.reference.lps import ACTIVATIONS, Activation, activation_function, check_activation

RULES = ("joint", "heavy_tail", "anchored")

# The anchored rule uses at most this many inputs of a layer. Its scale is a mean over them and the units.
MOST_SAMPLES = 1024


@torch.no_grad()
def lps_(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None = "relu",
    rule: str = "joint",
    degree: int | None = 4,
    samples: Tensor | None = None,
    generator: torch.Generator | None = None,
    root: float | str = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Fill weight and bias of a linear or convolution layer as one group.

    joint: iid N(0, s^2), s^2 = 1 / (m q + 1), where q = E a^2 over inputs a, so pre-activations z have E z^2 = 1.
    heavy_tail: the same group with a clipped Cauchy scale per unit.
    anchored: every unit's zero set (z = 0) passes through an input. On real inputs this is the only rule that keeps far
    more ReLUs alive than He's initialisation; on drawn inputs it keeps hardly more.

    Args:
        weight: (n, m, *k), n units of m inputs.
        bias: (n,), or None.
        activation: the previous layer's: a name, or any elementwise function of a tensor, whose moments are computed
            numerically. None for the first layer, on standardised data.
        rule: "joint", "heavy_tail" or "anchored".
        degree: the degree of the polynomial that replaces the activation. None uses the activation itself.
        samples: (S, m), inputs of a unit (convolution: patches), for the anchored rule. None draws them as f(Z), with
            the previous layer's activation f and Z ~ N(0, 1).
        generator: a torch.Generator, or None for torch's default. Numbers are drawn on its device.
        root: for the anchored rule, the value of z at the anchor, instead of 0. "polynomial" draws, for each unit, one
            of the real roots of the polynomial P_d that replaces the activation of this layer, which is taken to be
            ``activation`` too.

    Returns:
        (weight, bias).

    Raises:
        TypeError: dtypes that are not floating or differ; an activation that does not return a tensor.
        ValueError: an unknown rule or activation, a degree below 1, shapes other than those above, a weight or bias
            that is computed from other tensors, as ``layer.weight`` of a constrained layer is; anchored without a bias;
            samples or a root with another rule; root="polynomial" where P_d has no real root, or without an activation
            or a degree.

    Source: the rules are derived in lcw_ops.reference.lps. We do not know the paper's printed constants.
    """
    accumulation_dtype("lps_", weight=weight, bias=bias)
    check_shape("lps_", "weight", weight, weight.dim() >= 2, "(n, m, *k)")
    units, inputs = weight.shape[0], fan_in(weight)
    if bias is not None:
        check_per_unit("lps_", "bias", bias, units)
    check_fillable("lps_", weight=weight, bias=bias)
    check_activation("lps_", activation, None)
    check_choice("lps_", "rule", rule, RULES)
    roots = roots_to_draw("lps_", root, rule, activation, degree)
    second_moment = 1.0 if activation is None else hermite_second_moment(activation, degree)
    if rule == "anchored":
        if bias is None:
            remedy = "Use rule='joint' without a bias."
            raise ValueError(describe("lps_", "bias", "is None", "a tensor for rule 'anchored'", remedy))
        if samples is None:
            samples = assumed_samples(activation, inputs, generator, weight.device)
        check_shape("lps_", "samples", samples, samples.shape[1:] == (inputs,), f"(S, {inputs}), inputs of a unit")
    elif samples is not None:
        remedy = "Only rule='anchored' uses samples."
        raise ValueError(describe("lps_", "samples", f"is given with rule {rule!r}", "None", remedy))
    rows, offset = draw_units(units, inputs, rule, second_moment, bias is not None, samples, generator, weight.device)
    weight.copy_(rows.reshape(weight.shape))
    if bias is not None and offset is not None:
        bias.copy_(offset + draw_roots(roots, units, generator, weight.device))
    return weight, bias


def draw_units(
    units: int,
    inputs: int,
    rule: str,
    second_moment: float,
    has_bias: bool,
    samples: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device,
    zero_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Weight (units, inputs) and bias (units,) in float64. The anchored rule needs samples, and its root is 0."""
    if samples is not None:
        return anchored(units, samples, 0.0, generator, zero_sum)
    draw = joint if rule == "joint" else heavy_tail
    return draw(units, inputs, second_moment, has_bias, generator, device, zero_sum)


def draw_roots(
    roots: list[float], units: int, generator: torch.Generator | None, device: torch.device
) -> float | Tensor:
    """One of the roots for each unit, (units,) in float64; if there is only one, the root itself."""
    if len(roots) == 1:
        return roots[0]
    where = device if generator is None else generator.device
    chosen = torch.randint(len(roots), (units,), generator=generator, device=where)
    return torch.tensor(roots, dtype=torch.float64, device=where)[chosen].to(device)


def roots_to_draw(
    function: str, root: float | str, rule: str, activation: Activation | None, degree: int | None
) -> list[float]:
    """The values of which the anchored rule gives one to each unit."""
    if isinstance(root, str):
        if root != "polynomial":
            raise ValueError(describe(function, "root", f"is {root!r}", "a number or 'polynomial'"))
    elif isinstance(root, bool) or not isinstance(root, (int, float)):
        raise TypeError(describe(function, "root", f"is a {type(root).__name__}", "a Python number or 'polynomial'"))
    elif not math.isfinite(root):
        raise ValueError(describe(function, "root", f"is {root}", "a finite number"))
    if root != 0 and rule != "anchored":
        remedy = "Only rule='anchored' has roots."
        raise ValueError(describe(function, "root", f"is {root!r} with rule {rule!r}", "0", remedy))
    if root != "polynomial":
        return [float(root)]
    if activation is None or degree is None:
        missing = "activation" if activation is None else "degree"
        remedy = "Give both, or a number as root."
        raise ValueError(describe(function, missing, "is None", "a value for root='polynomial'", remedy))
    roots = hermite_roots(activation, degree)
    if not roots:
        came = f"is 'polynomial', and the polynomial of degree {degree} has no real root"
        raise ValueError(describe(function, "root", came, "another degree, or a number"))
    return roots


def assumed_samples(
    activation: Activation | None, inputs: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """(MOST_SAMPLES, inputs): draws of f(Z), with the previous layer's activation f and Z ~ N(0, 1)."""
    where = device if generator is None else generator.device
    normal = torch.randn(MOST_SAMPLES, inputs, generator=generator, device=where)
    if activation is None:
        return normal.to(device)
    if isinstance(activation, str):
        return ACTIVATIONS[activation](normal).to(device)
    return activation_function(activation)(normal.double().cpu()).detach().to(device)
