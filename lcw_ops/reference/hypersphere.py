"""Hyperspherical weights (GmP): the direction u of a unit with m inputs, as a function of m-1 angles t.

u_k = cos t_k prod_{i<k} sin t_i (k < m),  u_m = prod_{i<m} sin t_i,  y = r act(<u, x> + lambda) with a unit's radius r
and location lambda. W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912; the division-free derivatives are lcw_ops' own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lcw_ops import _torch
from lcw_ops._checks import (
    accumulation_dtype,
    check_choice,
    check_features,
    check_per_unit,
    check_rows,
    check_shape,
)

# Weight normalization was in this file, and users' code imports it from here.
from lcw_ops.reference.weight_norm import (  # noqa: F401
    normalize_scale,
    normalize_scale_backward,
    normalize_scale_jvp,
    square_root,
)


def hypersphere_direction(angles: Tensor) -> Tensor:
    """Unit rows from angles:  u_k = P_k cos t_k,  u_m = P_m,  P_k = prod_{i<k} sin t_i.

    Any real angle is valid; nothing is wrapped or clamped. There are only products, no division, so the function is
    differentiable any number of times, and its derivatives are finite and exact at the poles (sin t_k = 0) too.

    Args:
        angles: (n, m-1) for n units of m inputs, any floating dtype; 16-bit angles are computed in float32.

    Returns:
        (n, m). With m = 1 there are no angles, so nothing can carry a sign: u = +1.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: a rank other than 2.

    Source: the paper's formula, and its authors' code; the product by doubling is ours.
    """
    dtype = accumulation_dtype("hypersphere_direction", angles=angles)
    check_rows("hypersphere_direction", "angles", angles, "(n, m-1)")
    t = _torch.cast(angles, dtype)
    return _torch.cast(F.pad(t.cos(), (0, 1), value=1.0) * _sine_products(t), angles.dtype)


def hypersphere_angles(weight: Tensor) -> Tensor:
    """The angles of the rows' directions. The sign of every component is kept.

    t_k = atan2(||w_{k+1:m}||, w_k) for k <= m-2,  t_{m-1} = atan2(w_m, w_{m-1}). This inverts `hypersphere_direction`
    up to the row's norm (m = 1: up to its sign too). A zero row has no direction: it gets angles 0, as u = (1, 0, ..)
    has. Where t_k has no derivative, because w_{k+1} .. w_m are 0, the derivative is taken as 0.

    Args:
        weight: (n, m), any floating dtype; 16-bit rows are computed in float32. Rows of any finite
            norm are safe, the smallest and the largest included.

    Returns:
        (n, m-1).

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: a rank other than 2, or m = 0.

    Source: derived here; the authors' code loses the sign of w_m.
    """
    dtype = accumulation_dtype("hypersphere_angles", weight=weight)
    check_rows("hypersphere_angles", "weight", weight, least_fan_in=1)
    x = _scaled_rows(_torch.cast(weight, dtype))
    tail_square = x.square().flip(1).cumsum(dim=1).flip(1)[:, 1:]
    opposite = torch.cat([square_root(tail_square[:, :-1]), x[:, 1:][:, -1:]], dim=1)
    adjacent = x[:, :-1]
    # atan2(0, 0) is 0, but its derivative is 0/0. Such elements become the constant atan2(0, 1), the same angle.
    undefined = (opposite == 0) & (adjacent == 0)
    angles = torch.atan2(opposite.masked_fill(undefined, 0.0), adjacent.masked_fill(undefined, 1.0))
    return _torch.cast(angles, weight.dtype)


def gmp_linear(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, activation: str | None = None) -> Tensor:
    """The layer y = r * act(x u^T + lambda),  u = hypersphere_direction(angles).

    For r > 0 this is the plain unit with w = r u, b = r lambda and the same number of parameters.

    Args:
        x: (..., m). All tensors have one floating dtype; 16-bit inputs are computed in float32 and rounded once.
        angles: (n, m-1).
        radius: r (n,), of any sign; it multiplies the activation's result.
        location: lambda (n,).
        activation: None or "relu".

    Returns:
        (..., n), of x's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: an unknown activation, or wrong shapes.

    Source: the paper for the unit, its authors' code for the form without activation; the equivalent plain unit is
    derived here.
    """
    dtype = accumulation_dtype("gmp_linear", x=x, angles=angles, radius=radius, location=location)
    check_choice("gmp_linear", "activation", activation, (None, "relu"))
    check_rows("gmp_linear", "angles", angles, "(n, m-1)")
    fan_in = angles.shape[1] + 1
    check_features("gmp_linear", x, fan_in, "one more than the columns of angles")
    check_per_unit("gmp_linear", "radius", radius, angles.shape[0])
    check_per_unit("gmp_linear", "location", location, angles.shape[0])
    pre_activation = F.linear(
        _torch.cast(x, dtype), hypersphere_direction(_torch.cast(angles, dtype)), _torch.cast(location, dtype)
    )
    activated = pre_activation.relu() if activation == "relu" else pre_activation
    return _torch.cast(_torch.cast(radius, dtype) * activated, x.dtype)


def hypersphere_direction_backward(grad_direction: Tensor, angles: Tensor) -> Tensor:
    """The gradient of the angles, without a division and so exact at the poles. It is itself differentiable.

    With g = dL/du, c_k = cos t_k, s_k = sin t_k and P_k as in `hypersphere_direction`:  T_m = g_m,
    T_k = c_k g_k + s_k T_{k+1},  dL/dt_k = P_k (c_k T_{k+1} - s_k g_k).  |s_k| <= 1, so no term grows.

    Args:
        grad_direction: g (n, m), of the angles' dtype.
        angles: (n, m-1).

    Returns:
        (n, m-1).

    Raises:
        TypeError, ValueError: as `hypersphere_direction`, and if grad_direction does not fit.

    Source: derived here; the textbook form with cot t_k is NaN at the poles.
    """
    name = "hypersphere_direction_backward"
    dtype = accumulation_dtype(name, grad_direction=grad_direction, angles=angles)
    check_rows(name, "angles", angles, "(n, m-1)")
    direction_shape = (angles.shape[0], angles.shape[1] + 1)
    check_shape(name, "grad_direction", grad_direction, grad_direction.shape == direction_shape, f"{direction_shape}")
    g, t = _torch.cast(grad_direction, dtype), _torch.cast(angles, dtype)
    sine, cosine = t.sin(), t.cos()
    suffix = _suffix_recurrence(F.pad(sine, (0, 1)), F.pad(cosine, (0, 1), value=1.0) * g)
    grad_angles = _sine_products(t)[:, :-1] * (cosine * suffix[:, 1:] - sine * g[:, :-1])
    return _torch.cast(grad_angles, angles.dtype)


def hypersphere_direction_jvp(tangent_angles: Tensor, angles: Tensor) -> Tensor:
    """The derivative of the direction along a tangent, without a division.

    With q_k, the derivative of P_k = prod_{i<k} sin t_i, c_k = cos t_k and s_k = sin t_k:  q_1 = 0,
    q_{k+1} = s_k q_k + c_k P_k dt_k,  du_k = c_k q_k - P_k s_k dt_k,  du_m = q_m.

    Args:
        tangent_angles: dt (n, m-1), of the angles' dtype.
        angles: (n, m-1).

    Returns:
        du (n, m).

    Raises:
        TypeError, ValueError: as `hypersphere_direction`, and if tangent_angles does not fit.

    Source: derived here.
    """
    name = "hypersphere_direction_jvp"
    dtype = accumulation_dtype(name, tangent_angles=tangent_angles, angles=angles)
    check_rows(name, "angles", angles, "(n, m-1)")
    angles_shape = tuple(angles.shape)
    check_shape(name, "tangent_angles", tangent_angles, tangent_angles.shape == angles_shape, f"angles' {angles_shape}")
    dt, t = _torch.cast(tangent_angles, dtype), _torch.cast(angles, dtype)
    sine, cosine = t.sin(), t.cos()
    moved = _sine_products(t)[:, :-1] * dt
    q = F.pad(_suffix_recurrence(sine.flip(1), (cosine * moved).flip(1)).flip(1), (1, 0))
    return _torch.cast(F.pad(cosine, (0, 1), value=1.0) * q - F.pad(sine * moved, (0, 1)), angles.dtype)


def _sine_products(angles: Tensor) -> Tensor:
    """P_1 .. P_m:  P_k = prod_{i<k} sin t_i.

    Computed by doubling: torch.cumprod's first derivative divides by the factors, which loses products that underflow,
    and its second derivative takes a step per column.
    """
    product = angles.sin()
    shift = 1
    while shift < product.shape[1]:
        product = product * F.pad(product[:, :-shift], (shift, 0), value=1.0)
        shift *= 2
    return F.pad(product, (1, 0), value=1.0)


def _suffix_recurrence(decay: Tensor, term: Tensor) -> Tensor:
    """T_k = term_k + decay_k T_{k+1}, with T = 0 beyond the end, by doubling.

    Neighbouring pairs (decay, term) are composed: (s, a) o (s', a') = (s s', a + s a').
    """
    shift = 1
    while shift < term.shape[1]:
        term = term + decay * F.pad(term[:, shift:], (0, shift))
        decay = decay * F.pad(decay[:, shift:], (0, shift))
        shift *= 2
    return term


def _scaled_rows(rows: Tensor) -> Tensor:
    """Each row divided by its largest magnitude, so that no square under- or overflows.

    The angles depend on directions alone, so the divisor may be held constant: all derivatives stay exact.
    """
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    return rows / largest.masked_fill(largest == 0, 1.0)
