"""Linear product structure (LPS) initialisation: weights and bias of a unit are one group with one scale.

The method starts from a polynomial system whose equations are products of random linear factors. At a root of that
system, the weights w_j and the bias b_j of unit j satisfy A_j [w_j; b_j] = r_j with random A_j. Q. Chen, W. Hao, J. He,
Applied Math. and Computation 415 (2022), arXiv 2109.00125. We do not know the paper's printed constants; all rules are
derived here.
"""

import copy
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcw_ops._checks import accumulation_dtype, check_positive, check_shape, describe

# The name of an activation, or any elementwise function of a tensor.
Activation = str | Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "elu": F.elu,
}

# The normal density beyond 12 is below 1e-31. 256 Gauss-Legendre nodes on each side integrate every activation here,
# and its products with Hermite polynomials, to float64 rounding. One rule across 0 would be inexact at ReLU's kink.
TAIL = 12.0
NODES_PER_SIDE = 256

# A function that the caller gives may have kinks and steps anywhere. 16 Gauss-Legendre nodes integrate it over panels
# of [-12, 12], and a panel is halved until both halves together agree with it. 60 halvings leave a step a panel of
# width 1e-18. More panels than the largest number at one time: the function is random, or oscillates too fast.
NODES_PER_PANEL = 16
FIRST_PANELS = 48
MOST_HALVINGS = 60
MOST_PANELS = 2**15

# Outside this range of s, the computed variance of f(s Z) would be wrong: for a smaller s, f(s Z) is constant up to
# rounding; for a larger s, f(s Z) has its step before the first node of the quadrature.
LEAST_STD, LARGEST_STD = 1e-4, 1e2

# The least |g0| by which the heavy-tailed rule divides (our choice). A unit's scale is at most 10 times a typical one.
LEAST_DENOMINATOR = 0.1


def check_activation(function: str, activation: Activation | None, *others: None) -> None:
    """Raise ValueError unless the activation is callable, one of the names, or one of ``others``."""
    if not callable(activation) and activation not in (*others, *ACTIVATIONS):
        names = ", ".join(map(repr, (*others, *ACTIVATIONS)))
        expected = f"one of {names}, or a function of a tensor"
        raise ValueError(describe(function, "activation", f"is {activation!r}", expected))


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function of a float64 tensor on the CPU. A module is copied, in eval mode; it is not changed."""
    if isinstance(activation, str):
        return ACTIVATIONS[activation]
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation).eval().to("cpu", torch.float64)
    return activation


def gaussian_expectation(function: Callable[[Tensor], Tensor]) -> float:
    """E function(Z), Z ~ N(0, 1), in float64. The function is elementwise, and smooth except for a kink at 0."""
    nodes, weights = _half_line_rule()
    return (weights * function(nodes)).sum().item()


def activation_variance(activation: Activation, std: float = 1.0) -> float:
    """Var f(std Z), Z ~ N(0, 1): the variance of a layer's output if its pre-activations have this standard deviation.

    Args:
        activation: a name, or an elementwise function f of a tensor, whose expectations are computed numerically, with
            a relative error of about 1e-13 wherever its kinks and steps are.
        std: from 1e-4 to 100.

    Raises:
        ValueError: an unknown activation, or a std outside [1e-4, 100]; a function that is random, that has values that
            are not finite, or that grows so fast that the variance does not exist.
        TypeError: a function that does not return a tensor.
    """
    check_activation("activation_variance", activation)
    check_positive("activation_variance", "std", std)
    if not LEAST_STD <= std <= LARGEST_STD:
        expected = f"between {LEAST_STD} and {LARGEST_STD}"
        raise ValueError(describe("activation_variance", "std", f"is {std}", expected))
    _, weights, values = _rule_for("activation_variance", activation, std)
    mean = (weights * values).sum()
    return (weights * (values - mean).square()).sum().item()


def hermite_coefficients(activation: Activation, degree: int) -> list[float]:
    """c_0 .. c_d of the Hermite approximation P_d = sum_{k<=d} c_k h_k of f, with orthonormal Hermite polynomials h_k.

    c_k = E f(Z) h_k(Z), Z ~ N(0, 1).

    Raises:
        TypeError: a degree that is not an integer.
        ValueError: a degree below 1; as `activation_variance` for the activation.

    Source: the paper replaces the activation by a polynomial; the Hermite approximation is our choice.
    """
    check_activation("hermite_coefficients", activation)
    if isinstance(degree, bool) or not isinstance(degree, int):
        came = f"is a {type(degree).__name__}"
        raise TypeError(describe("hermite_coefficients", "degree", came, "an int, or None for exact"))
    check_positive("hermite_coefficients", "degree", degree)
    nodes, weights, values = _rule_for("hermite_coefficients", activation)
    weighted_f = weights * values
    previous, current = torch.zeros_like(nodes), torch.ones_like(nodes)
    coefficients = []
    for k in range(degree + 1):
        coefficients.append((weighted_f * current).sum().item())
        previous, current = current, (nodes * current - math.sqrt(k) * previous) / math.sqrt(k + 1)
    return coefficients


def hermite_second_moment(activation: Activation, degree: int | None = None) -> float:
    """q(f) = E P_d(Z)^2 = sum_{k<=d} c_k^2 for the Hermite approximation P_d of f; degree None: the exact E f(Z)^2.

    Raises:
        TypeError, ValueError: as `hermite_coefficients`.
    """
    check_activation("hermite_second_moment", activation)
    if degree is None:
        _, weights, values = _rule_for("hermite_second_moment", activation)
        return (weights * values.square()).sum().item()
    second_moment = 0.0
    for coefficient in hermite_coefficients(activation, degree):
        second_moment += coefficient**2
    return second_moment


def hermite_variance(activation: Activation, degree: int | None = None) -> float:
    """Var P_d(Z) = sum_{1<=k<=d} c_k^2; degree None: the exact Var f(Z). What a zero-sum row sees of its inputs.

    Raises:
        TypeError, ValueError: as `hermite_coefficients`.
    """
    if degree is None:
        return activation_variance(activation)
    return math.fsum(c**2 for c in hermite_coefficients(activation, degree)[1:])


def hermite_roots(activation: Activation, degree: int) -> list[float]:
    """The real roots of the Hermite approximation P_d of f, ascending. The list can be empty.

    A root counts as real if its imaginary part is below 1e-8 of 1 + its size. Coefficients below 1e-12 of the largest
    one are rounding, and are taken as 0: the odd ones of a ReLU, for example.

    Raises:
        TypeError, ValueError: as `hermite_coefficients`; a degree of None too.
    """
    coefficients = np.array(hermite_coefficients(activation, degree))
    coefficients[abs(coefficients) < 1e-12 * abs(coefficients).max()] = 0
    # numpy's polynomials He_k = sqrt(k!) h_k are not normalised.
    factorials = [math.sqrt(math.factorial(k)) for k in range(len(coefficients))]
    roots = np.polynomial.hermite_e.hermeroots(np.trim_zeros(coefficients / factorials, "b"))
    return sorted(roots.real[abs(roots.imag) < 1e-8 * (1 + abs(roots))].tolist())


def joint(
    out_features: int,
    fan_in: int,
    second_moment: float = 1.0,
    bias: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    zero_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Weight (out_features, fan_in) and bias (out_features,) iid N(0, s^2), s^2 = 1 / (fan_in q + 1), in float64.

    A pre-activation z then has E z^2 = s^2 (fan_in q + 1) = 1. q is second_moment, E a^2 of one input a: 1 for
    standardised data, otherwise the previous activation's `hermite_second_moment`. Without bias the group has one
    member fewer: s^2 = 1 / (fan_in q).

    With zero_sum, the rows w of the weight sum to zero, as in LCW layers. Then the mean of a unit's inputs a has no
    effect, and the second moment of the inputs does not say how large z is. The group is the bias and the fan_in - 1
    coordinates v of w in an orthonormal basis of the zero-sum vectors, all iid N(0, s^2); or, which is the same law, w
    is an iid row minus its mean. For one input row a with the mean abar::

        E z^2 = s^2 (sum_i (a_i - abar)^2 + 1)

    For iid inputs of variance v, E sum_i (a_i - abar)^2 = (fan_in - 1) v, so s^2 = 1 / ((fan_in - 1) v + 1).

    Args:
        out_features, fan_in: the numbers of units and of inputs.
        second_moment: q; with zero_sum, the inputs' variance v.
        bias: whether the units have a bias.
        generator: a torch.Generator, or None for torch's default. Numbers are drawn on its device.
        device: where the tensors are returned.
        zero_sum: whether the rows sum to zero.

    Raises:
        ValueError: a second moment that is not finite and > 0.

    Source: derived here, both the one scale for [w; b] and s; the paper's printed constants are not known.
    """
    check_positive("joint", "second_moment", second_moment)
    group = _normal((out_features, fan_in + bias), generator, device)
    weight = _centred(group[:, :fan_in]) if zero_sum else group[:, :fan_in]
    # A zero-sum row of one input is 0, whatever its scale.
    scale = math.sqrt((fan_in - zero_sum) * second_moment + bias) or 1.0
    return weight / scale, group[:, fan_in] / scale if bias else None


def heavy_tail(
    out_features: int,
    fan_in: int,
    second_moment: float = 1.0,
    bias: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    zero_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[w; b] = scale g / max(|g0|, 0.1), one g0 for each unit and one scale for the layer, in float64.

    g and g0 are N(0, 1). For Gaussian coefficients A_j the root of A_j [w; b] = r is exactly multivariate Cauchy, which
    is the law of g / |g0|. Its variance is infinite. Therefore |g0| is clipped, and the scale makes the mean of
    q ||w||^2 + b^2 over the layer's units 1, as in `joint`.

    With zero_sum, the mean of every row w is subtracted before the scale is computed, and q is the inputs' variance:
    the direction of w is uniform among the zero-sum ones, so that E z^2 = q ||w||^2 + b^2 given the length of w.

    Args:
        out_features, fan_in, second_moment, bias, generator, device, zero_sum: as in `joint`.

    Raises:
        ValueError: a second moment that is not finite and > 0.

    Source: the law is derived here, the clip is our choice; the paper's printed constants are not known.
    """
    check_positive("heavy_tail", "second_moment", second_moment)
    group = _normal((out_features, fan_in + bias), generator, device)
    group /= _normal((out_features, 1), generator, device).abs().clamp(min=LEAST_DENOMINATOR)
    weight, offset = group[:, :fan_in], group[:, fan_in:]
    if zero_sum:
        weight = _centred(weight)
    scale = (second_moment * weight.square().sum(dim=1) + offset.square().sum(dim=1)).mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return weight / scale, (offset / scale).squeeze(1) if bias else None


def anchored(
    out_features: int,
    samples: Tensor,
    root: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
    zero_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """w ~ N(0, s^2 / fan_in), b = root - <w, h> with an anchor h, a random row of samples for each unit. In float64.

    So a unit's zero set (with another root, its set z = root) passes through the data. One scale s for all units gives
    the pre-activations z, over all units and samples, the standard deviation 1 around their root. If all samples are
    equal, s = 1. With root 0 a unit is off (z <= 0) on all S samples only if its anchor has the largest <w, h>. If the
    samples differ, this has the probability 1/S exactly. That keeps ReLUs alive.

    With zero_sum, the mean of every row w is subtracted first. So the anchors hold for the rows that sum to zero, and
    the probability is 1/S if the samples differ by more than a constant.

    Args:
        out_features: the number of units.
        samples: (S, fan_in), real inputs of the layer, or draws from their law.
        root: 0, or a root of the polynomial P_d that replaces the activation (see `hermite_roots`); or a tensor
            (out_features,) with one root for each unit.
        generator: a torch.Generator, or None for torch's default. Numbers are drawn on its device.
        zero_sum: whether the rows sum to zero.

    Returns:
        (weight (out_features, fan_in), bias (out_features,)).

    Raises:
        TypeError: samples of a dtype that is not floating.
        ValueError: samples that are not a matrix with at least one row, or not finite.

    Source: derived here; the paper's printed constants are not known.
    """
    accumulation_dtype("anchored", samples=samples)
    right = samples.dim() == 2 and samples.shape[0] > 0
    check_shape("anchored", "samples", samples, right, "(S, fan_in) with S >= 1", "One row is one input of a unit.")
    if not samples.is_meta and not samples.isfinite().all():
        came = "has entries that are NaN or infinite"
        raise ValueError(describe("anchored", "samples", came, "finite layer inputs"))
    count, fan_in = samples.shape
    weight = _normal((out_features, fan_in), generator, samples.device) / math.sqrt(fan_in)
    if zero_sum:
        weight = _centred(weight)
    response = samples.double() @ weight.T
    where = samples.device if generator is None else generator.device
    anchor = torch.randint(count, (1, out_features), generator=generator, device=where).to(samples.device)
    offset = -response.gather(0, anchor).squeeze(0)
    z = response + offset
    spread = (z - z.mean()).square().mean().sqrt()
    # Responses to equal samples differ by rounding, 1e-16 of their size; to distinct float32 samples, by 1e-8 of it.
    scale = torch.where(spread > 1e-10 * response.square().mean().sqrt(), 1 / spread, 1.0)
    return scale * weight, scale * offset + root


def _rule_for(function: str, activation: Activation, std: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z and weights of E g(Z), the normal density included, and the values g(z) = f(std z)."""
    f = activation_function(activation)
    if isinstance(activation, str):
        nodes, weights = _half_line_rule()
        return nodes, weights, f(std * nodes)
    with torch.no_grad():
        return _adapted_rule(function, lambda nodes: _checked_values(function, f, std * nodes))


@functools.cache
def _half_line_rule() -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(Z), the normal density included, over [-12, 0] and [0, 12]."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(NODES_PER_SIDE))
    positive = (nodes + 1) * (TAIL / 2)
    density = (-positive.square() / 2).exp() / math.sqrt(2 * math.pi)
    half = weights * (TAIL / 2) * density
    return torch.cat([-positive, positive]), torch.cat([half, half])


def _checked_values(function: str, f: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    # The function may work in place.
    values = f(points.clone())
    if not isinstance(values, Tensor):
        came = f"is a function that returns a {type(values).__name__}"
        raise TypeError(describe(function, "activation", came, "a function that returns a tensor", "Give an instance."))
    if values.shape != points.shape:
        came = f"is a function that makes shape {tuple(values.shape)} of {tuple(points.shape)}"
        raise ValueError(describe(function, "activation", came, "an elementwise function"))
    if not values.isfinite().all():
        came = "is a function with values that are NaN or infinite"
        raise ValueError(describe(function, "activation", came, f"finite values up to {points.abs().max().item():.4g}"))
    return values


def _adapted_rule(function: str, g: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As `_rule_for`, with panels halved until E g and E g^2 have converged in each of them."""
    points, point_weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(NODES_PER_PANEL))

    def integrate(left: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nodes = left[:, None] + width[:, None] * (points + 1) / 2
        weights = width[:, None] / 2 * point_weights * (-nodes.square() / 2).exp() / math.sqrt(2 * math.pi)
        values = g(nodes.flatten()).view_as(nodes)
        integrals = torch.stack([(weights * values).sum(1), (weights * values.square()).sum(1)])
        return nodes, weights, values, integrals.double()

    width = torch.full((FIRST_PANELS,), 2 * TAIL / FIRST_PANELS, dtype=torch.float64)
    left = -TAIL + width * torch.arange(FIRST_PANELS, dtype=torch.float64)
    _, weights, values, whole = integrate(left, width)
    sizes = torch.stack([(weights * values.abs()).sum(), (weights * values.square()).sum()]).double()
    if whole[1, [0, -1]].max() > 1e-12 * sizes[1]:
        came = "is a function that grows too fast for a mean square under the normal law"
        raise ValueError(describe(function, "activation", came, "slower growth"))
    tolerance = 4 * torch.finfo(values.dtype).eps * sizes
    parts = []
    for _ in range(MOST_HALVINGS):
        width = (width / 2).repeat_interleave(2)
        left = left.repeat_interleave(2)
        left[1::2] += width[1::2]
        nodes, weights, values, halves = integrate(left, width)
        pairs = halves.view(2, -1, 2).sum(2)
        pending = ((whole - pairs).abs() > tolerance[:, None]).any(0).repeat_interleave(2)
        parts.append((nodes[~pending], weights[~pending], values[~pending].double()))
        left, width, whole = left[pending], width[pending], halves[:, pending]
        if len(left) == 0:
            nodes, weights, values = (torch.cat(of_kind).flatten() for of_kind in zip(*parts, strict=True))
            return nodes, weights, values
        if len(left) > MOST_PANELS:
            break
    came = "is a function whose moments under the normal law do not converge"
    expected = "a function without randomness, in the precision of its result"
    raise ValueError(describe(function, "activation", came, expected))


def _normal(shape: tuple[int, int], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    where = device if generator is None else generator.device
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=where)
    return drawn if device is None else drawn.to(device)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=1, keepdim=True)
