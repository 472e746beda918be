"""Weights whose rows sum to zero (LCW): the weight, the layer, and the activation shift that they avoid."""

import contextlib
import math
from functools import partial

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.functional import _shards
from lcw_ops.functional._call import check_layer, choose_backend, try_kernel_then_explain, without_none
from lcw_ops.ops import lcw_linear as _lcw_linear


def lcw_weight(weight: Tensor, basis: bool = False) -> Tensor:
    """Rows that sum to zero, from an unconstrained parameter. Inputs with equal means then cause no activation shift.

    In the centred form, ``w = u - mean(u)`` for each row u of the parameter, with the mean over all dimensions but the
    first. In the basis form, ``w = B v`` for each row v: B is Householder's orthonormal basis of the zero-sum vectors
    and is never stored. With s = sqrt(m) and S = sum(v), ``w_j = v_j - S / (s (s + 1))`` for j < m, ``w_m = -S / s``.

    Args:
        weight: (n, m, *k) for n units of m inputs (*k is a filter's size), or (n, m - 1) with ``basis``. float32,
            float64, bfloat16 or float16. Sums are taken in float32 or wider, and the result is rounded once. A
            channels-last layout is kept.
        basis: whether to use the paper's parametrization.

    Returns:
        (n, m, *k), or (n, m). A fan-in of 1 leaves only the weight 0: (n, 1) zeros, whatever the parameter.

    Raises:
        TypeError: a dtype that is not floating; a sparse or nested tensor.
        ValueError: fewer than 2 dimensions; with ``basis``, not exactly 2.

    Source: T. Kutsuna, "Linearly Constrained Weights: Reducing Activation Shift for Faster Training of Neural
    Networks", ECML PKDD 2019, arXiv 2403.13833 (the constraint and the basis form; the centred form is ours).
    """
    arguments = (weight, basis)
    constrained = try_kernel_then_explain(
        _lcw_linear.NAME, _lcw_linear.constrained_weight, _check_lcw_weight, (weight,), arguments
    )
    if constrained is not None:
        return constrained
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(lcw_weight, *arguments)
    _check_lcw_weight(*arguments)
    if _torch.has_dtensor(weight):
        constrain = None if basis else _shards.centre
        fan_in = weight.shape[1] + (1 if basis else 0)
        return _shards.run_weight("lcw_weight", partial(lcw_weight, basis=basis), constrain, fan_in, weight=weight)
    backend = choose_backend(_lcw_linear.NAME, weight, math.prod(weight.shape[1:]))
    if backend == "reference":
        return _reference.lcw_weight(weight, basis)
    return _lcw_linear.constrained_weight(weight, basis, backend)


def lcw_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, basis: bool = False) -> Tensor:
    """A linear layer whose rows sum to zero: ``x @ lcw_weight(weight, basis).T + bias``.

    A constant added to all features of a sample changes nothing. The constraint costs one pass over x or over the
    weight, whichever is smaller: <B v, x> = <v, B^T x>. If x is projected, rounding errors are relative to
    |w| |x - mean(x)|, and those of x's gradient to |grad| |w|. If the weight is projected, they are relative to
    |w - mean(w)| |x| and to |grad| |w - mean(w)|. Under autocast, the weight is constrained first and then rounded.

    On a CPU, the product runs on our own kernels or on torch's matmul, whichever was faster when a layer of this size
    first ran. The choices are kept in ``~/.cache/lcw_ops`` (or ``LCW_OPS_CACHE_DIR``), so that later runs give the same
    bits. ``LCW_OPS_MATMUL=own`` or ``torch`` decides without a measurement. Under
    ``torch.use_deterministic_algorithms`` nothing is measured: our kernels multiply up to 16 samples, torch's matmul
    multiplies more.

    x and the parameters may be DTensors, split by units or by samples, as :class:`lcw_ops.distributed.ColwiseParallel`
    splits them (centred form: or by inputs). The result is then a DTensor too.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16.
        weight: (n, m), or (n, m - 1) with ``basis``; of x's dtype, or of any dtype under autocast.
        bias: (n,), or None.
        basis: whether to use the paper's parametrization, see :func:`lcw_weight`.

    Returns:
        (..., n), in x's dtype or, under autocast, in autocast's.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes other than those above, or DTensors that are placed in another way.

    Source: as :func:`lcw_weight`.
    """
    arguments = (x, weight, bias, basis)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    output = try_kernel_then_explain(_lcw_linear.NAME, _lcw_linear.fused_linear, _check_lcw_linear, tensors, arguments)
    if output is not None:
        return output
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(lcw_linear, *arguments)
    autocast = _check_lcw_linear(*arguments)
    if _torch.has_dtensor(x, weight, bias):
        layer, make_weight = partial(lcw_linear, basis=basis), None if basis else partial(lcw_weight, weight)
        return _shards.run_layer("lcw_linear", layer, make_weight, x, ("weight", weight), bias=bias)
    backend = choose_backend(_lcw_linear.NAME, x, x.shape[-1])
    if backend == "reference" and not autocast:
        return _reference.lcw_linear(x, weight, bias, basis)
    if not autocast and _lcw_linear.is_fused(x, backend):
        return _lcw_linear.fused_linear(x, weight, bias, basis, backend)
    rows = x.numel() // max(x.shape[-1], 1)
    if autocast or rows > weight.shape[0]:
        return torch.nn.functional.linear(x, lcw_weight(weight, basis), bias)
    return torch.nn.functional.linear(_lcw_linear.project(x, basis, backend), weight, bias)


def _check_lcw_weight(weight, basis) -> None:
    _checks.accumulation_dtype("lcw_weight", weight=weight)
    _checks.check_dense("lcw_weight", weight=weight)
    if basis:
        right, expected, remedy = weight.dim() == 2, "(n, m-1)", "Flatten a convolution's filter to one row first."
    else:
        right, expected, remedy = weight.dim() >= 2, "(n, m, *k)", "A unit is one row: add dim 0."
    _checks.check_shape("lcw_weight", "weight", weight, right, expected, remedy)


def _check_lcw_linear(x, weight, bias, basis) -> bool:
    """Returns whether autocast is on."""
    op = "lcw_linear"
    autocast = check_layer(op, x=x, weight=weight, **without_none(bias=bias))
    if not isinstance(basis, int):
        raise TypeError(_checks.describe(op, "basis", f"is a {type(basis).__name__}", "True or False"))
    _checks.check_rows(op, "weight", weight, "(n, m-1)" if basis else "(n, m)")
    units, fan_in = weight.shape[0], weight.shape[1] + (1 if basis else 0)
    _checks.check_features(op, x, fan_in, "the weight's fan-in")
    if bias is not None:
        _checks.check_per_unit(op, "bias", bias, units)
    return autocast


def activation_shift(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The activation shift of every unit: its mean pre-activation, and the angle between weight and mean activation.

    With the mean sample mu, ``shift = <w, mu> + b = ||w|| ||mu|| cos(angle) + b``, angle in [0, pi]. The angle to a
    zero vector is pi / 2, which means no shift. The function is differentiable and runs in plain torch on every device.

    Args:
        x: (..., m), the samples; at least one.
        weight: (n, m), the weight that the layer applies; for an LCW layer ``lcw_weight(...)``.
        bias: (n,), or None.

    Returns:
        (shift (n,), angle (n,)) in x's dtype; angles in radians.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices.
        ValueError: shapes other than those above, or no samples.

    Source: as :func:`lcw_weight`.
    """
    arguments = (x, weight, bias)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(activation_shift, *arguments)
    for name, tensor in (("x", x), ("weight", weight)):
        _checks.accumulation_dtype("activation_shift", **{name: tensor})
    _checks.check_devices("activation_shift", x=x, weight=weight, bias=bias)
    # The result is for diagnosis, so it is not rounded to autocast's dtype. Autocast does not know the meta device.
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return _reference.activation_shift(x, weight, bias)
