"""Hyperspherical weights (GmP): the direction of given angles, its inverse, and the layer."""

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.functional._call import check_features, check_layer, check_per_unit, check_rows, is_plain_call
from lcw_ops.ops import backends
from lcw_ops.ops import hypersphere as _hypersphere


def hypersphere_direction(angles: Tensor) -> Tensor:
    """Unit rows from angles: ``u_k = cos t_k prod_{i<k} sin t_i`` for k < m, ``u_m = prod_{i<m} sin t_i``.

    Any real angle is valid; nothing is wrapped or clamped, and derivatives are products, so finite and right at the
    poles (sin t_k = 0) too. A pole hides all later angles: their gradients are 0 there.

    Source: W. Chen, H. Ge, "Neural Characteristic Activation Analysis and Geometric Parameterization for ReLU
    Networks", NeurIPS 2024, arXiv 2305.15912; the division-free derivatives are ours.

    Args:
        angles: (n, m - 1), in radians, one row per unit; a filter is flattened to one row. float32, float64, bfloat16
            or float16; computed in float32 or wider and rounded once. Of any size; in Triton those of 2^52 and more,
            next to which floats are whole turns apart, give NaN.

    Returns:
        (n, m), of the angles' dtype. Without angles (m = 1) nothing can carry a sign: (n, 1) ones.

    Raises:
        TypeError: a dtype that is not floating, or a sparse or nested tensor.
        ValueError: other than 2 dimensions.
    """
    arguments = (angles,)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(hypersphere_direction, *arguments)
    op = "hypersphere_direction"
    _checks.accumulation_dtype(op, angles=angles)
    _checks.check_dense(op, angles=angles)
    check_rows(op, "angles", angles, "(n, m-1)")
    backend = backends.choose(_hypersphere.NAME, angles.device)
    if backend == "reference":
        return _reference.hypersphere_direction(angles)
    return _hypersphere.direction(angles, backend)


def hypersphere_angles(weight: Tensor) -> Tensor:
    """The angles of the rows' directions: the inverse of :func:`hypersphere_direction`, up to the rows' lengths.

    ``t_k = atan2(||w_{k+1:m}||, w_k)`` for k <= m - 2, ``t_{m-1} = atan2(w_m, w_{m-1})``: the sign of every component
    is kept (m = 1: it cannot be). A zero row gets angles 0, the direction (1, 0, ..). Made once, when a layer begins,
    so in plain torch on every device; derived by us, for the paper's authors' code loses the sign of w_m.

    Args:
        weight: (n, m), m >= 1. float32, float64, bfloat16 or float16; rows of any length but 0, infinity and NaN.

    Returns:
        (n, m - 1), in radians: in [0, pi], the last in [-pi, pi]. Where an angle has no derivative, 0 is used for it.

    Raises:
        TypeError: a dtype that is not floating, or a sparse or nested tensor.
        ValueError: other than 2 dimensions, or m = 0.
    """
    arguments = (weight,)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(hypersphere_angles, *arguments)
    op = "hypersphere_angles"
    _checks.accumulation_dtype(op, weight=weight)
    _checks.check_dense(op, weight=weight)
    return _reference.hypersphere_angles(weight)


def gmp_linear(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, activation: str | None = None) -> Tensor:
    """A layer of units on the hypersphere: ``radius * act(x @ u.T + location)``, u = hypersphere_direction(angles).

    The unit's boundary, where it begins to fire, lies at the point -location * u; its direction turns by at most the
    length of a step of the angles. For radius > 0 this is the plain layer of weight radius * u and bias
    radius * location, with as many parameters. Source: as :func:`hypersphere_direction`.

    Who multiplies on a CPU is measured, or decided, as in :func:`lcw_linear`. Up to some dozens of samples directions
    are never written to memory.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16. 16 bits are computed in float32; where directions are kept,
            from 33 samples on, they and ``x @ u.T + location`` are rounded to x's dtype, as torch's own layers would.
        angles: (n, m - 1), in radians.
        radius: (n,), of any sign; it acts after the activation.
        location: (n,).
        activation: None or "relu".

        All of x's dtype; under autocast of any but float64, which goes with itself alone: directions are made in the
        angles' own digits, then rounded.

    Returns:
        (..., n), of x's dtype (under autocast: autocast's).

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: an unknown activation, or shapes that do not fit.
    """
    arguments = (x, angles, radius, location, activation)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(gmp_linear, *arguments)
    is_plain = activation in (None, "relu") and is_plain_call(_hypersphere.NAME, x, angles, radius, location)
    if is_plain and _hypersphere.is_fused():
        # As in lcw_linear.
        try:
            return _hypersphere.gmp_linear(x, angles, radius, location, activation == "relu", "cpp")
        except (RuntimeError, TypeError, AttributeError, IndexError):
            _check_gmp_linear(x, angles, radius, location, activation)
            raise
    autocast = _check_gmp_linear(x, angles, radius, location, activation)
    backend = backends.choose(_hypersphere.NAME, x.device)
    if not autocast and backend == "reference":
        return _reference.gmp_linear(x, angles, radius, location, activation)
    if not autocast and _hypersphere.is_fused():
        return _hypersphere.gmp_linear(x, angles, radius, location, activation == "relu", backend)
    pre_activation = torch.nn.functional.linear(x, hypersphere_direction(angles), location)
    activated = pre_activation.relu() if activation == "relu" else pre_activation
    return radius.to(activated.dtype) * activated


def _check_gmp_linear(x, angles, radius, location, activation) -> bool:
    """Whether autocast, which takes tensors of any dtypes, is on."""
    op = "gmp_linear"
    autocast = check_layer(op, x=x, angles=angles, radius=radius, location=location)
    _checks.check_choice(op, "activation", activation, (None, "relu"))
    check_rows(op, "angles", angles, "(n, m-1)")
    units, fan_in = angles.shape[0], angles.shape[1] + 1
    check_features(op, x, fan_in, "one more than angles'")
    check_per_unit(op, "radius", radius, units)
    check_per_unit(op, "location", location, units)
    return autocast
