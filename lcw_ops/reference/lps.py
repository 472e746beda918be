"""Linear product structure (LPS) initialisation: weights and bias of a unit are one group with one scale.

The method starts from a polynomial system whose equations are products of random linear factors. At a root of that
system, the weights w_j and the bias b_j of unit j satisfy A_j [w_j; b_j] = r_j with random A_j. Q. Chen, W. Hao, J. He,
Applied Math. and Computation 415 (2022), arXiv 2109.00125. We do not know the paper's printed constants; all rules are
derived here.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lcw_ops._checks import accumulation_dtype, check_choice, check_positive, check_shape, describe

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

# Outside this range of s, the computed variance of f(s Z) would be wrong: for a smaller s, f(s Z) is constant up to
# rounding; for a larger s, f(s Z) has its step before the first node of the quadrature.
LEAST_STD, LARGEST_STD = 1e-4, 1e2

# The least |g0| by which the heavy-tailed rule divides (our choice). A unit's scale is at most 10 times a typical one.
LEAST_DENOMINATOR = 0.1


def gaussian_expectation(function: Callable[[Tensor], Tensor]) -> float:
    """E function(Z), Z ~ N(0, 1), in float64. The function is elementwise, and smooth except for a kink at 0."""
    nodes, weights = _half_line_rule()
    return (weights * function(nodes)).sum().item()


def activation_variance(activation: str, std: float = 1.0) -> float:
    """Var f(std Z), Z ~ N(0, 1): the variance of a layer's output if its pre-activations have this standard deviation.

    Raises:
        ValueError: an unknown activation, or a std outside [1e-4, 100].
    """
    check_choice("activation_variance", "activation", activation, ACTIVATIONS)
    check_positive("activation_variance", "std", std)
    if not LEAST_STD <= std <= LARGEST_STD:
        expected = f"between {LEAST_STD} and {LARGEST_STD}"
        raise ValueError(describe("activation_variance", "std", f"is {std}", expected))
    f = ACTIVATIONS[activation]
    mean = gaussian_expectation(lambda z: f(std * z))
    return gaussian_expectation(lambda z: (f(std * z) - mean).square())


def hermite_second_moment(activation: str, degree: int | None = None) -> float:
    """q(f) = E P_d(Z)^2 for the degree-d Hermite approximation P_d of f; degree None: the exact E f(Z)^2.

    With orthonormal Hermite polynomials h_k and Z ~ N(0, 1):  c_k = E f(Z) h_k(Z),  P_d = sum_{k<=d} c_k h_k,
    q = sum_{k<=d} c_k^2.

    Raises:
        TypeError: a degree that is not an integer.
        ValueError: an unknown activation, or a degree below 1.

    Source: the paper replaces the activation by a polynomial; the Hermite approximation is our choice.
    """
    check_choice("hermite_second_moment", "activation", activation, ACTIVATIONS)
    f = ACTIVATIONS[activation]
    if degree is None:
        return gaussian_expectation(lambda z: f(z).square())
    if not isinstance(degree, int):
        came = f"is a {type(degree).__name__}"
        raise TypeError(describe("hermite_second_moment", "degree", came, "an int, or None for exact"))
    check_positive("hermite_second_moment", "degree", degree)
    nodes, weights = _half_line_rule()
    weighted_f = weights * f(nodes)
    previous, current = torch.zeros_like(nodes), torch.ones_like(nodes)
    second_moment = 0.0
    for k in range(degree + 1):
        second_moment += (weighted_f * current).sum().item() ** 2
        previous, current = current, (nodes * current - math.sqrt(k) * previous) / math.sqrt(k + 1)
    return second_moment


def joint(
    out_features: int,
    fan_in: int,
    second_moment: float = 1.0,
    bias: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Weight (out_features, fan_in) and bias (out_features,) iid N(0, s^2), s^2 = 1 / (fan_in q + 1), in float64.

    A pre-activation z then has E z^2 = s^2 (fan_in q + 1) = 1. q is second_moment, E a^2 of one input a: 1 for
    standardised data, otherwise the previous activation's `hermite_second_moment`. Without bias the group has one
    member fewer: s^2 = 1 / (fan_in q).

    Raises:
        ValueError: a second moment that is not finite and > 0.

    Source: derived here, both the one scale for [w; b] and s; the paper's printed constants are not known.
    """
    check_positive("joint", "second_moment", second_moment)
    group = _normal((out_features, fan_in + bias), generator, device)
    group /= math.sqrt(fan_in * second_moment + bias)
    return group[:, :fan_in], group[:, fan_in] if bias else None


def heavy_tail(
    out_features: int,
    fan_in: int,
    second_moment: float = 1.0,
    bias: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """[w; b] = scale g / max(|g0|, 0.1), one g0 for each unit and one scale for the layer, in float64.

    g and g0 are N(0, 1). For Gaussian coefficients A_j the root of A_j [w; b] = r is exactly multivariate Cauchy, which
    is the law of g / |g0|. Its variance is infinite. Therefore |g0| is clipped, and the scale makes the mean of
    q ||w||^2 + b^2 over the layer's units 1, as in `joint`.

    Raises:
        ValueError: a second moment that is not finite and > 0.

    Source: the law is derived here, the clip is our choice; the paper's printed constants are not known.
    """
    check_positive("heavy_tail", "second_moment", second_moment)
    group = _normal((out_features, fan_in + bias), generator, device)
    group /= _normal((out_features, 1), generator, device).abs().clamp(min=LEAST_DENOMINATOR)
    weight, offset = group[:, :fan_in], group[:, fan_in:]
    group /= (second_moment * weight.square().sum(dim=1) + offset.square().sum(dim=1)).mean().sqrt()
    return weight, offset.squeeze(1) if bias else None


def anchored(
    out_features: int, samples: Tensor, root: float = 0.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """w ~ N(0, 1/fan_in), b = root - <w, h> with an anchor h, a random row of samples for each unit. In float64.

    So a unit's zero set passes through the data. Then weights and biases of all units are scaled by one number, so that
    the pre-activations z of all units and samples have the standard deviation 1. If all samples are equal, the scale
    stays as drawn. With root 0 a unit is off (z <= 0) on all S samples only if its anchor has the largest <w, h>. If
    the samples differ, this has the probability 1/S exactly. That keeps ReLUs alive.

    Args:
        out_features: the number of units.
        samples: (S, fan_in), real inputs of the layer, or draws from their law.
        root: 0, or a root of the polynomial P_d that replaces the activation (see `hermite_second_moment`).
        generator: a torch.Generator, or None for torch's default.

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
    if not samples.isfinite().all():
        came = "has entries that are NaN or infinite"
        raise ValueError(describe("anchored", "samples", came, "finite layer inputs"))
    count, fan_in = samples.shape
    weight = _normal((out_features, fan_in), generator, samples.device) / math.sqrt(fan_in)
    response = samples.double() @ weight.T
    anchor = torch.randint(count, (1, out_features), generator=generator, device=samples.device)
    bias = root - response.gather(0, anchor).squeeze(0)
    z = response + bias
    spread = (z - z.mean()).square().mean().sqrt()
    # Responses to equal samples differ by rounding, 1e-16 of their size; to distinct float32 samples, by 1e-8 of it.
    scale = torch.where(spread > 1e-10 * response.square().mean().sqrt(), 1 / spread, 1.0)
    return scale * weight, scale * bias


@functools.cache
def _half_line_rule() -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(Z), the normal density included, over [-12, 0] and [0, 12]."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(NODES_PER_SIDE))
    positive = (nodes + 1) * (TAIL / 2)
    density = (-positive.square() / 2).exp() / math.sqrt(2 * math.pi)
    half = weights * (TAIL / 2) * density
    return torch.cat([-positive, positive]), torch.cat([half, half])


def _normal(shape: tuple[int, int], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
