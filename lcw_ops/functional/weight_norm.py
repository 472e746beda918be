"""Weight normalization: the normalised weight, and the layer."""

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.functional._call import check_features, check_layer, check_per_unit, check_rows, is_plain_call
from lcw_ops.ops import backends
from lcw_ops.ops import hypersphere as _hypersphere


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight normalization: ``scale * weight / ||weight||`` by rows.

    Source: T. Salimans, D. P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868.

    Args:
        weight: (n, m), one row per unit; a filter is flattened to one row. float32, float64, bfloat16 or float16;
            computed in float32 or wider and rounded once. Rows of any finite length; a zero row, which has no
            direction, stays zero, with zero derivatives.
        scale: (n,), of any sign, of the weight's dtype.

    Returns:
        (n, m), of the weight's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes that do not fit, or m = 0.
    """
    arguments = (weight, scale)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(normalize_scale, *arguments)
    op = "normalize_scale"
    _checks.accumulation_dtype(op, scale=scale)
    _checks.accumulation_dtype(op, weight=weight, scale=scale)
    _checks.check_dense(op, weight=weight, scale=scale)
    _checks.check_devices(op, weight=weight, scale=scale)
    check_rows(op, "weight", weight, "(n, m)")
    _checks.check_shape(op, "weight", weight, weight.shape[1] >= 1, "(n, m) with m >= 1")
    check_per_unit(op, "scale", scale, weight.shape[0])
    backend = backends.choose(_hypersphere.NAME, weight.device)
    if backend == "reference":
        return _reference.normalize_scale(weight, scale)
    return _hypersphere.normalize_scale(weight, scale, backend)


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with weight normalization: ``x @ normalize_scale(weight, scale).T + bias``.

    Source: as :func:`normalize_scale`. On a CPU the normalised weight is never made while there are at most 64 samples,
    or a quarter as many as inputs: the products are with the rows as they are, then scaled. (Not where a row is longer
    than 2**16, or shorter than its 2**-16 or scale * 2**-16; with one input; nor in float16 with many samples. Numbers
    that near the least of x's dtype lose digits.) Who multiplies: as in :func:`gmp_linear`.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16. 16 bits are computed in float32; beyond few samples
            products, or the normalised weight, are rounded to x's dtype, as torch's own layers would.
        weight: (n, m), m >= 1; a zero row is a unit of weight zero.
        scale: (n,), of any sign.
        bias: (n,), or None.

        All of x's dtype; under autocast of any but float64, which goes with itself alone: the weight is normalised in
        its own digits, then rounded.

    Returns:
        (..., n), of x's dtype (under autocast: autocast's).

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes that do not fit, or m = 0.
    """
    arguments = (x, weight, scale, bias)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(weight_norm_linear, *arguments)
    given = (x, weight, scale) if bias is None else (x, weight, scale, bias)
    if is_plain_call(_hypersphere.NAME, *given) and _hypersphere.is_fused():
        # As in lcw_linear.
        try:
            return _hypersphere.weight_norm_linear(x, weight, scale, bias, "cpp")
        except (RuntimeError, TypeError, AttributeError, IndexError):
            _check_weight_norm_linear(x, weight, scale, bias)
            raise
    autocast = _check_weight_norm_linear(x, weight, scale, bias)
    backend = backends.choose(_hypersphere.NAME, x.device)
    if not autocast and backend != "reference" and _hypersphere.is_fused():
        return _hypersphere.weight_norm_linear(x, weight, scale, bias, backend)
    return torch.nn.functional.linear(x, normalize_scale(weight, scale), bias)


def _check_weight_norm_linear(x, weight, scale, bias) -> bool:
    """Whether autocast, which takes tensors of any dtypes, is on."""
    op = "weight_norm_linear"
    autocast = check_layer(op, x=x, weight=weight, scale=scale, **({} if bias is None else {"bias": bias}))
    check_rows(op, "weight", weight, "(n, m)")
    units, fan_in = weight.shape
    _checks.check_shape(op, "weight", weight, fan_in >= 1, "(n, m) with m >= 1")
    check_features(op, x, fan_in, "the weight's fan-in")
    check_per_unit(op, "scale", scale, units)
    if bias is not None:
        check_per_unit(op, "bias", bias, units)
    return autocast
