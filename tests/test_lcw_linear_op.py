"""F.lcw_weight, F.lcw_linear and F.activation_shift on the compiled CPU kernels, and fingerprints of tensors.

The rule of all backends holds: the error against the exact result is at most twice that of plain eager torch in the
same dtype, plus one ulp of the result's scale. The exact result is in float64, or in numpy's 80-bit long double for
float64. Results of few numbers are judged over several draws: one number has one rounding error, and that of eager
torch may happen to be 0.
"""

import math
import os
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.guards import between_guards
from support.numerics import (
    as_exact,
    assert_by_the_rule,
    evaluate,
    hostile_layouts,
    needs_more_digits,
    saved_tensors,
    threads,
)
from support.op_calls import OpCalls
from support.pairwise import pairwise
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops import fingerprint as content

pytestmark = pytest.mark.usefixtures("compiled_kernel", "one_thread")

NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float64]
ROWS = [0, 1, 2, 7, 8, 33, 1000]
# (n, m) for n units of m inputs: one unit, one input, less than a vector, primes, sizes around a vector, whole vectors.
SMALL = [(1, 1), (1, 2), (2, 1), (7, 1), (3, 5), (13, 17), (31, 16), (64, 15), (5, 129)]
LARGE = [(127, 257), (512, 256), (1024, 300), (256, 1024)]
# Draws of a result are pooled until there are POOLED numbers, or MOST_DRAWS draws.
POOLED, MOST_DRAWS = 32, 8


@pytest.fixture
def compiled_kernel():
    with lcw_ops.use_backend("cpp"):
        yield


def plain_weight(weight, basis=False):
    """The formula in eager torch, in the weight's own dtype."""
    if basis:
        row_sum, s = weight.sum(1, keepdim=True), math.sqrt(weight.shape[1] + 1)
        return torch.cat([weight - row_sum / (s * (s + 1)), -row_sum / s], dim=1)
    return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def plain_linear(x, weight, bias=None, basis=False):
    return torch.nn.functional.linear(x, plain_weight(weight, basis), bias)


def exact_weight(weight, basis):
    """For arrays of rows: B v with the basis B, u - mean(u) without."""
    if basis:
        s, row_sum = np.sqrt(weight.dtype.type(weight.shape[1] + 1)), weight.sum(1, keepdims=True)
        return np.concatenate([weight - row_sum / (s * (s + 1)), -row_sum / s], axis=1)
    return weight - weight.sum(1, keepdims=True) / weight.shape[1]


def exact_adjoint(rows, basis):
    """For arrays of rows: B^T g with the basis B, g - mean(g) without."""
    if basis:
        s = np.sqrt(rows.dtype.type(rows.shape[1]))
        return rows[:, :-1] - (rows[:, :-1].sum(1, keepdims=True) / (s * (s + 1)) + rows[:, -1:] / s)
    return exact_weight(rows, basis)


def exact_linear(arguments, grad_output, basis):
    """The result and every gradient, from the formulas of a linear layer."""
    x, weight, grad_output = (as_exact(t) for t in (arguments["x"], arguments["weight"], grad_output))
    constrained = exact_weight(weight, basis)
    exact = {
        "output": x @ constrained.T,
        "x": grad_output @ constrained,
        "weight": exact_adjoint(grad_output.T @ x, basis),
    }
    if "bias" in arguments:
        exact["output"] = exact["output"] + as_exact(arguments["bias"])
        exact["bias"] = grad_output.sum(0)
    return exact


def normal(*shape, dtype=torch.float32, mean=0.0):
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)


def count_draws(*shape):
    return min(MOST_DRAWS, 1 + POOLED // max(1, math.prod(shape)))


def draw(rows, n, m, dtype, basis, with_bias=True, mean=0.0):
    """The arguments of one call and the gradient of its result; ``mean`` is that of x."""
    arguments = {"x": normal(rows, m, dtype=dtype, mean=mean), "weight": normal(n, m - basis, dtype=dtype)}
    if with_bias:
        arguments["bias"] = normal(n, dtype=dtype)
    return arguments, normal(rows, n, dtype=dtype)


def assert_linear(what, calls, basis, given=lambda arguments, grad_output: (arguments, grad_output)):
    """``given`` says in which memory layout the kernel gets the arguments."""
    results = []
    for arguments, grad_output in calls:
        laid_out, grad_laid_out = given(arguments, grad_output)
        actual = evaluate(F.lcw_linear, laid_out, grad_laid_out, basis=basis)
        eager = evaluate(plain_linear, arguments, grad_output, basis=basis)
        results.append((actual, eager, exact_linear(arguments, grad_output, basis)))
    for name in results[0][2]:
        actual, eager, exact = ([result[name] for result in by_kind] for by_kind in zip(*results, strict=True))
        assert actual[0].dtype == calls[0][1].dtype
        assert_by_the_rule(f"{what}: {name}", actual, eager, exact)


def assert_linear_of_every_size(cases, dtype, basis, mean=0.0, more=1):
    """Each of the cases has a "size" (n, m), a number of "rows", and "bias", which is true or false."""
    needs_more_digits(dtype)
    for case in cases:
        (n, m), rows = case["size"], case["rows"]
        # The smallest results are the gradients of a few units or inputs. Without samples there is nothing to judge. In
        # float64 no sum has more digits than the result, so more is left to luck.
        draws = more * count_draws(min(n, m)) * (3 if dtype == torch.float64 and n * m < 20 else 1) if rows else 1
        calls = [draw(rows, n, m, dtype, basis, with_bias=case["bias"], mean=mean) for _ in range(draws)]
        assert_linear(f"M={rows}, n={n}, m={m}, bias: {case['bias']}", calls, basis)


# ---- The result and every gradient ----------------------------------------------------------------------------------

BIAS = [False, True]
# Both sides of rows <= n: with fewer samples than units the constraint acts on x, otherwise on the weight.
OF_LARGE_LAYERS = pairwise(size=LARGE, rows=[8, 600], bias=BIAS)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_layers(dtype, basis):
    assert_linear_of_every_size(pairwise(rows=ROWS, size=SMALL, bias=BIAS), dtype, basis)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size"),
    # 16 bits take long on a processor without instructions for them.
    [*((torch.float32, size) for size in LARGE), *((dtype, size) for dtype in NARROW[1:] for size in LARGE[:2])],
    ids=str,
)
def test_large_layers(dtype, size, basis):
    assert_linear_of_every_size([case for case in OF_LARGE_LAYERS if case["size"] == size], dtype, basis)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
def test_large_layers_in_float64(basis):
    # The layers are small, because numpy multiplies long doubles slowly, without a library.
    sizes = [((37, 256), 2, True), ((37, 256), 33, False), ((37, 64), 300, True)]
    cases = [dict(zip(("size", "rows", "bias"), case, strict=True)) for case in sizes]
    assert_linear_of_every_size(cases, torch.float64, basis)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_far_from_zero(dtype, basis):
    """LCW exists for inputs such as 100 +- 1: their mean must not cost the digits in which they differ.

    The weight's gradient is rounded at the size of 100, and then centred. An ulp of the centred gradient is small
    beside these errors, and a result has few of them, so more draws are needed.
    """
    cases = pairwise(size=[(3, 5), (31, 64), (40, 257)], rows=[1, 8, 30, 100], bias=BIAS)
    assert_linear_of_every_size(cases, dtype, basis, mean=100.0, more=4)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("rows", [1, 20, 24, 25, 200])
@pytest.mark.parametrize("basis", [False, True])
def test_weights_far_from_zero_err_by_what_is_documented(rows, basis):
    """The scale is |w| |x - mean(x)| with the constraint on x, |w - mean(w)| |x| with it on the weight."""
    n, m = 24, 96
    weight, x = normal(n, m - basis, mean=100.0), normal(rows, m)
    exact_x, exact_w = as_exact(x), as_exact(weight)
    on_x, on_weight = exact_adjoint(exact_x, basis), exact_weight(exact_w, basis)
    # The constrained operand is rounded once, and a sum of m products m times. Each mean adds one rounding.
    unit = torch.finfo(torch.float32).eps / 2
    if rows <= n:
        mean = np.abs(exact_x).mean(1, keepdims=True)
        size = (np.abs(on_x) + mean) @ np.abs(exact_w).T
    else:
        # The last entry of a row B v is a sum of m - 1 numbers, rounded like the others and relative to its own size.
        mean = np.abs(exact_w).mean(1, keepdims=True)
        size = np.abs(exact_x) @ (np.abs(on_weight) + mean).T
    error = np.abs(as_exact(F.lcw_linear(x, weight, basis=basis)) - exact_x @ on_weight.T)
    assert (error <= (m + 2) * unit * size).all()


SHAPES = [(1, 1), (7, 5), (3, 129), (5, 3, 4), (4, 3, 3, 5), (2, 3, 2, 2, 3), (64, 32, 3, 3), (300, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_every_rank(dtype, shape):
    needs_more_digits(dtype)
    for basis in (False, True) if len(shape) == 2 else (False,):
        calls = []
        for _ in range(count_draws(*shape)):
            weight = normal(*shape[:1], *((shape[1] - basis,) if basis else shape[1:]), dtype=dtype, mean=3.0)
            grad_output = normal(*shape, dtype=dtype, mean=-2.0)
            actual, eager = (
                evaluate(function, {"weight": weight}, grad_output, basis=basis)
                for function in (F.lcw_weight, plain_weight)
            )
            rows, grad_rows = as_exact(weight).reshape(len(weight), -1), as_exact(grad_output).reshape(len(weight), -1)
            exact = {
                "output": exact_weight(rows, basis).reshape(shape),
                "weight": exact_adjoint(grad_rows, basis).reshape(weight.shape),
            }
            calls.append((actual, eager, exact))
        for name in ("output", "weight"):
            assert calls[0][0][name].dtype == dtype
            assert_by_the_rule(name, *([result[name] for result in by_kind] for by_kind in zip(*calls, strict=True)))


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((6, 5, 3, 3), torch.channels_last), ((6, 5, 2, 3, 3), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_a_channels_last_weight_stays_one(shape, memory_format):
    weight, grad_output = normal(*shape), normal(*shape)
    expected = evaluate(F.lcw_weight, {"weight": weight}, grad_output)
    actual = evaluate(
        F.lcw_weight,
        {"weight": weight.to(memory_format=memory_format)},
        grad_output.to(memory_format=memory_format),
    )
    for name, tensor in actual.items():
        assert tensor.is_contiguous(memory_format=memory_format), name
        # The order of summation in float64 differs. A mean that rounds differently shifts an element by one ulp.
        torch.testing.assert_close(tensor, expected[name], rtol=2**-23, atol=2**-23)


def sums_allowed(weight, constrained, basis):
    """How far a rounded row's sum may be from 0: half an ulp of every entry, plus m roundings of the shift (a mean)."""
    wide = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps / 2
    m, s = constrained.shape[1], math.sqrt(constrained.shape[1])
    shift = weight.double().sum(1).abs() / (s * (s + 1) if basis else m)
    entries = torch.finfo(weight.dtype).eps / 2 * constrained.double().abs()
    # Below the smallest normal number, half an ulp does not shrink any further.
    entries = entries.clamp(min=torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps / 2)
    # In 16 bits a difference is first rounded to float32. Sums of float64 numbers are themselves rounded m times.
    return (
        entries.sum(1) * (1 + 2 * wide)
        + m * wide * (shift + constrained.double().abs().amax(1))
        + (m * torch.finfo(torch.float64).eps * weight.double().abs().sum(1))
    )


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_sum_to_zero_within_rounding(dtype, basis, mean):
    for m in (2, 3, 17, 256, 1000):
        weight = normal(50, m - basis, dtype=dtype, mean=mean)
        constrained = F.lcw_weight(weight, basis)
        assert (constrained.double().sum(1).abs() <= sums_allowed(weight, constrained, basis)).all(), m


@pytest.mark.parametrize("basis", [False, True])
def test_a_constant_added_to_every_input_changes_nothing(basis):
    """Inputs are dyadic and m is a power of two, so sums, means and differences are exact, before and after."""
    n, m, constant = 40, 64, 1024.0
    x = torch.randint(-512, 512, (80, m)) / 64
    weight, bias = normal(n, m - basis), normal(n)
    constrained = F.lcw_weight(weight, basis)
    # The sums of the rows miss 0 by rounding. With and without the constant c, m products of size |x + c| |w| and their
    # sum are rounded. If the constraint acts on x, it rounds differences of size c.
    unit = torch.finfo(torch.float32).eps / 2
    products = (x.abs() + constant) @ constrained.abs().T + (8 + constant) * weight.abs().sum(1)
    slack = constant * sums_allowed(weight, constrained, basis) + 2 * (m + 2) * unit * products
    for rows in (1, 40, 41, 80):
        moved, still = (F.lcw_linear(inputs, weight, bias, basis) for inputs in (x[:rows] + constant, x[:rows]))
        assert ((moved - still).abs() <= slack[:rows]).all()
    # Without the constraint, the same weight changes the result by a thousand times the allowed amount.
    shift = torch.nn.functional.linear(torch.full((m - basis,), constant), weight).abs()
    assert shift.median() > 1000 * slack.median()


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 9])
def test_fan_in_1_gives_the_bias_and_no_gradient(rows, dtype):
    for basis in (False, True):
        arguments, grad_output = draw(rows, 4, 1, dtype, basis)
        result = evaluate(F.lcw_linear, arguments, grad_output, basis=basis)
        assert torch.equal(result["output"], arguments["bias"].expand(rows, 4))
        assert torch.equal(result["x"], torch.zeros_like(arguments["x"]))
        assert torch.equal(result["weight"], torch.zeros_like(arguments["weight"]))
        assert torch.equal(F.lcw_weight(arguments["weight"], basis), torch.zeros(4, 1, dtype=dtype))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("basis", [False, True])
def test_any_number_of_dimensions(shape, basis):
    weight, bias, x = normal(5, 7 - basis), normal(5), normal(*shape, 7)
    result = evaluate(F.lcw_linear, {"x": x, "weight": weight, "bias": bias}, torch.ones(*shape, 5), basis=basis)
    assert result["output"].shape == (*shape, 5)
    expected = evaluate(plain_linear, {"x": x, "weight": weight, "bias": bias}, torch.ones(*shape, 5), basis=basis)
    for name, tensor in result.items():
        # Sums of at most 7 products, or 6 samples, of size below 10.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=7 * 10 * 2**-23)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("rows", [0, 3, 9])
def test_no_units_and_no_inputs(rows):
    x = normal(rows, 3)
    assert F.lcw_linear(x, normal(0, 3), normal(0)).shape == (rows, 0)
    assert F.lcw_linear(x, normal(0, 2), basis=True).shape == (rows, 0)
    assert F.lcw_weight(normal(4, 0)).shape == (4, 0)
    bias = normal(4)
    assert torch.equal(F.lcw_linear(normal(rows, 0), normal(4, 0), bias), bias.expand(rows, 4))


# ---- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [6, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hostile_layouts(dtype, rows, basis):
    """Each argument and the gradient in every layout, one at a time."""
    needs_more_digits(dtype)
    n, m = 16, 21
    for name in ("x", "weight", "bias", "grad_output"):
        for layout in ("sliced", "strided", *(("transposed",) if name != "bias" else ())):

            def given(arguments, grad_output, name=name, layout=layout):
                everything = {**arguments, "grad_output": grad_output}
                everything[name] = hostile_layouts(everything[name])[layout]
                assert name == "bias" or not everything[name].is_contiguous()
                return everything, everything.pop("grad_output")

            # The bias of 16 units has only 16 numbers, so it takes many draws.
            calls = [draw(rows, n, m, dtype, basis) for _ in range(MOST_DRAWS)]
            assert_linear(f"{name} {layout}", calls, basis, given)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [6, 30])
def test_expanded_arguments(rows, basis):
    n, m = 16, 21
    calls = []
    # The results of one draw are all the same number.
    for _ in range(POOLED):
        arguments, _ = draw(1, 1, m, torch.float32, basis)
        expanded = {
            "x": arguments["x"].expand(rows, m),
            "weight": arguments["weight"].expand(n, -1),
            "bias": arguments["bias"].expand(n),
        }
        # .sum() hands back such an expanded gradient.
        calls.append((expanded, torch.ones(()).expand(rows, n)))
    assert_linear("expanded", calls, basis)


@pytest.mark.parametrize("shape", [(7, 5), (5, 3, 4), (4, 3, 3, 5), (2, 3, 2, 2, 3)], ids=str)
def test_weights_in_hostile_layouts(shape):
    weight, grad_output = normal(*shape), normal(*shape)
    expected = evaluate(F.lcw_weight, {"weight": weight}, grad_output)
    layouts, grad_layouts = hostile_layouts(weight), hostile_layouts(grad_output)
    layouts["reversed dimensions"] = (
        weight.permute(*reversed(range(len(shape)))).contiguous().permute(*reversed(range(len(shape))))
    )
    for layout, tensor in layouts.items():
        for grad_layout, gradient in grad_layouts.items():
            actual = evaluate(F.lcw_weight, {"weight": tensor}, gradient)
            for name, result in actual.items():
                assert torch.equal(result, expected[name]), (layout, grad_layout, name)
    repeated = F.lcw_weight(weight[:1].expand(shape))
    assert torch.equal(repeated, F.lcw_weight(weight[:1]).expand(shape))


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(6, 9), (33, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype, rows, n, basis, bad):
    m = 40
    arguments, grad_output = draw(rows, n, m, dtype, basis)
    clean = evaluate(F.lcw_linear, arguments, grad_output, basis=basis)

    def spoilt(name, place):
        changed = {**arguments, "grad_output": grad_output}
        changed[name] = changed[name].clone()
        changed[name][place] = bad
        return evaluate(F.lcw_linear, changed, changed.pop("grad_output"), basis=basis)

    others, other_units = torch.arange(rows) != 3, torch.arange(n) != 4
    from_x, from_weight, from_gradient = spoilt("x", (3, 5)), spoilt("weight", (4, 5)), spoilt("grad_output", (3, 4))
    assert not from_x["output"][3].isfinite().any()
    assert torch.equal(from_x["output"][others], clean["output"][others])
    assert torch.equal(from_x["x"], clean["x"])
    assert not from_weight["output"][:, 4].isfinite().any()
    assert torch.equal(from_weight["output"][:, other_units], clean["output"][:, other_units])
    assert torch.equal(from_weight["weight"], clean["weight"])
    assert not from_gradient["x"][3].isfinite().any()
    assert torch.equal(from_gradient["x"][others], clean["x"][others])
    assert not from_gradient["weight"][4].isfinite().any()
    assert torch.equal(from_gradient["weight"][other_units], clean["weight"][other_units])
    assert torch.equal(from_gradient["bias"][other_units], clean["bias"][other_units])


@pytest.mark.usefixtures("every_multiplier")
@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    n=st.integers(0, 40),
    m=st.integers(1, 70),
    basis=st.booleans(),
    with_bias=st.booleans(),
    dtype=st.sampled_from(NARROW),
    layout=st.sampled_from([None, "sliced", "strided", "transposed"]),
    mean=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_call(rows, n, m, basis, with_bias, dtype, layout, mean, seed):
    torch.manual_seed(seed)

    def given(arguments, grad_output):
        if layout is None:
            return arguments, grad_output
        return (
            {k: hostile_layouts(t).get(layout, t) for k, t in arguments.items()},
            hostile_layouts(grad_output)[layout],
        )

    # If ours and eager both use torch's matmul, the worst error of one product may be three times that of another.
    draws = 3 + count_draws(min(n, m)) if rows else 1
    calls = [draw(rows, n, m, dtype, basis, with_bias, mean) for _ in range(draws)]
    assert_linear("any call", calls, basis, given)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [20, 200])
def test_same_bits_twice(rows, basis):
    arguments, grad_output = draw(rows, 96, 700, torch.float32, basis)
    for count in (1, 2, 3):
        with threads(count):
            first, second = (evaluate(F.lcw_linear, arguments, grad_output, basis=basis) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{name}, {count} threads"


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_has_the_same_bits_however_the_rows_are_dealt_out(dtype, basis):
    weight, grad_output = normal(333, 257 - basis, dtype=dtype), normal(333, 257, dtype=dtype)
    expected = evaluate(F.lcw_weight, {"weight": weight}, grad_output, basis=basis)
    for count in (2, 3, 5):
        with threads(count):
            actual = evaluate(F.lcw_weight, {"weight": weight}, grad_output, basis=basis)
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name]), f"{name}, {count} threads"
    # A row does not depend on its neighbours.
    assert torch.equal(F.lcw_weight(weight[100:103], basis), expected["output"][100:103])


@pytest.mark.usefixtures("every_multiplier")
def test_calls_from_several_threads_at_once():
    weight = normal(400, 300)
    expected, found = F.lcw_weight(weight), []
    callers = [threading.Thread(target=lambda: found.extend(F.lcw_weight(weight) for _ in range(10))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert len(found) == 40
    assert all(torch.equal(tensor, expected) for tensor in found)


@pytest.mark.parametrize("rows", [4, 9])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode, rows):
    x, weight, bias = normal(rows, 6), normal(5, 6).requires_grad_(), normal(5).requires_grad_()
    recorded = F.lcw_linear(x, weight, bias)
    with mode():
        output, saved = saved_tensors(lambda: F.lcw_linear(x, weight, bias))
        constrained, saved_of_weight = saved_tensors(lambda: F.lcw_weight(weight))
    assert (saved, saved_of_weight) == ([], [])
    assert not output.requires_grad
    assert output.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(output, recorded.detach())
    assert torch.equal(constrained, F.lcw_weight(weight).detach())


def test_the_constraint_itself_saves_nothing():
    weight, x = normal(5, 6).requires_grad_(), normal(4, 6).requires_grad_()
    assert saved_tensors(lambda: F.lcw_weight(weight))[1] == []
    # The product saves two tensors: the projected x and the weight.
    assert len(saved_tensors(lambda: F.lcw_linear(x, weight))[1]) == 2


# ---- Autograd, vmap, compile, and autocast --------------------------------------------------------------------------

EPS = torch.finfo(torch.float64).eps
# Sums of at most 40 products below 20, and as many roundings of the mean, in each of two ways.
CLOSE = {"rtol": 0, "atol": 2 * 40 * 20 * EPS}


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [3, 6])
def test_derivatives_are_right_twice(rows, basis):
    arguments = [normal(*shape, dtype=torch.float64).requires_grad_() for shape in ((rows, 5), (4, 5 - basis), (4,))]
    assert torch.autograd.gradcheck(
        lambda x, w, b: F.lcw_linear(x, w, b, basis), arguments, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: F.lcw_linear(x, w, b, basis), arguments, check_fwd_over_rev=True
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "basis"])
def test_derivatives_of_the_weight_are_right_twice(layout):
    weight = normal(3, 2, 2, 2, dtype=torch.float64) if layout != "basis" else normal(3, 4, dtype=torch.float64)
    if layout == "channels last":
        weight = weight.to(memory_format=torch.channels_last)
    weight.requires_grad_()

    def function(weight):
        # The constraint is linear, so a second derivative needs a nonlinear function.
        return F.lcw_weight(weight, layout == "basis").sin()

    assert torch.autograd.gradcheck(function, [weight], check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, [weight], check_fwd_over_rev=True)


@pytest.mark.parametrize("basis", [False, True])
def test_opcheck_of_the_weight(basis):
    for name in ("lcw_weight", "lcw_weight_backward"):
        overload = getattr(torch.ops.lcw_ops, name).cpp
        shapes = [(4, 6), (1, 1), (0, 3)] + ([] if basis else [(4, 3, 2, 2)])
        for shape in shapes:
            torch.library.opcheck(overload, (normal(*shape), basis))
        torch.library.opcheck(overload, (normal(6, 4, dtype=torch.bfloat16).T, basis))


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("basis", [False, True])
def test_opcheck_of_the_layer(basis):
    for rows, n, m, dtype in [(4, 6, 5, torch.float32), (9, 6, 5, torch.bfloat16), (0, 3, 2, torch.float32)]:
        arguments, grad_output = draw(rows, n, m, dtype, basis)
        x, weight, bias = arguments.values()
        torch.library.opcheck(torch.ops.lcw_ops.lcw_linear.cpp, (x, weight, bias, basis, False))
        needs = (True, rows != 4, True)
        backward = torch.ops.lcw_ops.lcw_linear_backward.cpp
        torch.library.opcheck(backward, (grad_output, x, weight, basis, False, *needs))


def test_opcheck_of_the_fingerprint():
    """The result is a number, so there is nothing to trace or to differentiate."""
    torch.library.opcheck(torch.ops.lcw_ops.fingerprint.cpp, (normal(4, 6),), test_utils=("test_schema",))


@pytest.mark.parametrize("basis", [False, True])
def test_compile_with_dynamic_shapes(basis):
    """For all sizes there is one graph for few samples and one for many, forward and backward."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(
        lambda x, weight, bias: F.lcw_linear(x, weight, bias, basis), fullgraph=True, dynamic=True, backend=counted
    )
    for rows, n, m in [(3, 8, 5), (5, 9, 11), (8, 8, 4), (20, 6, 5), (30, 12, 40)]:
        arguments, grad_output = draw(rows, n, m, torch.float64, basis)
        actual, expected = (
            evaluate(function, arguments, grad_output)
            for function in (compiled, lambda basis=basis, **a: F.lcw_linear(**a, basis=basis))
        )
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], **CLOSE)
    assert len(graphs) <= 2


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 3, 3), (6, 5, 2, 3, 3)], ids=str)
def test_compiled_weights(shape):
    compiled = torch.compile(F.lcw_weight, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, grad_output = normal(*shape), normal(*shape)
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), [])]
    for memory_format in formats:
        laid_out = {"weight": weight.to(memory_format=memory_format)}
        actual, expected = (evaluate(function, laid_out, grad_output) for function in (compiled, F.lcw_weight))
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.stride() == expected[name].stride(), name


def test_compiled_activation_shift():
    compiled = torch.compile(F.activation_shift, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 9):
        x, weight = normal(rows, 5, dtype=torch.float64), normal(4, 5, dtype=torch.float64)
        for actual, expected in zip(compiled(x, weight), F.activation_shift(x, weight), strict=True):
            torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("batched", ["x", "weight", "bias", "all"])
def test_vmap_is_a_loop(batched, rows, basis):
    arguments, _ = draw(rows, 5, 7, torch.float64, basis)
    names = list(arguments)
    chosen = names if batched == "all" else [batched]
    # The batch is not the first dimension, to catch a rule that forgets to move it.
    stacked = {
        name: torch.stack([t + k for k in range(4)], dim=1) if name in chosen else t for name, t in arguments.items()
    }
    actual = torch.vmap(
        lambda x, weight, bias: F.lcw_linear(x, weight, bias, basis),
        in_dims=tuple(1 if n in chosen else None for n in names),
    )(*stacked.values())
    for k in range(4):
        expected = plain_linear(*(t + k if n in chosen else t for n, t in arguments.items()), basis)
        torch.testing.assert_close(actual[k], expected, **CLOSE)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize(("rows", "constrained"), [(4, "x"), (6, "weight")])
@pytest.mark.parametrize("features", [2, 7])
def test_under_vmap_the_constraint_acts_on_the_smaller_of_input_and_weight(features, rows, constrained, basis):
    """A projected input and a constrained weight have different rounding errors, see ``lcw_linear``."""
    x, weight = normal(3, rows, features), normal(5, features - basis)
    with OpCalls() as inside:
        torch.vmap(lambda sample: F.lcw_linear(sample, weight, None, basis))(x)
    ((op, _),) = inside.calls
    assert str(op) == {"x": "lcw_ops.lcw_weight_backward.cpp", "weight": "lcw_ops.lcw_weight.cpp"}[constrained]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2), (0, 3)], ids=str)
def test_vmap_over_weights_of_every_rank(shape):
    weights = normal(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(F.lcw_weight)(weights), torch.stack([plain_weight(weight) for weight in weights]), **CLOSE
    )


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)], ids=str)
def test_vmap_within_vmap_over_inner_dimensions(shape):
    """The batch lies between the weight's own dimensions, so none of them is contiguous."""
    weights = normal(5, 2, *shape, dtype=torch.float64)
    moved = weights.movedim(0, 2).movedim(0, -1).contiguous()
    actual = torch.vmap(torch.vmap(F.lcw_weight, in_dims=1), in_dims=-1)(moved)
    assert actual.shape == (2, 5, *shape)
    for i in range(5):
        for j in range(2):
            torch.testing.assert_close(actual[j, i], plain_weight(weights[i, j]), **CLOSE)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("n", [1, 6])
def test_per_sample_gradients(n, basis):
    """In vmap(grad) a call has one sample, whatever the batch. Samples of three rows reach both sides of rows <= n."""
    weight, bias = normal(n, 7 - basis, dtype=torch.float64), normal(n, dtype=torch.float64)

    def loss(weight, bias, sample, linear):
        return linear(sample, weight, bias, basis).sin().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    for x in (normal(8, 7, dtype=torch.float64), normal(8, 3, 7, dtype=torch.float64)):
        actual = torch.vmap(lambda sample: gradient(weight, bias, sample, F.lcw_linear))(x)
        expected = zip(*[gradient(weight, bias, sample, plain_linear) for sample in x], strict=True)
        for ours, plain in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, torch.stack(plain), **CLOSE)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [3, 9])
def test_forward_mode_and_its_compositions(rows, basis):
    arguments, _ = draw(rows, 5, 7, torch.float64, basis)
    primals = tuple(arguments.values())
    tangents = tuple(normal(*t.shape, dtype=torch.float64) for t in primals)

    def ours(*arguments):
        return F.lcw_linear(*arguments, basis).sin()

    def plain(*arguments):
        return plain_linear(*arguments, basis).sin()

    for actual, expected in zip(
        torch.func.jvp(ours, primals, tangents), torch.func.jvp(plain, primals, tangents), strict=True
    ):
        torch.testing.assert_close(actual, expected, **CLOSE)
    for transform in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        for argnum in (0, 1):
            torch.testing.assert_close(
                transform(lambda *a: ours(*a).sum(0), argnum)(*primals),
                transform(lambda *a: plain(*a).sum(0), argnum)(*primals),
                **CLOSE,
            )


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lays_the_constraint_on_the_float32_weight(narrow, rows, basis):
    """If a weight of 100 +- 1 were rounded to bfloat16 first, its rows would be far from a sum of 0."""
    arguments, grad_output = draw(rows, 16, 64, torch.float32, basis)
    arguments["weight"] += 100
    grad_output = grad_output.to(narrow)
    with torch.autocast("cpu", narrow):
        actual, eager = (
            evaluate(function, arguments, grad_output, basis=basis) for function in (F.lcw_linear, plain_linear)
        )
        # The samples have 16 bits, as an earlier layer returns them under autocast, and the parameters 32.
        mixed = F.lcw_linear(arguments["x"].to(narrow), arguments["weight"], arguments["bias"], basis)
    assert actual["output"].dtype == mixed.dtype == narrow
    assert all(actual[name].dtype == torch.float32 for name in arguments)
    # Autocast rounds x on either route, and the result is the same.
    assert torch.equal(mixed, actual["output"])
    exact = exact_linear(arguments, grad_output, basis)
    for name, expected in exact.items():
        # Float32 gradients come out of 16-bit products, so the rule's ulp is that of 16 bits.
        assert_by_the_rule(name, [actual[name].to(narrow)], [eager[name].to(narrow)], [expected])
    with torch.autocast("cpu", narrow):
        assert F.lcw_weight(arguments["weight"], basis).dtype == torch.float32


def test_autocast_takes_16_bit_parameters_too():
    x, weight = normal(4, 6), normal(5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.lcw_linear(x, weight, normal(5)).dtype == torch.bfloat16


# ---- activation_shift -----------------------------------------------------------------------------------------------


def plain_shift(x, weight, bias):
    mu = x.reshape(-1, x.shape[-1]).mean(0)
    shift = torch.nn.functional.linear(mu, weight)
    cosine = shift / (weight.norm(dim=1) * mu.norm())
    return (shift if bias is None else shift + bias), torch.acos(cosine.clamp(-1, 1))


def exact_shift(x, weight, bias):
    mu, w = as_exact(x).reshape(-1, x.shape[-1]), as_exact(weight)
    mu = mu.sum(0) / len(mu)
    shift, lengths = w @ mu, np.sqrt((w * w).sum(1)) * np.sqrt((mu * mu).sum())
    return shift + (0 if bias is None else as_exact(bias)), np.arccos(shift / lengths)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (40, 3), (2, 3, 17), (1000, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_shift(dtype, shape, with_bias):
    needs_more_digits(dtype)
    results = []
    for _ in range(8):
        x, weight = normal(*shape, dtype=dtype, mean=1.0), normal(9, shape[-1], dtype=dtype)
        bias = normal(9, dtype=dtype) if with_bias else None
        results.append([function(x, weight, bias) for function in (F.activation_shift, plain_shift, exact_shift)])
        assert all(tensor.dtype == dtype for tensor in results[-1][0])
    for index, name in enumerate(("shift", "angle")):
        actual, eager, exact = ([result[index] for result in by_kind] for by_kind in zip(*results, strict=True))
        assert_by_the_rule(name, actual, eager, exact)


def test_activation_shift_of_a_constrained_weight_is_the_bias():
    x, weight, bias = torch.full((8, 32), 3.0), F.lcw_weight(normal(5, 32)), normal(5)
    shift, angle = F.activation_shift(x, weight, bias)
    # 32 products below 10 cancel.
    torch.testing.assert_close(shift, bias, rtol=0, atol=32 * 10 * 2**-23)
    # <w, mu> = ||w|| ||mu|| cos(angle): an error of 32 roundings of a product of lengths, relative to these lengths.
    torch.testing.assert_close(angle, torch.full((5,), math.pi / 2), rtol=0, atol=32 * 2**-23)


def test_activation_shift_in_any_layout():
    x, weight, bias = normal(7, 4, 6), normal(5, 6), normal(5)
    expected = F.activation_shift(x, weight, bias)
    for layout in ("sliced", "strided", "transposed"):
        laid_out = (hostile_layouts(tensor).get(layout, tensor) for tensor in (x, weight, bias))
        for actual, wanted in zip(F.activation_shift(*laid_out), expected, strict=True):
            # 28 samples and 6 inputs of size 3 are summed in another order.
            torch.testing.assert_close(actual, wanted, rtol=0, atol=34 * 3 * 2**-23)


def test_activation_shift_derivatives():
    x, weight, bias = (normal(*s, dtype=torch.float64).requires_grad_() for s in ((6, 4), (3, 4), (3,)))
    assert torch.autograd.gradcheck(F.activation_shift, [x, weight, bias], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(F.activation_shift, [x, weight, bias])
    stacked = torch.stack([x.detach(), 2 * x.detach() + 1])
    for actual, expected in zip(
        torch.vmap(F.activation_shift, in_dims=(0, None))(stacked, weight.detach()),
        zip(*[F.activation_shift(sample, weight.detach()) for sample in stacked], strict=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_angles_of_any_length(scale):
    """Squares of such numbers are 0 or infinite in float32."""
    x, weight = normal(6, 5), normal(3, 5)
    _, expected = F.activation_shift(x, weight)
    _, of_lengths = F.activation_shift(x * scale, weight * scale)
    assert torch.allclose(of_lengths, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_gradients_of_the_angle_to_a_zero_weight_are_finite():
    x, weight = normal(6, 3).requires_grad_(), torch.tensor([[0.0, 0, 0], [1, 2, 3]]).requires_grad_()
    sum(part.sum() for part in F.activation_shift(x, weight)).backward()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


# ---- Errors ---------------------------------------------------------------------------------------------------------

ONES = torch.ones


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.lcw_weight(ONES(3, 4, dtype=torch.int64)), TypeError, "lcw_weight: weight is torch.int64; expected"),
        (lambda: F.lcw_weight(ONES(3, 4, dtype=torch.complex64)), TypeError, "lcw_weight: weight is torch.complex64"),
        (lambda: F.lcw_weight([[1.0]]), TypeError, "lcw_weight: weight is a list"),
        (lambda: F.lcw_weight(ONES(3)), ValueError, r"lcw_weight: weight has shape \(3,\); expected \(n, m, \*k\)"),
        (lambda: F.lcw_weight(ONES(())), ValueError, r"lcw_weight: weight has shape \(\)"),
        (lambda: F.lcw_weight(ONES(3, 4, 2), basis=True), ValueError, r"shape \(3, 4, 2\); expected \(n, m-1\)"),
        (lambda: F.lcw_linear(ONES(2, 4), [[1.0]]), TypeError, "lcw_linear: weight is a list"),
        (lambda: F.lcw_linear(ONES(2, 4), ONES(3, 4), [1.0]), TypeError, "lcw_linear: bias is a list"),
        (lambda: F.lcw_linear(ONES(2, 4).long(), ONES(3, 4)), TypeError, "lcw_linear: x is torch.int64"),
        (
            lambda: F.lcw_linear(ONES(2, 4).double(), ONES(3, 4)),
            TypeError,
            "weight is torch.float32; expected torch.fl",
        ),
        (lambda: F.lcw_linear(ONES(2, 4), ONES(3, 4), ONES(3).half()), TypeError, "bias is torch.float16; expected"),
        (lambda: F.lcw_linear(ONES(2, 5), ONES(3, 4)), ValueError, r"x has shape \(2, 5\); expected \(\.\.\., 4\)"),
        (lambda: F.lcw_linear(ONES(2, 4), ONES(3, 4), None, True), ValueError, r"x has shape \(2, 4\).* 5\)"),
        (lambda: F.lcw_linear(ONES(()), ONES(3, 1)), ValueError, r"x has shape \(\)"),
        (lambda: F.lcw_linear(ONES(2, 4), ONES(3, 4, 1)), ValueError, r"weight has shape \(3, 4, 1\); expected \(n, m"),
        (lambda: F.lcw_linear(ONES(2, 4), ONES(3, 4), ONES(4)), ValueError, r"bias has shape \(4,\); expected \(3,\)"),
        (lambda: F.activation_shift([1.0], ONES(3, 4)), TypeError, "activation_shift: x is a list"),
        (lambda: F.activation_shift(ONES(2, 4), ONES(3, 4).half()), TypeError, "activation_shift: weight is torch.fl"),
        (lambda: F.activation_shift(ONES(2, 5), ONES(3, 4)), ValueError, r"activation_shift: x has shape \(2, 5\)"),
        (lambda: F.activation_shift(ONES(2, 4), ONES(4)), ValueError, r"activation_shift: weight has shape \(4,\)"),
        (lambda: F.activation_shift(ONES(2, 4), ONES(3, 4), ONES(2)), ValueError, r"bias has shape \(2,\)"),
        (lambda: F.activation_shift(ONES(0, 4), ONES(3, 4)), ValueError, r"x has shape \(0, 4\); expected at least"),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
    # Autocast checks shapes too. It converts dtypes, so they are not errors there.
    if error is ValueError:
        with torch.autocast("cpu"), pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.lcw_weight(None), "lcw_weight: weight is a NoneType"),
        (lambda: F.lcw_linear([1.0], ONES(3, 4)), "lcw_linear: x is a list"),
        (lambda: F.lcw_linear(None, ONES(3, 4)), "lcw_linear: x is a NoneType"),
        (lambda: F.lcw_linear(ONES(2, 4), None), "lcw_linear: weight is a NoneType"),
        (lambda: F.activation_shift(ONES(2, 4), None), "activation_shift: weight is a NoneType"),
    ],
)
def test_no_tensor_where_one_is_needed(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("call", [lambda: F.lcw_linear(ONES(2, 4), ONES(3, 4)), lambda: F.lcw_weight(ONES(3, 4))])
def test_a_backend_that_cannot_run_says_so(call):
    with lcw_ops.use_backend("cuda"), pytest.raises(lcw_ops.ops.backends.BackendError, match="lcw_weight has no cuda"):
        call()


# ---- Instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_arguments_is_read(flush, dtype):
    """Too wide a vector would touch memory that is not mapped, and the process would end here."""
    for rows, m in [(1, 1), (1, 2), (3, 15), (2, 16), (5, 17), (3, 31), (7, 33), (2, 127), (40, 513)]:
        weight = normal(rows, m, dtype=dtype)
        guarded = between_guards(weight, flush)
        for basis in (False, True):
            assert F.lcw_weight(guarded, basis).isfinite().all()
            assert torch.ops.lcw_ops.lcw_weight_backward.cpp(guarded, basis).isfinite().all()
        assert content.fingerprint(guarded) == content.fingerprint(weight)


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_product_reads_beyond_its_arguments(monkeypatch, flush, dtype):
    monkeypatch.setenv("LCW_OPS_MATMUL", "own")
    backward = torch.ops.lcw_ops.lcw_linear_backward.cpp
    # 24 units fill whole tiles on every instruction set, and such a tile is copied by a loop of its own.
    for rows, n, m in [
        (1, 1, 1),
        (3, 5, 17),
        (8, 24, 64),
        (11, 7, 33),
        (17, 3, 16),
        (65, 7, 31),
        (70, 26, 15),
        (70, 24, 15),
    ]:
        arguments, grad_output = draw(rows, n, m, dtype, False)
        x, weight, bias, grad = (between_guards(t, flush) for t in (*arguments.values(), grad_output))
        assert torch.ops.lcw_ops.lcw_linear.cpp(x, weight, bias, False, False).isfinite().all()
        for gradient in backward(grad, x, weight, False, False, True, True, True):
            assert gradient.isfinite().all()


@pytest.mark.skipif(
    not (os.path.exists("/proc/self/smaps") and os.path.exists("/sys/kernel/mm/transparent_hugepage")),
    reason="needs a system that has large pages and tells which memory asked for them",
)
def test_large_results_ask_for_large_pages():
    """Memory of 6 MB contains at least two whole pages of 2 MB, whose places differ from result to result."""
    page = 2 << 20
    results = [F.lcw_weight(torch.ones(3, page // 4)) for _ in range(4)]
    with open("/proc/self/smaps") as file:
        maps = re.findall(r"^(\w+)-(\w+) .*$(?:\n\w+:.*)*?\nVmFlags:(.*)$", file.read(), re.MULTILINE)
    asking = [(int(begin, 16), int(end, 16)) for begin, end, flags in maps if "hg" in flags.split()]
    for result in results:
        first = -(-result.data_ptr() // page) * page
        last = (result.data_ptr() + result.nbytes) // page * page
        assert sum(max(0, min(last, end) - max(first, begin)) for begin, end in asking) == last - first >= 2 * page


# ---- Fingerprint ----------------------------------------------------------------------------------------------------


def test_the_number_is_the_same_on_every_instruction_set():
    """The fingerprint of given bytes is a constant, because files and other processes may hold it."""
    assert content.fingerprint(torch.arange(100_003, dtype=torch.int32)) == 0x7E11767DC59360FD


# The hash goes through vectors of 128 bytes in blocks of 65,536. No bytes, less than a vector, and sizes around both.
BYTE_COUNTS = [0, 1, 7, 127, 128, 129, 65535, 65536, 65537, 200_001]


def random_bytes(count):
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, 7, 127, 128, 129, 257])
def test_every_value_of_every_byte_counts(count):
    data = random_bytes(count)
    found = {content.fingerprint(data)}
    for place in range(count):
        original = data[place].item()
        for value in range(256):
            if value != original:
                data[place] = value
                found.add(content.fingerprint(data))
        data[place] = original
    # 64 bits: two of at most 65,000 numbers agree by chance with a probability of 1e-10.
    assert len(found) == 1 + 255 * count


@pytest.mark.parametrize("count", [65535, 65536, 65537, 200_001])
def test_every_byte_of_many_counts(count):
    data = random_bytes(count)
    edges = [edge + near for edge in (0, 128, 65408, 65536, 131072, count) for near in range(-5, 5)]
    places = {place for place in edges if 0 <= place < count} | set(torch.randint(count, (500,)).tolist())
    found = {content.fingerprint(data)}
    for place in places:
        for bit in (1, 128):
            data[place] ^= bit
            found.add(content.fingerprint(data))
            data[place] ^= bit
    assert len(found) == 1 + 2 * len(places)


def test_the_number_of_bytes_counts():
    """Zeros fill up the last vector, so the fingerprint must depend on how many bytes there were."""
    found = {content.fingerprint(torch.zeros(count, dtype=torch.uint8)) for count in range(300)}
    found |= {content.fingerprint(torch.zeros(count, dtype=torch.uint8)) for count in BYTE_COUNTS if count >= 300}
    assert len(found) == 300 + sum(count >= 300 for count in BYTE_COUNTS)


EDITS = {
    "negated": torch.neg,
    "absolute": torch.abs,
    "doubled": lambda w: w * 2,
    "halved": lambda w: w / 2,
    "decayed": lambda w: w * (1 - 1e-6),
    "moved": lambda w: w + 1,
    "one ulp up": lambda w: torch.nextafter(w, torch.tensor(math.inf)),
    "sorted": lambda w: w.flatten().sort().values.view(w.shape),
    "reversed": lambda w: w.flip(0, 1),
    "rows reversed": lambda w: w.flip(0),
    "rows rolled": lambda w: w.roll(1, 0),
    "columns rolled": lambda w: w.roll(1, 1),
    # A vector has 32 floats, one in each lane; a block has 16,384.
    "vectors rolled": lambda w: w.flatten().roll(32).view(w.shape),
    "blocks rolled": lambda w: w.flatten().roll(16384).view(w.shape),
    "two vectors swapped": lambda w: torch.cat([w.flatten()[32:64], w.flatten()[:32], w.flatten()[64:]]).view(w.shape),
    "two elements swapped": lambda w: w.flatten()[[1, 0, *range(2, w.numel())]].view(w.shape),
    "two in one lane swapped": lambda w: w.flatten()[[32, *range(1, 32), 0, *range(33, w.numel())]].view(w.shape),
    "transposed": lambda w: w.T.contiguous().view(w.shape),
    "signs of two flipped": lambda w: w * torch.where(torch.arange(w.numel()) < 2, -1.0, 1.0).view(w.shape),
    "signs of a lane flipped": lambda w: w * torch.where(torch.arange(w.numel()) % 32 == 5, -1.0, 1.0).view(w.shape),
    "signs alternated": lambda w: w * torch.where(torch.arange(w.numel()) % 2 == 0, -1.0, 1.0).view(w.shape),
    "signs of every other vector": lambda w: (
        w * torch.where(torch.arange(w.numel()) // 32 % 2 == 0, -1.0, 1.0).view(w.shape)
    ),
    "zeroed": torch.zeros_like,
    "ones": torch.ones_like,
    "minus zeros": lambda w: -torch.zeros_like(w),
    "low bits": lambda w: (w.view(torch.int32) ^ 1).view(torch.float32),
    "all bits": lambda w: (~w.view(torch.int32)).view(torch.float32),
}


@pytest.mark.parametrize("shape", [(8, 8), (64, 96), (200, 257)], ids=str)
def test_edits_of_the_whole_change_the_fingerprint(shape):
    weight = normal(*shape)
    found = {"as it was": content.fingerprint(weight)}
    contents = {"as it was": weight}
    for name, edit in EDITS.items():
        edited = edit(weight)
        # On a small weight, some edits change nothing or equal another edit.
        same = [n for n, c in contents.items() if torch.equal(c.view(torch.int32), edited.view(torch.int32))]
        if same:
            assert content.fingerprint(edited) == found[same[0]]
        else:
            contents[name], found[name] = edited, content.fingerprint(edited)
    assert len(set(found.values())) == len(found)
    assert len(found) > 20


def test_edits_of_two_words_change_the_fingerprint():
    """The pairs lie in one or two lanes and blocks. Each word changes by one bit, so that changes might cancel."""
    words = torch.randint(-(2**31), 2**31 - 1, (40_000,), dtype=torch.int32)
    found, edits = {content.fingerprint(words)}, 0
    for distance in (1, 2, 31, 32, 33, 64, 16384, 16384 + 32):
        for first in (0, 5, 1000):
            for bit in (0, 12, 13, 18, 19, 30, 31):
                for other in (0, 12, 13, 18, 19, 30, 31):
                    pair = torch.tensor([first, first + distance])
                    flips = torch.tensor([1 << bit if bit < 31 else -(2**31), 1 << other if other < 31 else -(2**31)])
                    words[pair] ^= flips.int()
                    found.add(content.fingerprint(words))
                    words[pair] ^= flips.int()
                    edits += 1
    assert len(found) == 1 + edits


def test_random_edits_change_the_fingerprint():
    data = random_bytes(5000)
    found = {content.fingerprint(data)}
    for _ in range(3000):
        data[torch.randint(5000, (torch.randint(1, 50, ()).item(),))] += torch.randint(1, 256, ()).to(torch.uint8)
        found.add(content.fingerprint(data))
    # One edit may undo another, but hardly ever does.
    assert len(found) > 2995


@pytest.mark.parametrize("count", [*BYTE_COUNTS, 1_000_003])
def test_the_fingerprint_depends_on_the_bytes_only(count):
    """Threads, address, and memory behind the last byte do not change the fingerprint."""
    data = random_bytes(count)
    expected = content.fingerprint(data)
    for thread_count in (1, 2, 3, 8):
        with threads(thread_count):
            assert content.fingerprint(data) == expected
    for offset in range(1, 9):
        surroundings = random_bytes(count + 20)
        surroundings[offset : offset + count] = data
        assert content.fingerprint(surroundings[offset : offset + count]) == expected
    if count % 2 == 0 and count:
        assert content.fingerprint(data.view(torch.bfloat16)) == expected
        assert content.fingerprint(data.view(2, -1)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_of_any_dtype_counts(dtype):
    weight = normal(300, 70, dtype=dtype)
    before = content.fingerprint(weight)
    with torch.no_grad():
        weight[123, 45] = torch.nextafter(weight[123, 45].float(), torch.tensor(9.0)).to(dtype) + weight[0, 0]
    assert content.fingerprint(weight) != before
    zero = torch.zeros(5, dtype=dtype)
    assert content.fingerprint(zero) != content.fingerprint(-zero)


def test_a_tensor_without_bytes_to_read_has_no_fingerprint():
    class Labelled(torch.Tensor):
        pass

    assert content.can_be_taken(torch.ones(3, 4))
    assert content.can_be_taken(torch.nn.Parameter(torch.ones(3, 4)))
    assert not content.can_be_taken(torch.ones(3, 4).T)
    assert not content.can_be_taken(torch.ones(3, 4, device="meta"))
    assert not content.can_be_taken(torch.ones(3, 4).as_subclass(Labelled))
    asked = []
    torch.vmap(lambda row: asked.append(content.can_be_taken(row)) or row)(torch.ones(3, 4))
    assert asked == [False]
    with pytest.raises(RuntimeError, match="not contiguous"):
        content.fingerprint(torch.ones(3, 4).T)


# ---- Regressions -----------------------------------------------------------------------------------------------------


def test_activation_shift_is_not_rounded_by_autocast():
    x, weight = torch.randn(50, 30), torch.randn(7, 30)
    expected = F.activation_shift(x, weight)
    with torch.autocast("cpu"):
        actual = F.activation_shift(x, weight)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("elsewhere", ["x", "weight", "bias"])
def test_tensors_on_different_devices(elsewhere):
    """Such tensors are refused: a fake kernel would return memory that was never written."""
    arguments = {"x": torch.randn(5, 4), "weight": torch.randn(3, 4), "bias": torch.randn(3)}
    arguments[elsewhere] = arguments[elsewhere].to("meta")
    for call in (F.lcw_linear, F.activation_shift):
        with pytest.raises(TypeError, match="Move one of the two"):
            call(**arguments)
    with pytest.raises(TypeError, match="Move one"), torch.autocast("cpu"):
        F.lcw_linear(**arguments)


@pytest.mark.parametrize("rows", [3, 30])
def test_forward_mode_under_no_grad(rows):
    x, tangent, weight = torch.randn(rows, 6), torch.randn(rows, 6), torch.randn(4, 6)
    with torch.no_grad(), forward_ad.dual_level():
        output = F.lcw_linear(forward_ad.make_dual(x, tangent), weight)
        actual = forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(actual, F.lcw_linear(tangent, weight))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(3, 6, 2, 3, 3), (3, 6, 2, 3, 3, 2)])
def test_vmap_over_any_dimension_of_filters(in_dim, shape):
    weight = torch.randn(shape)
    expected = torch.stack([F.lcw_weight(one) for one in weight.unbind(in_dim)])
    torch.testing.assert_close(torch.vmap(F.lcw_weight, in_dims=in_dim)(weight), expected)


def test_forward_over_reverse_without_a_graph():
    """The backward pass passes tangents on."""
    x, weight = normal(5, 6, dtype=torch.float64).requires_grad_(), normal(4, 6, dtype=torch.float64).requires_grad_()
    tangent = normal(5, 6, dtype=torch.float64)
    found = []
    for layer in (F.lcw_linear, plain_linear):
        with forward_ad.dual_level():
            output = layer(forward_ad.make_dual(x, tangent), weight)
            gradients = torch.autograd.grad((output**3).sum(), (x, weight))
            found.append([forward_ad.unpack_dual(gradient).tangent for gradient in gradients])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("every_multiplier")
def test_backward_under_autocast_has_the_precision_of_forward():
    arguments, grad_output = draw(40, 30, 20, torch.float32, False)
    expected = evaluate(F.lcw_linear, arguments, grad_output)
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    output = F.lcw_linear(**leaves)
    with torch.autocast("cpu"):
        gradients = torch.autograd.grad(output, leaves.values(), grad_output)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((4, 5), (2, 3), None),
        ((4, 5), (2, 5), (7,)),
        ((4, 5), (2, 5, 1), None),
        ((), (2, 5), None),
    ],
    ids=str,
)
def test_fake_tensors_are_checked_too(x, weight, bias):
    with FakeTensorMode(), pytest.raises(ValueError, match="lcw_linear: "):
        F.lcw_linear(torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
def test_other_dtypes_are_refused(shape, dtype):
    with pytest.raises(TypeError, match="expected float64, float32, bfloat16 or float16"):
        F.lcw_linear(torch.ones(shape, dtype=dtype), torch.ones(2, 3, dtype=dtype))


def test_sparse_and_nested_tensors_are_refused():
    for sparse in (ONES(4, 3).to_sparse(), ONES(4, 3).to_sparse_csr()):
        for arguments in ((sparse, ONES(2, 3)), (ONES(2, 3), sparse), (ONES(2, 3), ONES(4, 3), sparse)):
            with pytest.raises(TypeError, match="is sparse_"):
                F.lcw_linear(*arguments)
        with pytest.raises(TypeError, match="weight is sparse_"):
            F.lcw_weight(sparse)
    nested = torch.nested.nested_tensor([ONES(2, 3), ONES(1, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="x is a nested tensor; expected a dense tensor"):
        F.lcw_linear(nested, ONES(2, 3))


def test_a_basis_is_true_or_false():
    with pytest.raises(TypeError, match="basis is a str"):
        F.lcw_linear(ONES(4, 3), ONES(2, 3), basis="x")
