"""Weights on the hypersphere: a unit's direction by angles (GmP) or by a normalised vector (weight normalization).

u_k = cos t_k prod_{i<k} sin t_i (k < m),  u_m = prod_{i<m} sin t_i,  y = r act(u.x + lambda). W. Chen, H. Ge,
NeurIPS 2024, arXiv 2305.15912, and T. Salimans, D. P. Kingma, 2016; the division-free derivatives are lcw_ops' own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lcw_ops._checks import accumulation_dtype, check_choice, check_shape


def hypersphere_direction(angles: Tensor) -> Tensor:
    """angles (n, m-1) -> unit rows (n, m):  u_k = P_k cos t_k,  u_m = P_m,  P_k = prod_{i<k} sin t_i.

    Any real angle is valid; nothing is wrapped or clamped. Products only, no division: differentiable any number of
    times, with finite and right derivatives also at the poles (sin t_k = 0). With m = 1 there are no angles, so
    nothing can carry a sign: u = +1.

    Any floating dtype; 16-bit angles are computed in float32. The formula is the paper's and its authors' code's; the
    product by doubling is ours. Raises TypeError for a dtype that is not floating, ValueError for a rank other than 2.
    """
    dtype = accumulation_dtype("hypersphere_direction", angles=angles)
    _check_angles("hypersphere_direction", angles)
    t = angles.to(dtype)
    return (F.pad(t.cos(), (0, 1), value=1.0) * _sine_products(t)).to(angles.dtype)


def hypersphere_angles(weight: Tensor) -> Tensor:
    """weight (n, m) -> angles (n, m-1) of its rows' directions; the sign of every component is kept.

    t_k = atan2(||w_{k+1:m}||, w_k) for k <= m-2,  t_{m-1} = atan2(w_m, w_{m-1}). Inverse of `hypersphere_direction`
    up to the row's length (m = 1: up to its sign too). A zero row has no direction: it gets angles 0, u = (1, 0, ..).
    Where an angle has no derivative (nothing but zeros from k+1 on), 0 is used for it.

    Any floating dtype; 16-bit rows are computed in float32; lengths from the smallest to the largest float are safe.
    Derived here: the authors' code loses the sign of w_m. Raises TypeError for a dtype that is not floating, ValueError
    for a rank other than 2 or m = 0.
    """
    dtype = accumulation_dtype("hypersphere_angles", weight=weight)
    _check_rows("hypersphere_angles", weight)
    x = _scaled_rows(weight.to(dtype))
    tail_square = x.square().flip(1).cumsum(dim=1).flip(1)[:, 1:]
    opposite = torch.cat([_square_root(tail_square[:, :-1]), x[:, 1:][:, -1:]], dim=1)
    adjacent = x[:, :-1]
    # atan2(0, 0) is 0, but its derivative is 0/0: such elements become the constant atan2(0, 1), the same angle.
    undefined = (opposite == 0) & (adjacent == 0)
    angles = torch.atan2(opposite.masked_fill(undefined, 0.0), adjacent.masked_fill(undefined, 1.0))
    return angles.to(weight.dtype)


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """weight (n, m), scale (n,) -> scale * weight / ||weight|| by rows: weight normalization's "direction, then scale".

    A zero row has no direction: it stays zero, with zero derivatives, instead of NaN (our choice).
    Any floating dtype; 16-bit rows are computed in float32; lengths from the smallest to the largest float are safe.
    Raises TypeError for dtypes that are not floating or differ, ValueError for shapes that do not fit.
    """
    dtype = accumulation_dtype("normalize_scale", weight=weight, scale=scale)
    _check_rows("normalize_scale", weight)
    _check_per_unit("normalize_scale", "scale", scale, weight)
    direction, _ = _unit_rows(weight.to(dtype))
    return (scale.to(dtype)[:, None] * direction).to(weight.dtype)


def normalize_scale_backward(grad_output: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """grad_output (n, m), weight (n, m), scale s (n,) -> the gradients of weight (n, m) and of scale (n,).

    With v = weight / ||weight||, G = grad_output:  ds = <G, v>,  dweight = s (G - ds v) / ||weight||; zero for a zero
    row. Differentiable itself. Dtypes and errors as `normalize_scale`; grad_output must have the weight's.
    """
    name = "normalize_scale_backward"
    dtype = accumulation_dtype(name, grad_output=grad_output, weight=weight, scale=scale)
    _check_rows(name, weight)
    weight_shape = tuple(weight.shape)
    check_shape(name, "grad_output", grad_output, grad_output.shape == weight_shape, f"weight's {weight_shape}")
    _check_per_unit(name, "scale", scale, weight)
    g = grad_output.to(dtype)
    direction, length = _unit_rows(weight.to(dtype))
    grad_scale = (g * direction).sum(dim=1, keepdim=True)
    grad_weight = scale.to(dtype)[:, None] * ((g - grad_scale * direction) / length)
    return grad_weight.to(weight.dtype), grad_scale.squeeze(1).to(scale.dtype)


def normalize_scale_jvp(tangent_weight: Tensor, tangent_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The derivative of `normalize_scale` (n, m) in the direction of the tangents (n, m) and (n,).

    With v = weight / ||weight||:  dscale v + scale (dweight - <dweight, v> v) / ||weight||; zero for a zero row.
    Dtypes and errors as `normalize_scale`; tangents must have the dtypes and shapes of what they belong to.
    """
    name = "normalize_scale_jvp"
    given = {"tangent_weight": tangent_weight, "tangent_scale": tangent_scale, "weight": weight, "scale": scale}
    dtype = accumulation_dtype(name, **given)
    _check_rows(name, weight)
    _check_per_unit(name, "scale", scale, weight)
    weight_shape = tuple(weight.shape)
    right = tangent_weight.shape == weight_shape
    check_shape(name, "tangent_weight", tangent_weight, right, f"weight's {weight_shape}")
    _check_per_unit(name, "tangent_scale", tangent_scale, weight)
    dw = tangent_weight.to(dtype)
    direction, length = _unit_rows(weight.to(dtype))
    turned = (dw - (dw * direction).sum(dim=1, keepdim=True) * direction) / length
    return (tangent_scale.to(dtype)[:, None] * direction + scale.to(dtype)[:, None] * turned).to(weight.dtype)


def gmp_linear(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, activation: str | None = None) -> Tensor:
    """x (..., m) -> (..., n):  y = r * act(x u^T + lambda),  u = hypersphere_direction(angles).

    angles (n, m-1), radius r (n,) of any sign, applied after the activation, location lambda (n,); activation None or
    "relu". For r > 0 this is the plain unit with w = r u, b = r lambda, same number of parameters (derived here).
    All of one floating dtype, which is the result's; 16-bit inputs are computed in float32 and rounded once. The unit
    is the paper's, the form without activation its authors' code's.
    Raises TypeError for dtypes that are not floating or differ, ValueError for an unknown activation or wrong shapes.
    """
    dtype = accumulation_dtype("gmp_linear", x=x, angles=angles, radius=radius, location=location)
    check_choice("gmp_linear", "activation", activation, (None, "relu"))
    _check_angles("gmp_linear", angles)
    fan_in = angles.shape[1] + 1
    check_shape("gmp_linear", "x", x, x.dim() >= 1 and x.shape[-1] == fan_in, f"(..., {fan_in}), one more than angles'")
    _check_per_unit("gmp_linear", "radius", radius, angles)
    _check_per_unit("gmp_linear", "location", location, angles)
    pre_activation = F.linear(x.to(dtype), hypersphere_direction(angles.to(dtype)), location.to(dtype))
    activated = pre_activation.relu() if activation == "relu" else pre_activation
    return (radius.to(dtype) * activated).to(x.dtype)


def hypersphere_direction_backward(grad_direction: Tensor, angles: Tensor) -> Tensor:
    """grad_direction (n, m), angles (n, m-1) -> dL/dangles (n, m-1), without a division: exact at the poles.

    With g = dL/du:  T_m = g_m,  T_k = c_k g_k + s_k T_{k+1},  dL/dt_k = P_k (c_k T_{k+1} - s_k g_k).  |s_k| <= 1, so
    nothing grows. Differentiable itself. Derived here; the textbook form with cot t_k is NaN at the poles.
    Dtypes and errors as `hypersphere_direction`; grad_direction must have the angles' dtype and one more column.
    """
    name = "hypersphere_direction_backward"
    dtype = accumulation_dtype(name, grad_direction=grad_direction, angles=angles)
    _check_angles(name, angles)
    direction_shape = (angles.shape[0], angles.shape[1] + 1)
    check_shape(name, "grad_direction", grad_direction, grad_direction.shape == direction_shape, f"{direction_shape}")
    g, t = grad_direction.to(dtype), angles.to(dtype)
    sine, cosine = t.sin(), t.cos()
    suffix = _suffix_recurrence(F.pad(sine, (0, 1)), F.pad(cosine, (0, 1), value=1.0) * g)
    grad_angles = _sine_products(t)[:, :-1] * (cosine * suffix[:, 1:] - sine * g[:, :-1])
    return grad_angles.to(angles.dtype)


def hypersphere_direction_jvp(tangent_angles: Tensor, angles: Tensor) -> Tensor:
    """tangent_angles (n, m-1), angles (n, m-1) -> du (n, m), the directional derivative, without a division.

    q_1 = 0,  q_{k+1} = s_k q_k + c_k P_k dt_k,  du_k = c_k q_k - P_k s_k dt_k,  du_m = q_m.  Derived here.
    Dtypes and errors as `hypersphere_direction`; tangent_angles must have the angles' dtype and shape.
    """
    name = "hypersphere_direction_jvp"
    dtype = accumulation_dtype(name, tangent_angles=tangent_angles, angles=angles)
    _check_angles(name, angles)
    angles_shape = tuple(angles.shape)
    check_shape(name, "tangent_angles", tangent_angles, tangent_angles.shape == angles_shape, f"angles' {angles_shape}")
    dt, t = tangent_angles.to(dtype), angles.to(dtype)
    sine, cosine = t.sin(), t.cos()
    moved = _sine_products(t)[:, :-1] * dt
    q = F.pad(_suffix_recurrence(sine.flip(1), (cosine * moved).flip(1)).flip(1), (1, 0))
    return (F.pad(cosine, (0, 1), value=1.0) * q - F.pad(sine * moved, (0, 1))).to(angles.dtype)


def _sine_products(angles: Tensor) -> Tensor:
    """P_1 .. P_m:  P_k = prod_{i<k} sin t_i.

    By doubling, for torch.cumprod's first derivative divides by the factors (an underflow is lost) and its second one
    takes a step per column.
    """
    product = angles.sin()
    shift = 1
    while shift < product.shape[1]:
        product = product * F.pad(product[:, :-shift], (shift, 0), value=1.0)
        shift *= 2
    return F.pad(product, (1, 0), value=1.0)


def _suffix_recurrence(decay: Tensor, term: Tensor) -> Tensor:
    """T_k = term_k + decay_k T_{k+1}, T beyond the end 0, by doubling: (s, a) o (s', a') = (s s', a + s a')."""
    shift = 1
    while shift < term.shape[1]:
        term = term + decay * F.pad(term[:, shift:], (0, shift))
        decay = decay * F.pad(decay[:, shift:], (0, shift))
        shift *= 2
    return term


def _scaled_rows(rows: Tensor) -> Tensor:
    """Rows over their largest entry, so that no square under- or overflows.

    What follows depends on directions alone, so the divisor may be held constant: all derivatives stay right.
    """
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    return rows / largest.masked_fill(largest == 0, 1.0)


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (n, m) -> unit rows (n, m), and their lengths (n, 1). Of a zero row: zeros, and infinity, over which all of
    its derivatives are zero.
    """
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1.0)
    x = rows / largest
    length = _square_root(x.square().sum(dim=1, keepdim=True))
    length = length.masked_fill(length == 0, torch.inf)
    return x / length, largest * length


def _square_root(square: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0 instead of infinity."""
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _check_angles(function: str, angles: Tensor) -> None:
    check_shape(function, "angles", angles, angles.dim() == 2, "(n, m-1)", "Flatten a filter to one row first.")


def _check_rows(function: str, weight: Tensor) -> None:
    right = weight.dim() == 2 and weight.shape[1] > 0
    check_shape(function, "weight", weight, right, "(n, m) with m >= 1", "Flatten a filter to one row first.")


def _check_per_unit(function: str, argument: str, value: Tensor, rows: Tensor) -> None:
    check_shape(function, argument, value, value.shape == rows.shape[:1], f"({rows.shape[0]},), one value per unit")
