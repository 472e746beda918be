"""Hyperspherical weights (GmP): the direction of given angles, its inverse, and the layer."""

from functools import partial

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.functional import _shards
from lcw_ops.functional._call import check_float64_alone, check_layer, choose_backend, try_kernel_then_explain
from lcw_ops.ops import hypersphere as _hypersphere


def hypersphere_direction(angles: Tensor) -> Tensor:
    """Unit rows from angles: ``u_k = cos t_k prod_{i<k} sin t_i`` for k < m, ``u_m = prod_{i<m} sin t_i``.

    Any real angle is valid; no angle is wrapped or clamped. Derivatives are products, so they are finite and exact at
    the poles (sin t_k = 0) too. At a pole, the later angles have no effect, and their gradients are 0.

    Args:
        angles: (n, m - 1) for n units of m inputs, in radians; a filter is flattened to one row. float32, float64,
            bfloat16 or float16; computed in float32 or wider and rounded once. Any size is valid, but in Triton
            angles of 2^52 and more give NaN, because neighbouring floats are whole turns apart.

    Returns:
        (n, m), of the angles' dtype. For m = 1 there are no angles to hold a sign: the result is (n, 1) ones.

    Raises:
        TypeError: a dtype that is not floating, or a sparse or nested tensor.
        ValueError: not exactly 2 dimensions.

    Source: W. Chen, H. Ge, "Neural Characteristic Activation Analysis and Geometric Parameterization for ReLU
    Networks", NeurIPS 2024, arXiv 2305.15912; the division-free derivatives are ours.
    """
    arguments = (angles,)
    direction = try_kernel_then_explain(
        _hypersphere.NAME, _hypersphere.direction, _check_direction, arguments, arguments
    )
    if direction is not None:
        return direction
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(hypersphere_direction, *arguments)
    _check_direction(angles)
    if _torch.has_dtensor(angles):
        name, fan_in = "hypersphere_direction", angles.shape[1] + 1
        return _shards.run_weight(name, hypersphere_direction, None, fan_in, angles=angles)
    backend = choose_backend(_hypersphere.NAME, angles, angles.shape[1] + 1)
    if backend == "reference":
        return _reference.hypersphere_direction(angles)
    return _hypersphere.direction(angles, backend)


def hypersphere_angles(weight: Tensor) -> Tensor:
    """The angles of the rows' directions: the inverse of :func:`hypersphere_direction`, up to the rows' norms.

    ``t_k = atan2(||w_{k+1:m}||, w_k)`` for k <= m - 2, ``t_{m-1} = atan2(w_m, w_{m-1})``. The sign of every component
    is kept, except for m = 1, where no angle could hold it. A zero row gets angles 0, which give the direction
    (1, 0, ..). The function runs once, when a layer is initialised, so it is plain torch on every device.

    Args:
        weight: (n, m) for n units of m >= 1 inputs. float32, float64, bfloat16 or float16. Rows may have any finite
            norm.

    Returns:
        (n, m - 1), in radians: in [0, pi], the last in [-pi, pi]. Where a derivative does not exist, it is taken as 0.

    Raises:
        TypeError: a dtype that is not floating, or a sparse or nested tensor.
        ValueError: not exactly 2 dimensions, m = 0, or a DTensor whose rows are split.

    Source: derived by us; the code of the paper's authors loses the sign of w_m.
    """
    arguments = (weight,)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(hypersphere_angles, *arguments)
    op = "hypersphere_angles"
    _checks.accumulation_dtype(op, weight=weight)
    _checks.check_dense(op, weight=weight)
    if _torch.has_dtensor(weight):
        _checks.check_rows(op, "weight", weight, least_fan_in=1)
        return _shards.run_weight(op, hypersphere_angles, None, weight.shape[1] - 1, weight=weight)
    return _reference.hypersphere_angles(weight)


def gmp_linear(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, activation: str | None = None) -> Tensor:
    """A layer of units on the hypersphere: ``radius * act(x @ u.T + location)``, u = hypersphere_direction(angles).

    A unit's boundary, where the unit begins to fire, is the plane through -location * u. A change of the unit's angles
    turns u by at most the change's norm. For radius > 0 this is the plain layer of weight radius * u and bias
    radius * location, with as many parameters.

    On a CPU, a measurement decides which matmul runs, as in :func:`lcw_linear`. For few samples (up to 32 on a CPU, 64
    in Triton), directions are never written to memory.

    x and the parameters may be DTensors, split by units or by samples, as :class:`lcw_ops.distributed.ColwiseParallel`
    splits them. The result is then a DTensor too.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16. 16-bit x is computed in float32. With more than
            these few samples, directions and ``x @ u.T + location`` are rounded to x's dtype, as torch's own layers
            would do.
        angles: (n, m - 1) for n units of m inputs, in radians.
        radius: (n,), of any sign; it multiplies the activation's result.
        location: (n,).
        activation: None or "relu".

    All tensors have x's dtype. Under autocast their dtypes may differ, but float64 does not mix with others; directions
    are then computed in the angles' own dtype and rounded.

    Returns:
        (..., n), in x's dtype or, under autocast, in autocast's.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: an unknown activation, shapes other than those above, or DTensors that are placed in another way.

    Source: as :func:`hypersphere_direction`.
    """
    arguments = (x, angles, radius, location, activation)
    # Compare only a string: under torch.fx the activation may be a proxy, whose comparison gives no truth value.
    is_known = activation is None or (isinstance(activation, str) and activation == "relu")
    if is_known and not _torch.in_forward_mode():
        output = try_kernel_then_explain(
            _hypersphere.NAME, _hypersphere.gmp_linear, _check_gmp_linear, arguments[:4], arguments
        )
        if output is not None:
            return output
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(gmp_linear, *arguments)
    autocast = _check_gmp_linear(*arguments)
    if _torch.has_dtensor(x, angles, radius, location):
        layer, vectors = partial(gmp_linear, activation=activation), {"radius": radius, "location": location}
        return _shards.run_layer("gmp_linear", layer, None, x, ("angles", angles), **vectors)
    backend = choose_backend(_hypersphere.NAME, x, x.shape[-1])
    if not autocast and backend == "reference":
        return _reference.gmp_linear(*arguments)
    if not autocast and _hypersphere.is_fused():
        return _hypersphere.gmp_linear(*arguments, backend)
    pre_activation = torch.nn.functional.linear(x, hypersphere_direction(angles), location)
    activated = pre_activation.relu() if activation == "relu" else pre_activation
    return radius.to(activated.dtype) * activated


def _check_direction(angles) -> None:
    op = "hypersphere_direction"
    _checks.accumulation_dtype(op, angles=angles)
    _checks.check_dense(op, angles=angles)
    _checks.check_rows(op, "angles", angles, "(n, m-1)")


def _check_gmp_linear(x, angles, radius, location, activation) -> bool:
    """Returns whether autocast is on."""
    op = "gmp_linear"
    tensors = {"x": x, "angles": angles, "radius": radius, "location": location}
    autocast = check_layer(op, **tensors)
    if autocast:
        check_float64_alone(op, **tensors)
    _checks.check_choice(op, "activation", activation, (None, "relu"))
    _checks.check_rows(op, "angles", angles, "(n, m-1)")
    units, fan_in = angles.shape[0], angles.shape[1] + 1
    _checks.check_features(op, x, fan_in, "one more than the columns of angles")
    _checks.check_per_unit(op, "radius", radius, units)
    _checks.check_per_unit(op, "location", location, units)
    return autocast
