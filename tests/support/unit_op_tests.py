"""Tests that the ops of GmP and of weight norm share, on the compiled CPU kernels.

Each stem's file of tests imports all of them, and pytest collects them there, under that file's own name. ``STEM`` of
the file says which functions they test.

The rule of all backends holds: the error against the exact result is at most twice that of plain eager torch in the
same dtype, plus one ulp of the result's scale. The exact result comes from the formulas in numpy: in float64, and for
float64 in its 80-bit long double. Results of few numbers are judged over several draws, to leave less to luck. Angles
are those of Gaussian rows, uniform on the sphere, unless a test says otherwise. M samples meet n units of m inputs; up
to FUSED samples, a layer makes its weight inside the product.
"""

import itertools
import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import lcw_ops
from lcw_ops import reference
from support.guards import between_guards
from support.numerics import (
    assert_by_the_rule,
    evaluate,
    hostile_layouts,
    needs_more_digits,
    saved_tensors,
    threads,
)
from support.pairwise import pairwise
from support.unit_ops import (
    DTYPES,
    EPS,
    FUSED,
    NARROW,
    OPS,
    ROWS,
    SIZES,
    WIDE,
    assert_op,
    count_draws,
    for_multiplier,
    normal,
)


def pytest_generate_tests(metafunc):
    """Give a test's argument ``layer``, ``row_op`` or ``op`` each function of the file's STEM."""
    stem = metafunc.module.STEM
    for argument, table in (("layer", stem.layers), ("row_op", stem.row_ops), ("op", stem.row_ops | stem.layers)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, table.values(), ids=table)


@pytest.fixture
def stem(request):
    """The functions of the file that imports the test."""
    return request.module.STEM


@pytest.fixture
def compiled_kernel():
    with lcw_ops.use_backend("cpp"):
        yield


# ---- The result and every gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_of_rows(dtype, row_op):
    needs_more_digits(dtype)
    for n, m in [(0, 5), (0, 1), *SIZES, (200, 33), *WIDE]:
        # The scale's gradient has one number per row.
        calls = [row_op.draw(n, m, dtype) for _ in range(1 + count_draws(n))]
        assert_op(f"n={n}, m={m}", row_op, calls)


# Every size with every number of samples, in one of the dtypes.
SIZES_AND_ROWS = pairwise(rows=ROWS, size=SIZES, dtype=DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers(dtype, layer, every_multiplier):
    needs_more_digits(dtype)
    cases = [(*case["size"], case["rows"]) for case in SIZES_AND_ROWS if case["dtype"] == dtype]
    # One size runs with all numbers of samples.
    cases += [case for case in ((13, 17, rows) for rows in ROWS) if case not in cases]
    for n, m, rows in cases:
        if rows not in for_multiplier(every_multiplier, ROWS):
            continue
        # Without samples there is nothing to judge. The worst error of one product may be three times that of another,
        # so several are judged together. In float64 no sum has more digits than the result: more is left to luck.
        draws = (6 + count_draws(min(n, m))) * (2 if dtype == torch.float64 and n * m < 100 else 1) if rows else 1
        assert_op(f"M={rows}, n={n}, m={m}", layer, [layer.draw(n, m, dtype, rows) for _ in range(draws)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_wide_layers(dtype, layer, every_multiplier):
    needs_more_digits(dtype)
    for (n, m), all_rows in zip(WIDE, ((1, FUSED, FUSED + 1), (8,)), strict=True):
        for rows in for_multiplier(every_multiplier, all_rows):
            assert_op(f"M={rows}, n={n}, m={m}", layer, [layer.draw(n, m, dtype, rows) for _ in range(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_layers(dtype, layer, every_multiplier):
    for rows in for_multiplier(every_multiplier, (8, FUSED, 200)):
        assert_op(f"M={rows}", layer, [layer.draw(300, 257, dtype, rows)])


def test_every_combination_of_gradients(layer, every_multiplier):
    """The gradients that are asked for decide which tensors are kept and which path computes them."""
    for rows in for_multiplier(every_multiplier, (5, FUSED + 8)):
        assert_combinations(layer, rows)


def assert_combinations(layer, rows):
    calls = [layer.draw(9, 16, torch.float32, rows) for _ in range(4)]
    exact = [layer.exact(*call) for call in calls]
    eager = [evaluate(layer.plain, *call) for call in calls]
    names = list(calls[0][0])
    for needed in itertools.chain(*(itertools.combinations(names, count) for count in range(1, len(names) + 1))):
        found = []
        for arguments, grad_output in calls:
            leaves = {name: tensor.detach().requires_grad_(name in needed) for name, tensor in arguments.items()}
            output = layer.ours(**leaves)
            output.backward(grad_output)
            assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needed)
            found.append({"output": output.detach(), **{name: leaves[name].grad for name in needed}})
        for name in ("output", *needed):
            assert_by_the_rule(
                f"{needed}: {name}", *([result[name] for result in results] for results in (found, eager, exact))
            )


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (), (4,), (2, 3), (2, 1, 3), (3, 20)], ids=str)
def test_any_number_of_dimensions(shape, layer):
    arguments, grad_output = layer.draw(5, 7, torch.float32, math.prod(shape))
    expected = evaluate(layer.plain, arguments, grad_output)
    arguments["x"] = arguments["x"].view(*shape, 7)
    actual = evaluate(layer.ours, arguments, grad_output.view(*shape, 5))
    assert actual["output"].shape == (*shape, 5)
    assert actual["x"].shape == (*shape, 7)
    for name, tensor in actual.items():
        # Sums of at most 60 products below 20.
        torch.testing.assert_close(tensor.view_as(expected[name]), expected[name], rtol=0, atol=60 * 20 * 2**-23)


@pytest.mark.usefixtures("every_multiplier")
def test_no_units_and_no_samples(layer):
    for n, m, rows in [(0, 5, 3), (0, 1, 3), (0, 5, 40), (4, 5, 0), (4, 1, 0), (0, 5, 0), (0, 1, 0)]:
        arguments, grad_output = layer.draw(n, m, torch.float32, rows)
        result = evaluate(layer.ours, arguments, grad_output)
        assert result["output"].shape == (rows, n)
        for name, tensor in arguments.items():
            # The sums have no terms.
            assert torch.equal(result[name], torch.zeros_like(tensor)), (name, n, m, rows)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hostile_layouts(dtype, layer, every_multiplier):
    """Each argument and the gradient in every layout, one at a time."""
    n, m = 16, 21
    for rows in for_multiplier(every_multiplier, (6, FUSED + 5)):
        calls = [layer.draw(n, m, dtype, rows) for _ in range(4)]
        for name in (*calls[0][0], "grad_output"):
            dimensions = {**calls[0][0], "grad_output": calls[0][1]}[name].dim()
            for layout in ("sliced", "strided", "transposed")[: 1 + dimensions]:

                def given(arguments, grad_output, name=name, layout=layout):
                    everything = {**arguments, "grad_output": grad_output}
                    everything[name] = hostile_layouts(everything[name])[layout]
                    return everything, everything.pop("grad_output")

                assert_op(f"{name} {layout}, M={rows}", layer, calls, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_hostile_layouts(dtype, row_op):
    arguments, grad_output = row_op.draw(9, 21, dtype)
    expected = evaluate(row_op.ours, arguments, grad_output)
    everything = {**arguments, "grad_output": grad_output}
    for name, tensor in everything.items():
        for layout, laid_out in hostile_layouts(tensor).items():
            changed = everything | {name: laid_out}
            actual = evaluate(row_op.ours, changed, changed.pop("grad_output"))
            for result, value in actual.items():
                assert torch.equal(value, expected[result]), (name, layout, result)


@pytest.mark.usefixtures("every_multiplier")
def test_expanded_arguments(layer):
    """Strides are 0 in every argument, and in the gradient that .sum() hands back."""
    for rows in (6, FUSED + 5):
        arguments, _ = layer.draw(1, 21, torch.float32, 1)
        expanded = {
            name: tensor.expand(rows if name == "x" else 16, *tensor.shape[1:]) for name, tensor in arguments.items()
        }
        actual = evaluate(layer.ours, expanded, torch.ones(()).expand(rows, 16))
        copies = {name: tensor.contiguous() for name, tensor in expanded.items()}
        expected = evaluate(layer.ours, copies, torch.ones(rows, 16))
        for name, tensor in actual.items():
            # Sums of at most 37 products below 20; the order may follow the layout.
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=37 * 20 * 2**-23)


def test_expanded_rows(row_op):
    arguments, _ = row_op.draw(1, 21, torch.float32)
    expanded = {name: tensor.expand(7, *tensor.shape[1:]) for name, tensor in arguments.items()}
    actual = evaluate(row_op.ours, expanded, torch.ones(()).expand(7, 21))
    expected = evaluate(row_op.ours, arguments, torch.ones(1, 21))
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name].expand_as(tensor)), name


def assert_arguments_are_left_as_they_were(layer):
    """tests/test_contract.py checks the other functions."""
    arguments, grad_output = layer.draw(8, 6, torch.float32, 5)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    evaluate(layer.ours, arguments, grad_output)
    for name, tensor in arguments.items():
        assert torch.equal(tensor, before[name])
        assert tensor._version == 0


def test_an_argument_changed_before_backward_is_noticed(op):
    arguments, grad_output = op.draw(8, 6, torch.float32, 5)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    changed = {name: leaf.clone() for name, leaf in leaves.items()}
    output = op.ours(**changed)
    next(iter(changed.values())).data.add_(0)
    with torch.no_grad():
        next(iter(changed.values())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(grad_output)


@pytest.mark.usefixtures("every_multiplier")
@settings(derandomize=True, deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    n=st.integers(0, 40),
    m=st.integers(1, 70),
    dtype=st.sampled_from(NARROW),
    layout=st.sampled_from([None, "sliced", "strided", "transposed"]),
    seed=st.integers(0, 2**31),
)
def test_any_call(layer, rows, n, m, dtype, layout, seed):
    torch.manual_seed(seed)

    def given(arguments, grad_output):
        if layout is None:
            return arguments, grad_output
        return (
            {name: hostile_layouts(tensor).get(layout, tensor) for name, tensor in arguments.items()},
            hostile_layouts(grad_output)[layout],
        )

    # If ours and eager both use torch's matmul, the worst error of one product may be three times that of another.
    draws = 3 + count_draws(min(n, m)) if rows else 1
    assert_op("any call", layer, [layer.draw(n, m, dtype, rows) for _ in range(draws)], given)


def test_same_bits_twice_under_load(stem):
    """The bits are the same for every number of threads, also while another thread computes products."""
    calls = [(op, op.draw(96, 300, torch.float32, rows)) for op in stem.layers.values() for rows in (20, 100)]
    calls += [(op, op.draw(300, 300, torch.float32)) for op in stem.row_ops.values()]
    busy = threading.Event()

    def load():
        while not busy.is_set():
            torch.randn(150, 150) @ torch.randn(150, 150)

    beside = threading.Thread(target=load)
    for count in (1, 2, 3):
        with threads(count):
            first = [evaluate(op.ours, *call) for op, call in calls]
            if count == 2:
                beside.start()
            second = [evaluate(op.ours, *call) for op, call in calls]
        for one, other in zip(first, second, strict=True):
            for name, tensor in one.items():
                assert torch.equal(tensor, other[name]), f"{name}, {count} threads"
    busy.set()
    beside.join()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_have_the_same_bits_however_they_are_dealt_out(dtype, row_op):
    arguments, grad_output = row_op.draw(333, 257, dtype)
    expected = evaluate(row_op.ours, arguments, grad_output)
    for count in (2, 3, 5):
        with threads(count):
            actual = evaluate(row_op.ours, arguments, grad_output)
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name]), f"{name}, {count} threads"
    # A row does not depend on its neighbours.
    some = {name: tensor[100:103] for name, tensor in arguments.items()}
    for name, tensor in evaluate(row_op.ours, some, grad_output[100:103]).items():
        assert torch.equal(tensor, expected[name][100:103]), name


def test_calls_from_several_threads_at_once(layer):
    arguments, grad_output = layer.draw(64, 100, torch.float32, 20)
    expected, found = evaluate(layer.ours, arguments, grad_output), []

    def call():
        for _ in range(10):
            result = evaluate(layer.ours, arguments, grad_output)
            found.append(all(torch.equal(result[name], expected[name]) for name in expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert found == [True] * 40


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode, op):
    for rows in (4, FUSED + 1):
        arguments, _ = op.draw(5, 6, torch.float32, rows)
        leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
        recorded = op.ours(**leaves)
        with mode():
            output, saved = saved_tensors(lambda op=op, leaves=leaves: op.ours(**leaves))
        assert saved == []
        assert not output.requires_grad
        assert output.is_inference() == (mode is torch.inference_mode)
        # The choice of the matmul may depend on the gradients that are needed later.
        torch.testing.assert_close(output, recorded.detach())


def test_a_function_of_rows_keeps_its_arguments_only(row_op):
    arguments, _ = row_op.draw(5, 6, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    _, saved = saved_tensors(lambda: row_op.ours(**leaves))
    assert {tensor.data_ptr() for tensor in saved} == {leaf.data_ptr() for leaf in leaves.values()}


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


def assert_bad_values_stay_in_their_row(layer, bad):
    n, m = 9, 40
    of_unit = {"angles", "radius", "location", "weight", "scale", "bias"}
    for rows, dtype in itertools.product((6, FUSED + 8), (torch.float32, torch.bfloat16)):
        arguments, grad_output = layer.draw(n, m, dtype, rows)
        clean = evaluate(layer.ours, arguments, grad_output)

        def spoilt(name, place, arguments=arguments, grad_output=grad_output):
            changed = {**arguments, "grad_output": grad_output}
            changed[name] = changed[name].clone()
            changed[name][place] = bad
            return evaluate(layer.ours, changed, changed.pop("grad_output"))

        samples, units = torch.arange(rows) != 3, torch.arange(n) != 4
        result = spoilt("x", (3, 5))
        assert not result["output"][3].isfinite().any()
        assert torch.equal(result["output"][samples], clean["output"][samples])
        assert torch.equal(result["x"][samples], clean["x"][samples])
        for name in of_unit & set(arguments):
            result = spoilt(name, (4, 5) if arguments[name].dim() == 2 else 4)
            assert not result["output"][:, 4].isfinite().any(), name
            assert torch.equal(result["output"][:, units], clean["output"][:, units]), name
            for other in of_unit & set(arguments):
                assert torch.equal(result[other][units], clean[other][units]), (name, other)
        result = spoilt("grad_output", (3, 4))
        assert torch.equal(result["output"], clean["output"])
        assert torch.equal(result["x"][samples], clean["x"][samples])
        for other in of_unit & set(arguments):
            assert torch.equal(result[other][units], clean[other][units]), other
        # With relu the entry may have no effect, because the unit may not fire for this sample.
        if layer is not OPS["gmp relu"]:
            assert not result["x"][3].isfinite().any()
            for other in of_unit & set(arguments):
                assert not result[other][4].isfinite().any(), other


def test_a_bad_gradient_spoils_its_own_row_only(row_op):
    arguments, grad_output = row_op.draw(3, 21, torch.float32)
    clean = evaluate(row_op.ours, arguments, grad_output)
    grad_output[1, 7] = math.nan
    spoilt = evaluate(row_op.ours, arguments, grad_output)
    for name in arguments:
        assert torch.equal(spoilt[name][[0, 2]], clean[name][[0, 2]]), name
        assert spoilt[name][1].isnan().any(), name


# ---- Autograd, vmap, compile, and autocast ---------------------------------------------------------------------------


# Two ways to compute sums of at most 80 products below 20, with third derivatives below 100 and as many roundings.
CLOSE = {"rtol": 1e-12, "atol": 2 * 80 * 20 * EPS}


def off_the_kink(op, n, m, rows):
    """Float64 arguments. Their pre-activations are not near 0, where differences would straddle relu's corner."""
    while True:
        arguments, grad_output = op.draw(n, m, torch.float64, rows)
        if op is not OPS["gmp relu"]:
            return arguments, grad_output
        values = {name: tensor.clone() for name, tensor in arguments.items() if name != "radius"}
        z = reference.gmp_linear(radius=torch.ones(n).double(), **values)
        # Samples near the corner are moved at random. If some are still near it, all are drawn again.
        near = (z.abs() < 0.02).any(1)
        if not near.any():
            return arguments, grad_output
        arguments["x"][near] += normal(int(near.sum()), m, dtype=torch.float64)
        z = reference.gmp_linear(arguments["x"], arguments["angles"], torch.ones(n).double(), arguments["location"])
        if (z.abs() >= 0.02).all():
            return arguments, grad_output


@pytest.mark.usefixtures("every_multiplier")
def test_derivatives_are_right_twice(op):
    arguments, _ = off_the_kink(op, 2, 4, 3)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(op.ours, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(op.ours, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.usefixtures("every_multiplier")
def test_derivatives_of_many_samples_are_right_twice(layer):
    arguments, _ = off_the_kink(layer, 3, 5, FUSED + 2)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(layer.ours, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer.ours, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_third_derivatives(op):
    arguments, _ = off_the_kink(op, 3, 5, 4)
    found = []
    for function in (op.ours, op.plain):
        leaves = [tensor.clone().requires_grad_() for tensor in arguments.values()]
        value = function(*leaves).sin().sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(gradient.square().sum() for gradient in gradients)
        found.append([gradient.detach() for gradient in gradients])
    for ours, plain in zip(*found, strict=True):
        # The sums have thousands of products.
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item())


def test_functorch_transforms(op):
    for rows in (3, FUSED + 1):
        arguments, _ = off_the_kink(op, 3, 4, rows)
        primals = tuple(arguments.values())
        tangents = tuple(normal(*tensor.shape, dtype=torch.float64) for tensor in primals)
        wanted = tuple(range(len(primals)))

        def every_transform(function, primals=primals, tangents=tangents, wanted=wanted):
            def loss(*values):
                return function(*values).sin().sum()

            def sums(*values):
                return function(*values).sin().sum(0)

            yield torch.func.jvp(function, primals, tangents)
            yield torch.func.vjp(function, *primals)[1](function(*primals))
            yield torch.func.grad(loss, wanted)(*primals)
            yield torch.func.jacrev(sums, wanted)(*primals)
            yield torch.func.jacfwd(sums, wanted)(*primals)
            # Second derivatives: forward over reverse, and reverse over reverse.
            yield torch.func.jvp(torch.func.grad(loss, wanted), primals, tangents)
            if len(primals[0]) < 10:
                yield torch.func.hessian(loss, wanted)(*primals)
                yield torch.func.jacrev(torch.func.grad(loss, wanted), wanted)(*primals)

        for ours, plain in zip(every_transform(op.ours), every_transform(op.plain), strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)


def test_forward_mode(op):
    """Forward mode takes duals, gradients of duals, and a graph that was recorded before."""
    for rows in (3, FUSED + 1):
        arguments, grad_output = off_the_kink(op, 3, 5, rows)
        tangents = {name: normal(*tensor.shape, dtype=torch.float64) for name, tensor in arguments.items()}
        grad_tangent = normal(*grad_output.shape, dtype=torch.float64)
        found = []
        for function in (op.ours, op.plain):
            results = []
            with torch.no_grad(), forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(tensor, tangents[name]) for name, tensor in arguments.items()}
                results += forward_ad.unpack_dual(function(**duals))
                # Only one argument has a tangent.
                for name in arguments:
                    results += forward_ad.unpack_dual(function(**{**arguments, name: duals[name]}))
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
            with forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
                gradients = torch.autograd.grad(function(**duals), leaves.values(), grad_output)
                results += [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
            output = function(**leaves)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(grad_output, grad_tangent)
                gradients = torch.autograd.grad(output, leaves.values(), dual)
                for gradient in gradients:
                    results += forward_ad.unpack_dual(gradient)
            found.append(results)
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)


def test_vmap_is_a_loop(op, stem):
    """vmap runs over each argument alone and over all, along every dimension, and over the gradients too."""
    for rows in (3, FUSED + 1) if op in stem.layers.values() else (0,):
        arguments, grad_output = op.draw(5, 7, torch.float64, rows)
        names = list(arguments)

        def gradients(*values, op=op, grad_output=grad_output):
            return torch.func.vjp(op.ours, *values)[1](grad_output)

        for chosen in [*([name] for name in names), names]:
            dims = [min(dim, arguments[name].dim()) if name in chosen else None for name in names for dim in (2,)]
            for in_dims in (
                dims,
                [None if dim is None else 0 for dim in dims],
                [None if d is None else 1 for d in dims],
            ):
                stacked = [
                    arguments[name] if dim is None else torch.stack([arguments[name] + k for k in range(3)], dim)
                    for name, dim in zip(names, in_dims, strict=True)
                ]
                actual = torch.vmap(op.ours, in_dims=tuple(in_dims))(*stacked)
                backward = torch.vmap(gradients, in_dims=tuple(in_dims))(*stacked)
                for k in range(3):
                    values = {name: tensor + k * (name in chosen) for name, tensor in arguments.items()}
                    expected = evaluate(op.plain, values, grad_output)
                    torch.testing.assert_close(actual[k], expected["output"], **CLOSE)
                    for name, gradient in zip(names, backward, strict=True):
                        torch.testing.assert_close(gradient[k], expected[name], **CLOSE)


def test_vmap_within_vmap_and_over_nothing(op):
    arguments, _ = op.draw(4, 5, torch.float64, 3)
    stacked = [tensor + normal(2, 6, *[1] * tensor.dim(), dtype=torch.float64) for tensor in arguments.values()]
    last = [tensor.movedim(0, -1) for tensor in stacked]
    actual = torch.vmap(torch.vmap(op.ours), in_dims=-1)(*last)
    for i, j in itertools.product(range(2), range(6)):
        torch.testing.assert_close(actual[i, j], op.plain(*(tensor[i, j] for tensor in stacked)), **CLOSE)


def test_batched_gradients_and_per_sample_gradients(layer):
    arguments, grad_output = off_the_kink(layer, 4, 7, 6)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    many = torch.stack([grad_output, 2 * grad_output + 1, grad_output - 1])
    batched = torch.autograd.grad(layer.ours(*leaves), leaves, many, is_grads_batched=True)
    for k in range(3):
        expected = torch.autograd.grad(layer.plain(*leaves), leaves, many[k])
        for gradient, plain in zip(batched, expected, strict=True):
            torch.testing.assert_close(gradient[k], plain, **CLOSE)
    x, *parameters = (leaf.detach() for leaf in leaves)

    def gradients(function):
        return torch.func.grad(lambda parameters, sample: function(sample, *parameters).sin().sum())

    actual = torch.vmap(gradients(layer.ours), in_dims=(None, 0))(parameters, x)
    for k, sample in enumerate(x):
        for gradient, plain in zip(actual, gradients(layer.plain)(parameters, sample), strict=True):
            torch.testing.assert_close(gradient[k], plain, **CLOSE)


def test_compile_with_dynamic_shapes(op):
    """For all sizes there is one graph for few samples and one for many, forward and backward."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lambda *arguments: op.ours(*arguments), fullgraph=True, dynamic=True, backend=counted)
    for rows, n, m in [(3, 8, 6), (FUSED, 9, 11), (FUSED + 1, 6, 5), (FUSED + 9, 12, 40)]:
        arguments, grad_output = op.draw(n, m, torch.float64, rows)
        values = {"output": None, **arguments}
        actual, expected = (
            evaluate(lambda function=function, **leaves: function(*leaves.values()), arguments, grad_output)
            for function in (compiled, op.ours)
        )
        for name in values:
            torch.testing.assert_close(actual[name], expected[name], **CLOSE)
    assert len(graphs) <= 2


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_makes_the_weight_in_float32(narrow, layer):
    for rows in (4, FUSED + 8):
        arguments, grad_output = layer.draw(16, 64, torch.float32, rows)
        grad_output = grad_output.to(narrow)
        with torch.autocast("cpu", narrow):
            actual = evaluate(layer.ours, arguments, grad_output)
            # The samples have 16 bits, as an earlier layer returns them under autocast, and the parameters 32. Then
            # one of the parameters has 16 bits too.
            mixed = layer.ours(**{**arguments, "x": arguments["x"].to(narrow)})
            for name in {"bias", "location"} & set(arguments):
                assert layer.ours(**{**arguments, name: arguments[name].to(narrow)}).dtype == narrow
        assert actual["output"].dtype == mixed.dtype == narrow
        assert all(actual[name].dtype == torch.float32 for name in arguments)
        # Autocast rounds x on either route, and the result is the same.
        assert torch.equal(mixed, actual["output"])
        # Eager computes the weight, and then a linear layer, in the narrow dtype.
        eager = evaluate(
            lambda layer=layer, **leaves: layer.plain(**{name: leaf.to(narrow) for name, leaf in leaves.items()}),
            arguments,
            grad_output,
        )
        for name, expected in layer.exact(arguments, grad_output).items():
            # Float32 gradients come out of 16-bit products, so the rule's ulp is that of 16 bits.
            assert_by_the_rule(name, [actual[name].to(narrow)], [eager[name].to(narrow)], [expected])


def test_autocast_keeps_the_precision_of_rows(row_op):
    arguments, grad_output = row_op.draw(5, 6, torch.float32)
    expected = evaluate(row_op.ours, arguments, grad_output)
    with torch.autocast("cpu", torch.bfloat16):
        actual = evaluate(row_op.ours, arguments, grad_output)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.usefixtures("every_multiplier")
def test_backward_under_autocast_has_the_precision_of_forward(layer):
    for rows in (4, FUSED + 8):
        arguments, grad_output = layer.draw(30, 20, torch.float32, rows)
        expected = evaluate(layer.ours, arguments, grad_output)
        leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
        output = layer.ours(**leaves)
        with torch.autocast("cpu"):
            gradients = torch.autograd.grad(output, leaves.values(), grad_output, retain_graph=True)
            again = torch.autograd.grad(output, leaves.values(), grad_output, create_graph=True)
        for name, gradient, other in zip(leaves, gradients, again, strict=True):
            assert torch.equal(gradient, expected[name])
            torch.testing.assert_close(other.detach(), expected[name], rtol=1e-5, atol=1e-4)


def test_no_gradient_is_a_view(layer):
    """User code changes and detaches the gradients that autograd gives."""
    for rows in (2, FUSED + 1, 200):
        arguments, grad_output = layer.draw(8, 128, torch.float32, rows)
        leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
        gradients = torch.autograd.grad(layer.ours(**leaves), list(leaves.values()), grad_output)
        for name, gradient in zip(leaves, gradients, strict=True):
            assert not gradient._is_view(), (name, rows)
            gradient.mul_(torch.ones((), requires_grad=True)).detach_()


def assert_arguments_may_depend_on_each_other(function, *leaves):
    """The arguments of a layer in ``function`` are computed from each other, or are one tensor."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    calls = []

    def run():
        calls.clear()
        doubled = [2 * leaf for leaf in leaves]
        doubled[0].register_hook(lambda grad: calls.append(grad))
        return function(*doubled)

    plain = torch.autograd.grad(run().square().sum(), leaves)
    with_graph = torch.autograd.grad(run().square().sum(), leaves, create_graph=True)
    assert len(calls) == 1
    result = run()
    cotangent = (2 * result).detach()
    with forward_ad.dual_level():
        dual = torch.autograd.grad(result, leaves, forward_ad.make_dual(cotangent, torch.ones_like(cotangent)))
        dual = [forward_ad.unpack_dual(gradient).primal for gradient in dual]
    for expected, one, other in zip(plain, with_graph, dual, strict=True):
        # Some dozens of roundings of numbers of the gradient's size.
        bound = 64 * torch.finfo(torch.float64).eps * expected.abs().max()
        assert (one - expected).abs().max() <= bound
        assert (other - expected).abs().max() <= bound


# ---- Errors ----------------------------------------------------------------------------------------------------------


ONES = torch.ones


def ones(shapes, dtypes):
    """Tensors of ones by name; ``dtypes`` has keys like "x_dtype"."""
    return {name: ONES(shape, dtype=dtypes.get(f"{name}_dtype", torch.float32)) for name, shape in shapes.items()}


def test_sparse_and_nested_tensors_and_other_devices(op):
    """Such tensors are refused: a fake kernel would return memory that was never written."""
    arguments, _ = op.draw(3, 4, torch.float32, 5)
    nested = torch.nested.nested_tensor([ONES(2, 4), ONES(1, 4)], layout=torch.jagged)
    for name, tensor in arguments.items():
        with pytest.raises(TypeError, match=f"{name} is sparse_coo; expected a dense tensor"):
            op.ours(**arguments | {name: tensor.to_sparse()})
        with pytest.raises(TypeError, match=f"{name} is a nested tensor; expected a dense tensor"):
            op.ours(**arguments | {name: nested})
        if len(arguments) > 1:
            for autocast in (False, True):
                with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match="Move one of the two"):
                    op.ours(**arguments | {name: tensor.to("meta")})


def test_a_backend_that_cannot_run_says_so(op, stem):
    arguments, _ = op.draw(3, 4, torch.float32, 5)
    with lcw_ops.use_backend("cuda"), pytest.raises(lcw_ops.BackendError, match=f"{stem.name} has no cuda kernel"):
        op.ours(**arguments)


def test_meta_tensors_have_shapes_only(op):
    arguments, _ = op.draw(3, 4, torch.bfloat16, 5)
    with lcw_ops.use_backend("reference"):
        on_meta = op.ours(**{name: tensor.to("meta") for name, tensor in arguments.items()})
    output = op.ours(**arguments)
    assert (on_meta.shape, on_meta.dtype, on_meta.is_meta) == (output.shape, output.dtype, True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = op.ours(**arguments)
    assert (fake.shape, fake.dtype, fake.device) == (output.shape, output.dtype, output.device)


def assert_refused_in_every_mode(call, words):
    with pytest.raises(ValueError, match=words):
        call()
    with torch.autocast("cpu"), pytest.raises(ValueError, match=words):
        call()
    with FakeTensorMode(), pytest.raises(ValueError, match=words):
        call()


def is_refused(overload, *arguments):
    try:
        overload(*arguments)
    except RuntimeError:
        return True
    return False


def assert_wrong_arguments_are_refused(calls, free):
    """Call ops by themselves, as ``calls`` gives them, with one wrong argument at a time.

    ``free`` has the changes that an argument of an op may have, because no other argument shares the size.
    """
    for name, arguments, options in calls:
        overload = getattr(torch.ops.lcw_ops, name).cpp
        assert overload(*arguments.values(), *options) is not None
        for argument, tensor in arguments.items():
            if tensor is None or tensor.numel() == 0:
                continue
            shape = tuple(tensor.shape)
            wrong = {
                "longer": ONES(*shape[:-1], shape[-1] + 1),
                "shorter": ONES(*shape[:-1], shape[-1] - 1),
                "fewer rows": ONES(shape[0] - 1, *shape[1:]),
                "more rows": ONES(shape[0] + 1, *shape[1:]),
                "one more dimension": ONES(*shape, 1),
                "no dimension": ONES(()),
                "one dimension less": ONES(shape[1:]),
                "integers": tensor.long(),
                "another dtype": tensor.double(),
            }
            for kind, replacement in wrong.items():
                if kind in free.get((name, argument), ()):
                    continue
                changed = {**arguments, argument: replacement}
                assert is_refused(overload, *changed.values(), *options), f"{name}: {argument} with {kind}"


# ---- Instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_arguments_is_read(monkeypatch, flush, dtype, stem):
    """Too wide a vector would touch memory that is not mapped, and the process would end here."""
    monkeypatch.setenv("LCW_OPS_MATMUL", "own")

    def guarded(tensor):
        # Without elements there is nothing to guard.
        return between_guards(tensor, flush) if tensor.numel() else tensor

    for op in stem.row_ops.values():
        for n, m in [(1, 1), (1, 2), (3, 3), (2, 9), (5, 16), (3, 17), (7, 33), (2, 127), (40, 513)]:
            arguments, grad_output = op.draw(n, m, dtype)
            laid_out = {name: guarded(tensor) for name, tensor in arguments.items()}
            assert all(tensor.isfinite().all() for tensor in evaluate(op.ours, laid_out, guarded(grad_output)).values())
    for op in stem.layers.values():
        for rows, n, m in [(1, 1, 1), (2, 5, 2), (3, 5, 17), (8, 24, 64), (32, 3, 16), (33, 7, 33), (70, 26, 15)]:
            arguments, grad_output = op.draw(n, m, dtype, rows)
            laid_out = {name: guarded(tensor) for name, tensor in arguments.items()}
            assert all(tensor.isfinite().all() for tensor in evaluate(op.ours, laid_out, guarded(grad_output)).values())
