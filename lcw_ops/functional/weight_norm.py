"""Weight normalization: the normalised weight, and the layer."""

from functools import partial

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.functional import _shards
from lcw_ops.functional._call import (
    check_float64_alone,
    check_layer,
    choose_backend,
    try_kernel_then_explain,
    without_none,
)
from lcw_ops.ops import weight_norm as _weight_norm


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight normalization: ``scale * weight / ||weight||`` by rows.

    Args:
        weight: (n, m) for n units of m inputs; a filter is flattened to one row. float32, float64, bfloat16 or float16;
            computed in float32 or wider and rounded once. Rows may have any finite norm. A zero row, which has no
            direction, stays zero, with zero derivatives.
        scale: (n,), of any sign, of the weight's dtype. torch's shape (n, 1) is taken too.

    Returns:
        (n, m), of the weight's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes other than those above, or m = 0.

    Source: T. Salimans, D. P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868.
    """
    arguments = (weight, scale)
    normalised = try_kernel_then_explain(
        _weight_norm.NAME, _normalize_kernel, _check_normalize_scale, arguments, arguments
    )
    if normalised is not None:
        return normalised
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(normalize_scale, *arguments)
    _check_normalize_scale(*arguments)
    if _torch.has_dtensor(weight, scale):
        return _on_shards(weight, scale)
    backend = choose_backend(_weight_norm.NAME, weight, weight.shape[1])
    if backend == "reference":
        return _reference.normalize_scale(weight, _as_vector(scale))
    return _normalize_kernel(weight, scale, backend)


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with weight normalization: ``x @ normalize_scale(weight, scale).T + bias``.

    On a CPU, the normalised weight is not computed if there are at most 64 samples, or at most a quarter as many
    samples as inputs. Instead, x is multiplied by the unnormalised rows, and the products are scaled. Exceptions are
    rows longer than 2**16, rows shorter than 2**-16 or than scale * 2**-16, a fan-in of one, and float16 with more than
    64 samples. Numbers near the smallest of x's dtype lose digits. A measurement decides which matmul runs, as in
    :func:`lcw_linear`.

    x and the parameters may be DTensors, split by units or by samples, as :class:`lcw_ops.distributed.ColwiseParallel`
    splits them, or by inputs. The result is then a DTensor too.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16. 16-bit x is computed in float32. For more than 64 samples,
            the products or the normalised weight are rounded to x's dtype, as torch's own layers would round them.
        weight: (n, m) for n units of m >= 1 inputs; a zero row is a unit of weight zero.
        scale: (n,), of any sign. torch's shape (n, 1) is taken too.
        bias: (n,), or None.

    All tensors have x's dtype. Under autocast their dtypes may differ, but float64 does not mix with others; the weight
    is normalised in its own dtype, then rounded.

    Returns:
        (..., n), in x's dtype or, under autocast, in autocast's.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes other than those above, m = 0, or DTensors that are placed in another way.

    Source: as :func:`normalize_scale`.
    """
    arguments = (x, weight, scale, bias)
    if not _torch.in_forward_mode():
        tensors = (x, weight, scale) if bias is None else arguments
        output = try_kernel_then_explain(_weight_norm.NAME, _kernel, _check_weight_norm_linear, tensors, arguments)
        if output is not None:
            return output
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(weight_norm_linear, *arguments)
    autocast = _check_weight_norm_linear(*arguments)
    if _torch.has_dtensor(x, weight, scale, bias):
        make_weight = partial(normalize_scale, weight, scale)
        rows = ("weight", weight)
        return _shards.run_layer("weight_norm_linear", weight_norm_linear, make_weight, x, rows, scale=scale, bias=bias)
    backend = choose_backend(_weight_norm.NAME, x, x.shape[-1])
    if not autocast and backend != "reference" and _weight_norm.is_fused():
        return _kernel(*arguments, backend)
    return torch.nn.functional.linear(x, normalize_scale(weight, scale), bias)


def _normalize_kernel(weight: Tensor, scale: Tensor, backend: str) -> Tensor:
    return _weight_norm.normalize_scale(weight, _as_vector(scale), backend)


def _kernel(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    # The C++ kernel takes torch's shape (n, 1), so that autograd need not record a view.
    if backend != "cpp" or scale.dim() != 2:
        scale = _as_vector(scale)
    return _weight_norm.weight_norm_linear(x, weight, scale, bias, backend)


def _on_shards(weight: Tensor, scale: Tensor) -> Tensor:
    def constrain(rows, weight, scale):
        return _shards.normalize_scale(rows, weight, _as_vector(scale))

    return _shards.run_weight(
        "normalize_scale", normalize_scale, constrain, weight.shape[1], weight=weight, scale=scale
    )


def _as_vector(scale: Tensor) -> Tensor:
    """A scale in torch's shape (n, 1, ...) as (n,). A scale of another shape comes back as it is."""
    return scale.reshape(-1) if scale.dim() > 1 and scale.shape[1:].numel() == 1 else scale


def _check_normalize_scale(weight, scale) -> None:
    op = "normalize_scale"
    _checks.accumulation_dtype(op, scale=scale)
    _checks.accumulation_dtype(op, weight=weight, scale=scale)
    _checks.check_dense(op, weight=weight, scale=scale)
    _checks.check_devices(op, weight=weight, scale=scale)
    _checks.check_rows(op, "weight", weight, least_fan_in=1)
    _checks.check_per_unit(op, "scale", _as_vector(scale), weight.shape[0])


def _check_weight_norm_linear(x, weight, scale, bias) -> bool:
    """Returns whether autocast is on."""
    op = "weight_norm_linear"
    tensors = {"x": x, "weight": weight, "scale": scale, **without_none(bias=bias)}
    autocast = check_layer(op, **tensors)
    if autocast:
        check_float64_alone(op, **tensors)
    _checks.check_rows(op, "weight", weight, least_fan_in=1)
    units, fan_in = weight.shape
    _checks.check_features(op, x, fan_in, "the weight's fan-in")
    _checks.check_per_unit(op, "scale", _as_vector(scale), units)
    if bias is not None:
        _checks.check_per_unit(op, "bias", bias, units)
    return autocast
