"""Formulas of the ops' arithmetic for torch's FlopCounterMode, which cannot see the products inside an op.

The formulas count the matrix products in an op's mathematical definition, whatever a kernel does. A constrained layer
counts as a plain layer, and a recurrence solved in parallel as a recurrence solved layer by layer. States that backward
recomputes to save memory count once.
"""

import torch


def _lcw_linear(x_shape, weight_shape, *_, out_shape=None) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


def _lcw_linear_backward(
    grad_shape, x_shape, weight_shape, basis, deterministic, needs_x, needs_weight, needs_bias, out_shape=None
) -> int:
    return (needs_x + needs_weight) * _lcw_linear(x_shape, weight_shape)


def _layer(x_shape, rows_shape, *_, out_shape=None) -> int:
    # A row of angles has one entry fewer than a row of x.
    return 2 * x_shape[0] * rows_shape[0] * x_shape[1]


def _gmp_linear_backward(grad_shape, x_shape, angles_shape, *rest, out_shape=None) -> int:
    needs_x, needs_angles, _needs_radius, _needs_location = rest[-4:]
    return (needs_x + needs_angles) * _layer(x_shape, angles_shape)


def _weight_norm_linear_backward(grad_shape, x_shape, weight_shape, *rest, out_shape=None) -> int:
    needs_x, needs_weight, needs_scale, _needs_bias = rest[-4:]
    # One product gives the gradients of weight and scale.
    return (needs_x + (needs_weight or needs_scale)) * _layer(x_shape, weight_shape)


def _recurrence(h0_shape, weight_shape, bias, filter_shape, alpha, beta, inputs, steps, *_, out_shape=None) -> int:
    """The products of the state h with the weight W and, unless it is a permutation, with the filter O."""
    return (1 + _is_matrix(filter_shape)) * _recurrence_product(h0_shape, steps)


def _recurrence_backward(
    grad_shape, checkpoints, weight_shape, bias, filter_shape, alpha, beta, inputs, steps, needs_weight
) -> int:
    """The products P W, G O (unless O is a permutation) and, for the weight's gradient, P^T h.

    G is the gradient of the state h, and P that of the pre-activation.
    """
    return (1 + _is_matrix(filter_shape) + needs_weight) * _recurrence_product(grad_shape[-2:], steps)


def _orthogonal_filter_backward(*arguments, out_shape=None) -> int:
    shared, needs_weight = arguments[:9], arguments[11]
    return _recurrence_backward(*shared, needs_weight)


def _orthogonal_filter_parallel_backward(*arguments, out_shape=None) -> int:
    *shared, _activation, _tolerance, _window, needs_weight, _bias, _scales, _inputs = arguments
    return _recurrence_backward(*shared, needs_weight)


def _recurrence_product(state_shape, steps: int) -> int:
    """A state (samples, units) times a matrix (units, units) at every step."""
    rows, width = state_shape
    return 2 * rows * width * width * steps


def _is_matrix(filter_shape) -> bool:
    return len(filter_shape) > 1


FORMULAS = {
    "lcw_linear": _lcw_linear,
    "lcw_linear_backward": _lcw_linear_backward,
    "gmp_linear": _layer,
    "gmp_linear_backward": _gmp_linear_backward,
    "weight_norm_linear": _layer,
    "weight_norm_linear_backward": _weight_norm_linear_backward,
    "orthogonal_filter": _recurrence,
    "orthogonal_filter_backward": _orthogonal_filter_backward,
    "orthogonal_filter_parallel": _recurrence,
    "orthogonal_filter_parallel_backward": _orthogonal_filter_parallel_backward,
}


def register() -> None:
    """Give torch's counter the formulas that it lacks. Call this once torch.utils.flop_counter has been imported."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.lcw_ops, name)
        if op not in flop_registry:
            register_flop_formula(op)(formula)
