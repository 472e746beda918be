"""The four functions of GmP and weight norm: ours, plain and exact ones, for the tests of both stems' ops."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from lcw_ops import functional as F
from lcw_ops import reference
from lcw_ops.ops import hypersphere, library, weight_norm
from support.numerics import as_exact, assert_by_the_rule, evaluate

NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float64]
EPS = torch.finfo(torch.float64).eps
# Up to this number of samples, directions are computed inside the product. Without the kernel the number is arbitrary.
FUSED = hypersphere.few_samples("cpp") if library.is_implemented(hypersphere.GMP_LINEAR, "cpp") else 32
ROWS = [0, 1, 2, 7, 8, FUSED - 1, FUSED, FUSED + 1, 64, 65, 200]
# (n, m): one unit, no angle or one, sizes around a vector, primes, filters of 128 and 512 channels.
SIZES = [(1, 1), (5, 1), (1, 2), (6, 2), (1, 3), (7, 7), (3, 8), (2, 9), (13, 17), (31, 64), (5, 129), (67, 101)]
# The errors along a row are one random walk, so with fewer rows the largest error would be a matter of luck.
WIDE = [(16, 1152), (16, 4608)]
# Draws of a result are pooled until they have POOLED numbers, up to MOST_DRAWS draws.
POOLED, MOST_DRAWS = 32, 8
# A pre-activation nearer to 0 than this may change its sign when it or a direction is rounded to 16 bits.
KINK = 2**-6


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def per_unit(n, dtype):
    """Lengths of either sign, so similar in size that no unit alone decides the result's scale."""
    return ((torch.rand(n, dtype=torch.float64) + 0.5) * torch.randn(n).sign()).to(dtype)


def uniform_angles(n, m, dtype=torch.float32):
    return reference.hypersphere_angles(normal(n, m, dtype=torch.float64)).to(dtype)


def count_draws(*shape):
    return min(MOST_DRAWS, 1 + POOLED // max(1, math.prod(shape)))


# ---- The exact formulas, in numpy -----------------------------------------------------------------------------------


def exact_direction(t):
    ones = np.ones((len(t), 1), t.dtype)
    products = np.concatenate([ones, np.cumprod(np.sin(t), axis=1)], axis=1)
    return products * np.concatenate([np.cos(t), ones], axis=1)


def exact_direction_backward(g, t):
    """The recurrence from the definition, from the last angle to the first."""
    sine, cosine, g = np.sin(t).T, np.cos(t).T, g.T
    gradient, tail = np.empty_like(sine), g[-1]
    for k in reversed(range(len(sine))):
        gradient[k] = cosine[k] * tail - sine[k] * g[k]
        tail = cosine[k] * g[k] + sine[k] * tail
    return gradient.T * np.concatenate([np.ones((t.shape[0], 1), t.dtype), np.cumprod(sine.T, axis=1)], axis=1)[:, :-1]


def unit_rows(weight):
    length = np.sqrt((weight * weight).sum(1, keepdims=True))
    length[length == 0] = np.inf
    return weight / length, length


def exact_normalize(weight, scale):
    return scale[:, None] * unit_rows(weight)[0]


def exact_normalize_backward(g, weight, scale):
    unit, length = unit_rows(weight)
    grad_scale = (g * unit).sum(1)
    return scale[:, None] * (g - grad_scale[:, None] * unit) / length, grad_scale


def exact_gmp(arguments, grad_output, relu):
    x, t, radius, location, grad = (as_exact(tensor) for tensor in (*arguments.values(), grad_output))
    direction = exact_direction(t)
    z = x @ direction.T + location
    activated = np.where(z > 0, z, 0) if relu else z
    grad_z = radius * grad * ((z > 0) if relu else 1)
    return {
        "output": radius * activated,
        "x": grad_z @ direction,
        "angles": exact_direction_backward(grad_z.T @ x, t),
        "radius": (grad * activated).sum(0),
        "location": grad_z.sum(0),
    }


def exact_weight_norm(arguments, grad_output):
    tensors = (arguments["x"], arguments["weight"], arguments["scale"], grad_output)
    x, weight, scale, grad = (as_exact(tensor) for tensor in tensors)
    normalised = exact_normalize(weight, scale)
    grad_weight, grad_scale = exact_normalize_backward(grad.T @ x, weight, scale)
    exact = {"output": x @ normalised.T, "x": grad @ normalised, "weight": grad_weight, "scale": grad_scale}
    if "bias" in arguments:
        exact["output"] = exact["output"] + as_exact(arguments["bias"])
        exact["bias"] = grad.sum(0)
    return exact


# ---- The four functions: ours, plain and exact ----------------------------------------------------------------------


class Op(NamedTuple):
    ours: Callable
    plain: Callable
    exact: Callable
    # (n, m, dtype, rows) -> arguments by name, gradient of the result
    draw: Callable


def draw_direction(n, m, dtype, rows=0):
    return {"angles": uniform_angles(n, m, dtype)}, normal(n, m, dtype=dtype)


def draw_normalize(n, m, dtype, rows=0):
    return {"weight": normal(n, m, dtype=dtype), "scale": per_unit(n, dtype)}, normal(n, m, dtype=dtype)


def draw_gmp(n, m, dtype, rows):
    arguments = {
        "x": normal(rows, m, dtype=dtype),
        "angles": uniform_angles(n, m, dtype),
        "radius": per_unit(n, dtype),
        "location": normal(n, dtype=dtype),
    }
    return arguments, normal(rows, n, dtype=dtype)


def draw_gmp_relu(n, m, dtype, rows):
    arguments, grad_output = draw_gmp(n, m, dtype, rows)
    double = {name: tensor.double() for name, tensor in arguments.items()}
    z = reference.gmp_linear(double["x"], double["angles"], torch.ones(n).double(), double["location"])
    return arguments, grad_output.masked_fill(z.abs() < KINK, 0)


def draw_weight_norm(n, m, dtype, rows, bias=True):
    arguments = {
        "x": normal(rows, m, dtype=dtype),
        "weight": normal(n, m, dtype=dtype),
        "scale": per_unit(n, dtype),
    }
    if bias:
        arguments["bias"] = normal(n, dtype=dtype)
    return arguments, normal(rows, n, dtype=dtype)


def plain_weight_norm(x, weight, scale, bias=None):
    return torch.nn.functional.linear(x, reference.normalize_scale(weight, scale), bias)


def rows_of(exact, exact_backward):
    """The exact result and gradients of a function of rows."""

    def by_name(arguments, grad_output):
        values = [as_exact(tensor) for tensor in arguments.values()]
        gradients = exact_backward(as_exact(grad_output), *values)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return {"output": exact(*values), **dict(zip(arguments, gradients, strict=True))}

    return by_name


ROW_OPS = {
    "direction": Op(
        F.hypersphere_direction,
        reference.hypersphere_direction,
        rows_of(exact_direction, exact_direction_backward),
        draw_direction,
    ),
    "normalize": Op(
        F.normalize_scale, reference.normalize_scale, rows_of(exact_normalize, exact_normalize_backward), draw_normalize
    ),
}
LAYERS = {
    "gmp": Op(F.gmp_linear, reference.gmp_linear, lambda a, g: exact_gmp(a, g, False), draw_gmp),
    "gmp relu": Op(
        lambda x, angles, radius, location: F.gmp_linear(x, angles, radius, location, "relu"),
        lambda x, angles, radius, location: reference.gmp_linear(x, angles, radius, location, "relu"),
        lambda a, g: exact_gmp(a, g, True),
        draw_gmp_relu,
    ),
    "weight norm": Op(F.weight_norm_linear, plain_weight_norm, exact_weight_norm, draw_weight_norm),
    "weight norm without bias": Op(
        F.weight_norm_linear, plain_weight_norm, exact_weight_norm, functools.partial(draw_weight_norm, bias=False)
    ),
}
OPS = ROW_OPS | LAYERS


class Stem(NamedTuple):
    """The functions of one method."""

    # The name under which the backend is chosen.
    name: str
    row_ops: dict[str, Op]
    layers: dict[str, Op]


GMP = Stem(hypersphere.NAME, {"direction": ROW_OPS["direction"]}, {name: LAYERS[name] for name in ("gmp", "gmp relu")})
WEIGHT_NORM = Stem(
    weight_norm.NAME,
    {"normalize": ROW_OPS["normalize"]},
    {name: LAYERS[name] for name in ("weight norm", "weight norm without bias")},
)


def assert_op(what, op, calls, given=lambda arguments, grad_output: (arguments, grad_output)):
    """Judge ``op`` on these calls by the rule. ``given`` puts the arguments into a memory layout."""
    results = []
    for arguments, grad_output in calls:
        laid_out, grad_laid_out = given(arguments, grad_output)
        actual = evaluate(op.ours, laid_out, grad_laid_out)
        results.append((actual, evaluate(op.plain, arguments, grad_output), op.exact(arguments, grad_output)))
    for name in results[0][2]:
        actual, eager, exact = ([result[name] for result in by_kind] for by_kind in zip(*results, strict=True))
        assert actual[0].dtype == calls[0][1].dtype
        assert_by_the_rule(f"{what}: {name}", actual, eager, exact)


def for_multiplier(multiplier, all_rows):
    """The numbers of samples to test. torch multiplies only beyond FUSED: fewer samples are always fused."""
    return [rows for rows in all_rows if multiplier == "own" or rows > FUSED]
