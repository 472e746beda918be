"""Linearly constrained weights (LCW): rows w that sum to zero, so inputs of equal means cause no activation shift.

The form "centred" is w = u - mean(u), "basis" is w = B v, where u and v are unconstrained parameters and the columns of
B are an orthonormal basis of the vectors that sum to zero. T. Kutsuna, "Linearly Constrained Weights", ECML PKDD 2019,
arXiv 2403.13833; the centred form and the choice of B are lcw_ops' own.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lcw_ops import _torch
from lcw_ops._checks import accumulation_dtype, check_features, check_per_unit, check_rows, check_shape, describe


def lcw_weight(weight: Tensor, basis: bool = False) -> Tensor:
    """Rows that sum to zero, from an unconstrained parameter.

    centred (basis=False): weight (n, m, *k) -> (n, m, *k),  w = u - mean(u) over all dimensions but the first.
    basis: weight (n, m-1) -> (n, m),  w = B v with the Householder basis B of `lcw_basis`, which is not formed: with
    s = sqrt(m), S = sum(v):  w_j = v_j - S / (s (s+1)) for j < m,  w_m = -S / s.
    With fan-in 1 only w = 0 sums to zero: centred (n, 1) and basis (n, 0) both give zeros (n, 1).

    Args:
        weight: any floating dtype; the sums of 16-bit rows are taken in float32.
        basis: whether to use the paper's parametrization.

    Returns:
        (n, m, *k), or (n, m) with basis.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: a rank below 2; with basis, a rank other than 2.

    Source: the constraint set and the basis form are the paper's; the centred form, the choice of basis and "a
    convolution's unit is a filter" are ours.
    """
    dtype = accumulation_dtype("lcw_weight", weight=weight)
    if basis:
        check_rows("lcw_weight", "weight", weight, "(n, m-1)")
        v = _torch.cast(weight, dtype)
        row_sum = v.sum(dim=1, keepdim=True)
        s = math.sqrt(v.shape[1] + 1)
        return _torch.cast(torch.cat([v - row_sum / (s * (s + 1)), -row_sum / s], dim=1), weight.dtype)
    check_shape("lcw_weight", "weight", weight, weight.dim() >= 2, "(n, m, *k)", "A unit is one row: add dim 0.")
    u = _torch.cast(weight, dtype)
    return _torch.cast(u - u.mean(dim=tuple(range(1, u.dim())), keepdim=True), weight.dtype)


def lcw_coordinates(weight: Tensor) -> Tensor:
    """Rows v with lcw_weight(v, basis=True) equal to the rows w of ``weight``, if these sum to zero.

    v = B^T w for the Householder basis B: with s = sqrt(m) and S the sum of the first m - 1 entries of w,
    v_j = w_j - (S / (s + 1) + w_m) / s. For other rows w, the result belongs to w - mean(w), the nearest zero-sum row.

    Args:
        weight: (n, m), m >= 1, any floating dtype; 16-bit rows are computed in float32.

    Returns:
        (n, m-1), of the weight's dtype.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: a rank other than 2, or m = 0.

    Source: derived here.
    """
    dtype = accumulation_dtype("lcw_coordinates", weight=weight)
    check_rows("lcw_coordinates", "weight", weight, least_fan_in=1)
    w = _torch.cast(weight, dtype)
    s = math.sqrt(w.shape[1])
    first, last = w[:, :-1], w[:, -1:]
    return _torch.cast(first - (first.sum(dim=1, keepdim=True) / (s + 1) + last) / s, weight.dtype)


def lcw_basis(m: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The dense basis B (m, m-1) of the vectors that sum to zero: lcw_weight(v, basis=True) == v @ B.T.

    It is for tests and reading. With the vector 1 of ones, B^T B = I, 1^T B = 0, B B^T = I - 1 1^T / m.

    Raises:
        ValueError: m < 1.

    Source: the paper asks for any orthonormal basis; Householder's is our choice.
    """
    if m < 1:
        raise ValueError(describe("lcw_basis", "m", f"is {m}", "a fan-in of at least 1"))
    s = math.sqrt(m)
    matrix = torch.eye(m, m - 1, dtype=dtype, device=device)
    matrix[:-1] -= 1 / (s * (s + 1))
    matrix[-1] = -1 / s
    return matrix


def lcw_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, basis: bool = False) -> Tensor:
    """The layer y = x w^T + b,  w = lcw_weight(weight, basis). For every x proportional to the ones vector, y = b.

    Args:
        x: (..., m). All tensors have one floating dtype; 16-bit inputs are computed in float32 and rounded once.
        weight: (n, m), or (n, m-1) with basis.
        bias: (n,), or None.
        basis: as in `lcw_weight`.

    Returns:
        (..., n), of x's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes other than those above.

    Source: the paper; y = b is its proposition.
    """
    dtype = accumulation_dtype("lcw_linear", x=x, weight=weight, bias=bias)
    constrained = lcw_weight(_torch.cast(weight, dtype), basis)
    _check_linear_shapes("lcw_linear", x, constrained, bias)
    return _torch.cast(
        F.linear(_torch.cast(x, dtype), constrained, None if bias is None else _torch.cast(bias, dtype)), x.dtype
    )


def activation_shift(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The activation shift of every unit: its mean pre-activation, and the angle between weight and mean activation.

    With mu the mean sample:  shift = <w, mu> + b = ||w|| ||mu|| cos(angle) + b, angle in [0, pi].

    Args:
        x: (..., m), the samples; at least one.
        weight: (n, m), the weight that the layer applies (for an LCW layer: lcw_weight(...)).
        bias: (n,), or None.

    Returns:
        (shift (n,), angle (n,)), of x's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes other than those above, or no samples.

    Source: the paper defines the shift by that angle. An angle to a zero vector is pi/2 here, which means "no shift".
    """
    dtype = accumulation_dtype("activation_shift", x=x, weight=weight, bias=bias)
    check_rows("activation_shift", "weight", weight)
    _check_linear_shapes("activation_shift", x, weight, bias)
    check_shape("activation_shift", "x", x, x.numel() > 0, "at least one sample and feature")
    mean_activation = _torch.cast(x, dtype).reshape(-1, x.shape[-1]).mean(dim=0)
    shift = F.linear(mean_activation, _torch.cast(weight, dtype), None if bias is None else _torch.cast(bias, dtype))
    # The angle does not depend on the lengths. With the largest entry at 1, no square overflows and no sum vanishes.
    w, mu = _with_largest_1(_torch.cast(weight, dtype)), _with_largest_1(mean_activation)
    w_length, mu_length = w.norm(dim=1, keepdim=True), mu.norm()
    # 2 atan2(|w - mu|, |w + mu|) of unit vectors keeps the digits that arccos(<w, mu>) loses near 0 and pi. Scaled by
    # both lengths, the formula needs no division.
    angle = 2 * torch.atan2((w * mu_length - mu * w_length).norm(dim=1), (w * mu_length + mu * w_length).norm(dim=1))
    no_direction = (w_length * mu_length).squeeze(1) == 0
    return _torch.cast(shift, x.dtype), _torch.cast(angle.masked_fill(no_direction, math.pi / 2), x.dtype)


def _with_largest_1(vectors: Tensor) -> Tensor:
    """Each vector divided by its largest magnitude, a constant in derivatives. A zero vector stays zero."""
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    return vectors / torch.where(largest == 0, torch.ones_like(largest), largest)


def _check_linear_shapes(function: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    units, fan_in = weight.shape
    check_features(function, x, fan_in, "the weight's fan-in")
    if bias is not None:
        check_per_unit(function, "bias", bias, units)
