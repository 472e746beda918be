"""Weight normalization: a layer's weight has rows w = s v / ||v||, of the length |s|.

Row v and scale s are parameters of a unit. T. Salimans, D. P. Kingma, NeurIPS 2016, arXiv 1602.07868.
"""

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops._checks import accumulation_dtype, check_per_unit, check_rows, check_shape


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """scale * weight / ||weight|| by rows.

    A zero row has no direction. It stays zero, with zero derivatives, instead of NaN (our choice).

    Args:
        weight: (n, m), m >= 1, any floating dtype; 16-bit rows are computed in float32. Rows of any
            finite norm are safe, the smallest and the largest included.
        scale: (n,), of the weight's dtype.

    Returns:
        (n, m), of the weight's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes other than those above.

    Source: the paper's formula.
    """
    dtype = accumulation_dtype("normalize_scale", weight=weight, scale=scale)
    check_rows("normalize_scale", "weight", weight, least_fan_in=1)
    check_per_unit("normalize_scale", "scale", scale, weight.shape[0])
    direction, _ = _unit_rows(_torch.cast(weight, dtype))
    return _torch.cast(_torch.cast(scale, dtype)[:, None] * direction, weight.dtype)


def normalize_scale_backward(grad_output: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and scale. They are themselves differentiable.

    For a row with v = weight / ||weight|| and G = grad_output:  ds = <G, v>,  dweight = s (G - ds v) / ||weight||. Both
    are zero for a zero row.

    Args:
        grad_output: (n, m), of the weight's dtype.
        weight: (n, m).
        scale: s (n,).

    Returns:
        (grad_weight (n, m), grad_scale (n,)).

    Raises:
        TypeError, ValueError: as `normalize_scale`, and if grad_output does not fit.

    Source: the paper's formula; the zero row is ours.
    """
    name = "normalize_scale_backward"
    dtype = accumulation_dtype(name, grad_output=grad_output, weight=weight, scale=scale)
    check_rows(name, "weight", weight, least_fan_in=1)
    weight_shape = tuple(weight.shape)
    check_shape(name, "grad_output", grad_output, grad_output.shape == weight_shape, f"weight's {weight_shape}")
    check_per_unit(name, "scale", scale, weight.shape[0])
    g = _torch.cast(grad_output, dtype)
    direction, length = _unit_rows(_torch.cast(weight, dtype))
    grad_scale = (g * direction).sum(dim=1, keepdim=True)
    grad_weight = _torch.cast(scale, dtype)[:, None] * ((g - grad_scale * direction) / length)
    return _torch.cast(grad_weight, weight.dtype), _torch.cast(grad_scale.squeeze(1), scale.dtype)


def normalize_scale_jvp(tangent_weight: Tensor, tangent_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The derivative of `normalize_scale` along a tangent.

    For a row with v = weight / ||weight||:  dscale v + scale (dweight - <dweight, v> v) / ||weight||. It is zero for a
    zero row.

    Args:
        tangent_weight: dweight (n, m), of the weight's dtype.
        tangent_scale: dscale (n,), of the scale's dtype.
        weight: (n, m).
        scale: (n,).

    Returns:
        (n, m).

    Raises:
        TypeError, ValueError: as `normalize_scale`, and if a tangent does not fit.

    Source: derived here.
    """
    name = "normalize_scale_jvp"
    given = {"tangent_weight": tangent_weight, "tangent_scale": tangent_scale, "weight": weight, "scale": scale}
    dtype = accumulation_dtype(name, **given)
    check_rows(name, "weight", weight, least_fan_in=1)
    check_per_unit(name, "scale", scale, weight.shape[0])
    weight_shape = tuple(weight.shape)
    right = tangent_weight.shape == weight_shape
    check_shape(name, "tangent_weight", tangent_weight, right, f"weight's {weight_shape}")
    check_per_unit(name, "tangent_scale", tangent_scale, weight.shape[0])
    dw = _torch.cast(tangent_weight, dtype)
    direction, length = _unit_rows(_torch.cast(weight, dtype))
    turned = (dw - (dw * direction).sum(dim=1, keepdim=True) * direction) / length
    return _torch.cast(
        _torch.cast(tangent_scale, dtype)[:, None] * direction + _torch.cast(scale, dtype)[:, None] * turned,
        weight.dtype,
    )


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (n, m) -> unit rows (n, m), and their lengths (n, 1).

    A zero row gives zeros and an infinite length: divided by it, all of the row's derivatives are zero.
    """
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1.0)
    x = rows / largest
    length = square_root(x.square().sum(dim=1, keepdim=True))
    length = length.masked_fill(length == 0, torch.inf)
    return x / length, largest * length


def square_root(square: Tensor) -> Tensor:
    """sqrt whose derivative at 0 is 0 instead of infinity."""
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
