"""The ops of the hypersphere on the compiled CPU kernels: directions, normalised rows, and the two linear layers.

The rule of all backends holds: the error against the exact result is at most twice that of plain eager torch in the
same dtype, plus one ulp of the result's scale. The exact result comes from the formulas in numpy: in float64, and for
float64 in its 80-bit long double. Results of few numbers are judged over several draws, to leave less to luck. Angles
are those of Gaussian rows, uniform on the sphere, unless a test says otherwise. M samples meet n units of m inputs; up
to FUSED samples, a layer makes its weight inside the product.
"""

import itertools
import math
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
from support.pairwise import pairwise
from support.unit_ops import (
    DTYPES,
    FUSED,
    LAYERS,
    NARROW,
    OPS,
    ROW_OPS,
    ROWS,
    SIZES,
    WIDE,
    assert_op,
    count_draws,
    draw_direction,
    draw_gmp,
    draw_normalize,
    draw_weight_norm,
    exact_direction,
    for_multiplier,
    normal,
    uniform_angles,
)
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import reference
from lcw_ops.ops import backends, hypersphere

pytestmark = pytest.mark.usefixtures("compiled_kernel", "one_thread")


@pytest.fixture
def compiled_kernel():
    with lcw_ops.use_backend("cpp"):
        yield


# ---- The result and every gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_and_normalised_rows(dtype, op):
    needs_more_digits(dtype)
    for n, m in [(0, 5), (0, 1), *SIZES, (200, 33), *WIDE]:
        # The scale's gradient has one number per row.
        calls = [op.draw(n, m, dtype) for _ in range(1 + count_draws(n))]
        assert_op(f"n={n}, m={m}", op, calls)


# Every size with every number of samples, in one of the dtypes.
SIZES_AND_ROWS = pairwise(rows=ROWS, size=SIZES, dtype=DTYPES)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


@pytest.mark.parametrize("layer", ["gmp", "weight norm", "weight norm without bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_wide_layers(dtype, layer, every_multiplier):
    needs_more_digits(dtype)
    for (n, m), all_rows in zip(WIDE, ((1, FUSED, FUSED + 1), (8,)), strict=True):
        for rows in for_multiplier(every_multiplier, all_rows):
            op = LAYERS[layer]
            assert_op(f"M={rows}, n={n}, m={m}", op, [op.draw(n, m, dtype, rows) for _ in range(2)])


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_layers(dtype, layer, every_multiplier):
    for rows in for_multiplier(every_multiplier, (8, FUSED, 200)):
        assert_op(f"M={rows}", layer, [layer.draw(300, 257, dtype, rows)])


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_no_units_and_no_samples(layer):
    for n, m, rows in [(0, 5, 3), (0, 1, 3), (0, 5, 40), (4, 5, 0), (4, 1, 0), (0, 5, 0), (0, 1, 0)]:
        arguments, grad_output = layer.draw(n, m, torch.float32, rows)
        result = evaluate(layer.ours, arguments, grad_output)
        assert result["output"].shape == (rows, n)
        for name, tensor in arguments.items():
            # The sums have no terms.
            assert torch.equal(result[name], torch.zeros_like(tensor)), (name, n, m, rows)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fan_in_1(dtype):
    """A unit of one input has no angles and the direction 1. Its normalised weight is the weight's sign."""
    assert torch.equal(F.hypersphere_direction(torch.empty(3, 0, dtype=dtype)), torch.ones(3, 1, dtype=dtype))
    weight, scale = torch.tensor([[-3.0], [0.7], [0.0], [1.1]], dtype=dtype), normal(4, dtype=dtype)
    assert torch.equal(F.normalize_scale(weight, scale), weight.sign() * scale[:, None])
    for rows in (2, FUSED + 1):
        arguments, grad_output = draw_weight_norm(4, 1, dtype, rows)
        arguments |= {"weight": weight, "scale": scale}
        result = evaluate(F.weight_norm_linear, arguments, grad_output)
        # The gradient (G - <G, v> v) / |w|, with v = w / |w| = +-1 and G the gradient of v, is 0 but for a rounding of
        # <G, v>. The smallest |w| is 0.7.
        size = (grad_output.double().T @ arguments["x"].double()).abs().max() * scale.abs().max() / 0.7
        assert result["weight"].double().abs().max() <= torch.finfo(dtype).eps * size


# ---- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


@pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_hostile_layouts(dtype, op):
    arguments, grad_output = op.draw(9, 21, dtype)
    expected = evaluate(op.ours, arguments, grad_output)
    everything = {**arguments, "grad_output": grad_output}
    for name, tensor in everything.items():
        for layout, laid_out in hostile_layouts(tensor).items():
            changed = everything | {name: laid_out}
            actual = evaluate(op.ours, changed, changed.pop("grad_output"))
            for result, value in actual.items():
                assert torch.equal(value, expected[result]), (name, layout, result)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


@pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
def test_expanded_rows(op):
    arguments, _ = op.draw(1, 21, torch.float32)
    expanded = {name: tensor.expand(7, *tensor.shape[1:]) for name, tensor in arguments.items()}
    actual = evaluate(op.ours, expanded, torch.ones(()).expand(7, 21))
    expected = evaluate(op.ours, arguments, torch.ones(1, 21))
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name].expand_as(tensor)), name


# tests/test_contract.py checks the other functions.
@pytest.mark.parametrize("layer", ["gmp relu", "weight norm without bias"])
def test_arguments_are_left_as_they_were(layer):
    arguments, grad_output = LAYERS[layer].draw(8, 6, torch.float32, 5)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    evaluate(LAYERS[layer].ours, arguments, grad_output)
    for name, tensor in arguments.items():
        assert torch.equal(tensor, before[name])
        assert tensor._version == 0


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
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
@settings(derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    n=st.integers(0, 40),
    m=st.integers(1, 70),
    layer=st.sampled_from(list(LAYERS)),
    dtype=st.sampled_from(NARROW),
    layout=st.sampled_from([None, "sliced", "strided", "transposed"]),
    seed=st.integers(0, 2**31),
)
def test_any_call(rows, n, m, layer, dtype, layout, seed):
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
    op = LAYERS[layer]
    assert_op("any call", op, [op.draw(n, m, dtype, rows) for _ in range(draws)], given)


def test_same_bits_twice_under_load():
    """The bits are the same for every number of threads, also while another thread computes products."""
    calls = [(op, op.draw(96, 300, torch.float32, rows)) for op in LAYERS.values() for rows in (20, 100)]
    calls += [(op, op.draw(300, 300, torch.float32)) for op in ROW_OPS.values()]
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


@pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_have_the_same_bits_however_they_are_dealt_out(dtype, op):
    arguments, grad_output = op.draw(333, 257, dtype)
    expected = evaluate(op.ours, arguments, grad_output)
    for count in (2, 3, 5):
        with threads(count):
            actual = evaluate(op.ours, arguments, grad_output)
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name]), f"{name}, {count} threads"
    # A row does not depend on its neighbours.
    some = {name: tensor[100:103] for name, tensor in arguments.items()}
    for name, tensor in evaluate(op.ours, some, grad_output[100:103]).items():
        assert torch.equal(tensor, expected[name][100:103]), name


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
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


def test_what_is_kept_for_backward():
    """For few samples M, a layer of n units keeps M n numbers beside its arguments, and none of the weight's size."""
    n, m = 64, 100
    for rows, direction in ((FUSED, 0), (FUSED + 1, n * m)):
        for name in ("gmp", "gmp relu"):
            arguments, _ = LAYERS[name].draw(n, m, torch.float32, rows)
            own = sum(tensor.numel() for tensor in arguments.values())
            for needed, activated, u in (
                (list(arguments), rows * n, direction),
                (["angles", "radius", "location"], rows * n, 0),
                (["angles", "location"], rows * n * (name == "gmp relu"), 0),
                (["x"], rows * n * (name == "gmp relu"), direction),
            ):
                leaves = {key: tensor.detach().requires_grad_(key in needed) for key, tensor in arguments.items()}
                _, saved = saved_tensors(lambda leaves=leaves, name=name: LAYERS[name].ours(**leaves))
                assert sum(tensor.numel() for tensor in saved) <= own + activated + u, (rows, name, needed)
        arguments, _ = draw_weight_norm(n, m, torch.float32, rows)
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in arguments.items()}
        _, saved = saved_tensors(lambda leaves=leaves: F.weight_norm_linear(**leaves))
        assert {tensor.data_ptr() for tensor in saved} <= {leaf.data_ptr() for leaf in leaves.values()}


def test_a_row_op_keeps_its_arguments_only():
    for op in ROW_OPS.values():
        arguments, _ = op.draw(5, 6, torch.float32)
        leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
        _, saved = saved_tensors(lambda op=op, leaves=leaves: op.ours(**leaves))
        assert {tensor.data_ptr() for tensor in saved} == {leaf.data_ptr() for leaf in leaves.values()}


# ---- Sines and cosines ----------------------------------------------------------------------------------------------

FLOATS = {torch.float32: np.float32, torch.float64: np.float64}
# The float of each dtype that is nearest to a multiple of pi / 2.
WORST = {torch.float32: 16367173.0 * 2.0**72, torch.float64: 6381956970095103.0 * 2.0**797}


def sine_and_cosine(angles):
    """The sines and cosines of the angles t: the direction of a unit with two inputs is (cos t, sin t)."""
    direction = F.hypersphere_direction(torch.from_numpy(angles)[:, None])
    return direction[:, 1].numpy(), direction[:, 0].numpy()


def in_ulps(found, exact, kind):
    return (np.abs(found.astype(exact.dtype) - exact) / np.spacing(np.abs(exact).astype(kind))).max()


def with_both_signs_and_neighbours(angles, kind):
    angles = np.concatenate([angles.astype(kind), -angles.astype(kind)])
    return np.concatenate([angles, np.nextafter(angles, kind(0)), np.nextafter(angles, kind(np.inf))])


def angles_up_to_a_million(kind):
    generator = np.random.default_rng(0)
    multiples = np.concatenate([np.arange(3000), generator.integers(0, 636_619, 20_000)])
    return with_both_signs_and_neighbours(
        np.concatenate(
            [
                multiples * (np.pi / 2),
                multiples * (np.pi / 4),
                generator.uniform(0, 1e6, 20_000),
                10 ** generator.uniform(-30, 6, 20_000),
            ]
        ),
        kind,
    )


def angles_beyond(dtype):
    kind = FLOATS[dtype]
    powers = np.random.default_rng(0).uniform(6, np.log10(np.finfo(kind).max) - 0.01, 5000)
    special = [WORST[dtype], float(np.finfo(kind).max), 1e6, 1e7, 1e30, 3e38]
    angles = np.concatenate([10**powers, special]).astype(kind)
    return np.concatenate([angles, -angles])


# In ulp. Up to a million, the bounds of csrc/cpu/sincos.h. Beyond, those of libm, whose float64 cosine is off by 8 at
# WORST.
ULPS = {"up to a million": {torch.float32: 2, torch.float64: 2.5}, "beyond": {torch.float32: 2, torch.float64: 8}}


@pytest.mark.parametrize("span", ULPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sines(dtype, span):
    needs_more_digits(dtype)
    kind = FLOATS[dtype]
    angles = angles_up_to_a_million(kind) if span == "up to a million" else angles_beyond(dtype)
    exact = angles.astype(np.longdouble)
    for found, function in zip(sine_and_cosine(angles), (np.sin, np.cos), strict=True):
        assert in_ulps(found, function(exact), kind) <= ULPS[span][dtype], function.__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sines_have_the_same_bits_everywhere_in_a_row(dtype):
    """All angles of a row but one are pi / 2. In float32 and float64 their sine is 1, so only the one angle decides."""
    angles = torch.cat([normal(50, dtype=dtype), 1000 * normal(50, dtype=dtype), normal(50, dtype=dtype) / 1000])
    expected = F.hypersphere_direction(angles[:, None])
    for width in (3, 8, 19, 40):
        for place in {0, 1, width // 2, width - 1}:
            row = torch.full((len(angles), width), math.pi / 2, dtype=dtype)
            row[:, place] = angles
            direction = F.hypersphere_direction(row)
            # In 16 bits, pi / 2 is too inexact to have a sine of 1.
            if dtype in FLOATS:
                assert torch.equal(direction[:, place], expected[:, 0]), (width, place)
                assert torch.equal(direction[:, -1], expected[:, 1]), (width, place)
            else:
                exact = torch.from_numpy(exact_direction(as_exact(row)))
                assert ((direction.double() - exact).abs() <= torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_has_exact_sine_and_cosine(dtype):
    for width in (1, 2, 7, 16, 33):
        first = torch.zeros(3, width + 1, dtype=dtype)
        first[:, 0] = 1
        for zero in (0.0, -0.0):
            assert torch.equal(F.hypersphere_direction(torch.full((3, width), zero, dtype=dtype)), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_angles_are_their_own_sines(dtype):
    info = torch.finfo(dtype)
    sizes = [info.smallest_normal * info.eps, info.smallest_normal * info.eps * 5, info.smallest_normal]
    tiny = torch.tensor([size * sign for size in sizes for sign in (1, -1)], dtype=dtype)
    assert (tiny != 0).all()
    direction = F.hypersphere_direction(tiny[:, None])
    assert torch.equal(direction[:, 1], tiny)
    assert torch.equal(direction[:, 0], torch.ones_like(tiny))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_angles_in_wide_rows(dtype):
    """Rows have length 1 and are right for angles of any size, even if only one angle of a vector is huge."""
    needs_more_digits(dtype)
    t = uniform_angles(12, 40, dtype)
    sizes = [1e6, 1e30, 3e38] if dtype == torch.float32 else [1e6, 1e30, 3e38, 1e300]
    for size in sizes:
        for columns in ([3], [0, 38], list(range(39))):
            huge = t.clone()
            huge[:, columns] *= size if size < 1e38 else size / huge.abs().max()
            assert huge.isfinite().all()
            arguments, grad_output = {"angles": huge}, normal(12, 40, dtype=dtype)
            assert_op(f"{size} in {columns[:3]}", ROW_OPS["direction"], [(arguments, grad_output)])


@pytest.mark.parametrize("m", [2, 3, 9, 1152, 4608])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_directions_have_length_1(dtype, m):
    direction = F.hypersphere_direction(uniform_angles(20, m, dtype))
    # Every sine is off by a few halves of an ulp at random, and passes its error on to all later components.
    allowed = 4 * math.sqrt(m) * torch.finfo(dtype).eps
    assert ((direction.double().norm(dim=1) - 1).abs() <= allowed).all()


# ---- NaN, infinity, and poles ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize(
    ("layer", "bad"),
    [
        (layer, bad)
        for layer, bad in itertools.product(LAYERS, (math.nan, math.inf, -math.inf))
        # relu turns -infinity into a finite 0, and hides units that do not fire.
        if layer != "gmp relu" or math.isnan(bad)
    ],
)
def test_nan_and_infinity_stay_in_their_row(layer, bad):
    layer = LAYERS[layer]
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
        if layer is not LAYERS["gmp relu"]:
            assert not result["x"][3].isfinite().any()
            for other in of_unit & set(arguments):
                assert not result[other][4].isfinite().any(), other


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_entry_spoils_its_own_row_only(dtype, bad):
    others = [0, 2]
    for width, place in [(1, 0), (4, 2), (20, 0), (20, 13), (40, 39)]:
        arguments, grad_output = draw_direction(3, width + 1, dtype)
        clean = evaluate(F.hypersphere_direction, arguments, grad_output)
        arguments["angles"][1, place] = bad
        spoilt = evaluate(F.hypersphere_direction, arguments, grad_output)
        assert spoilt["output"][1, place:].isnan().all()
        # The components before the bad angle do not depend on it.
        assert torch.equal(spoilt["output"][1, :place], clean["output"][1, :place])
        assert spoilt["angles"][1].isnan().all()
        for name in clean:
            assert torch.equal(spoilt[name][others], clean[name][others]), name
        arguments, grad_output = draw_normalize(3, width + 1, dtype)
        clean = evaluate(F.normalize_scale, arguments, grad_output)
        arguments["weight"][1, place] = bad
        spoilt = evaluate(F.normalize_scale, arguments, grad_output)
        assert not spoilt["output"][1, place].isfinite()
        for name in clean:
            assert torch.equal(spoilt[name][others], clean[name][others]), name


def test_a_bad_gradient_spoils_its_own_row_only():
    for op in ROW_OPS.values():
        arguments, grad_output = op.draw(3, 21, torch.float32)
        clean = evaluate(op.ours, arguments, grad_output)
        grad_output[1, 7] = math.nan
        spoilt = evaluate(op.ours, arguments, grad_output)
        for name in arguments:
            assert torch.equal(spoilt[name][[0, 2]], clean[name][[0, 2]]), name
            assert spoilt[name][1].isnan().any(), name


POLES = torch.tensor(
    [[0.0, 0.0, 0.0, 0.0], [0.7, 0.0, 1.1, -0.4], [0.0, 1.3, 0.0, 2.0], [1.0, 2.0, -1.0, 0.0], [0.3, 0.9, 1.7, -2.2]],
    dtype=torch.float64,
)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_derivatives_at_the_poles(dtype):
    """After an angle of 0, whose sine is 0, components and derivatives are exactly 0.

    Rounded multiples of pi are not poles, but near to them.
    """
    needs_more_digits(dtype)
    nearly = torch.tensor([[math.pi, 1.0, -math.pi, 0.5], [2 * math.pi, math.pi, 0.3, 3 * math.pi]]).double()
    t = torch.cat([POLES, nearly, nearly * torch.tensor([1.0, 0, 1, 0])]).to(dtype)
    grad_output = normal(len(t), 5, dtype=dtype)
    assert_op("poles", ROW_OPS["direction"], [({"angles": t}, grad_output)])
    actual = evaluate(F.hypersphere_direction, {"angles": t}, grad_output)
    behind = (t == 0).cumsum(1).bool()
    assert (actual["output"][:, 1:][behind] == 0).all()
    assert (actual["angles"][:, 1:][behind[:, :-1]] == 0).all()
    for rows in (3, FUSED + 1):
        arguments, grad_output = draw_gmp(len(t), 5, dtype, rows)
        result = evaluate(F.gmp_linear, arguments | {"angles": t}, grad_output)
        assert (result["angles"][:, 1:][behind[:, :-1]] == 0).all()
        assert_op("layer at poles", LAYERS["gmp"], [(arguments | {"angles": t}, grad_output)])


@pytest.mark.usefixtures("every_multiplier")
def test_relu_at_zero_and_at_nan():
    """A pre-activation of exactly 0 passes no gradient on; a NaN stays NaN."""
    for rows in (3, FUSED + 3):
        angles, radius = torch.zeros(4, 6), torch.tensor([1.0, -2.0, 0.5, -1.0])
        x = torch.zeros(rows, 7)
        # u = (1, 0, ..): z = x_0 + location.
        x[0, 0], x[1, 0], x[2, 0] = 0.25, -0.25, math.nan
        location = torch.tensor([0.0, -0.25, 0.25, 1.0])
        arguments = {"x": x, "angles": angles, "radius": radius, "location": location}
        result = evaluate(LAYERS["gmp relu"].ours, arguments, torch.ones(rows, 4))
        z = x[:, :1] + location
        expected = radius * z.relu()
        assert torch.equal(result["output"].nan_to_num(99.0), expected.nan_to_num(99.0))
        fires = (z > 0).float()
        good = torch.arange(rows) != 2
        assert torch.equal(result["x"][good, 0], (radius * fires)[good].sum(1))
        assert result["radius"].isnan().all()
        arguments["x"] = x.nan_to_num(-9.0)
        result = evaluate(LAYERS["gmp relu"].ours, arguments, torch.ones(rows, 4))
        z = arguments["x"][:, :1] + location
        assert torch.equal(result["radius"], z.relu().sum(0))
        assert torch.equal(result["location"], radius * (z > 0).sum(0))


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("name", ["gmp", "gmp relu"])
def test_radius_of_zero_and_of_any_sign(name):
    for rows in (4, FUSED + 4):
        arguments, grad_output = LAYERS[name].draw(6, 9, torch.float32, rows)
        positive = arguments["radius"].abs() + 0.1
        results = [
            evaluate(LAYERS[name].ours, arguments | {"radius": radius}, grad_output)
            for radius in (positive, -positive, torch.zeros(6))
        ]
        plus, minus, zero = results
        for key, sign in (("output", -1), ("x", -1), ("angles", -1), ("location", -1), ("radius", 1)):
            assert torch.equal(minus[key], sign * plus[key]), key
            if key != "radius":
                assert torch.equal(zero[key], torch.zeros_like(zero[key])), key
        # The gradient of the radius does not depend on the radius.
        assert torch.equal(zero["radius"], plus["radius"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["normalize", "weight norm", "weight norm without bias"])
def test_zero_rows_stay_zero_with_zero_derivatives(op, dtype):
    for rows in (5, FUSED + 1):
        for m in (1, 7, 40):
            arguments, grad_output = OPS[op].draw(6, m, dtype, rows)
            arguments["weight"][[1, 5]] = 0.0
            result = evaluate(OPS[op].ours, arguments, grad_output)
            output = result["output"] if op == "normalize" else result["output"].T
            constant = 0 if "bias" not in arguments else arguments["bias"][[1, 5], None]
            assert torch.equal(output[[1, 5]] - constant, torch.zeros_like(output[[1, 5]]))
            for name in ("weight", "scale"):
                assert torch.equal(result[name][[1, 5]], torch.zeros_like(result[name][[1, 5]])), name
                assert result[name].isfinite().all()


LENGTHS = {
    torch.float32: [1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e18, 1e30, 1e38],
    torch.float64: [1e-300, 1e-160, 1e160, 1e300],
    torch.bfloat16: [1e-40, 1e-38, 1e30, 1e38],
    torch.float16: [6e-8, 1e-6, 1e4],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["normalize", "weight norm", "weight norm without bias"])
def test_rows_of_any_length(op, dtype):
    """Squares of such numbers are 0 or infinite in their dtype; entries may be the smallest and the largest floats."""
    needs_more_digits(dtype)
    entries = torch.linspace(-3, 3, 30 * 23, dtype=torch.float64).view(30, 23).flip(0)
    for length in LENGTHS[dtype]:
        for rows in (3, FUSED + 1):
            arguments, grad_output = OPS[op].draw(30, 23, dtype, rows)
            arguments["weight"] = (entries * min(length, 1e306)).to(dtype)
            assert arguments["weight"].isfinite().all()
            # The shorter a row, the larger the gradient of its weight.
            if length < 1:
                grad_output = grad_output * max(length, torch.finfo(dtype).smallest_normal)
            result, eager = (evaluate(f, arguments, grad_output) for f in (OPS[op].ours, OPS[op].plain))
            exact = OPS[op].exact(arguments, grad_output)
            largest = torch.finfo(dtype).max
            for name, value in exact.items():
                # A gradient may be too large for the dtype: then it is infinite in both.
                if name == "weight" and np.abs(value).max() > largest / 4:
                    continue
                # A gradient may be so small that its last digits are lost.
                lost = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
                error = np.abs(as_exact(result[name]) - value).max()
                allowed = 2 * np.abs(as_exact(eager[name]) - value).max() + 2 * lost
                assert error <= allowed + torch.finfo(dtype).eps * np.abs(value).max(), (length, rows, name)


# ---- Stability, the subject of the paper ----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, 9, 40])
def test_the_metric_is_diagonal(m):
    t = uniform_angles(1, m, torch.float64)
    jacobian = torch.func.jacrev(lambda t: F.hypersphere_direction(t[None])[0])(t[0])
    forward = torch.func.jacfwd(lambda t: F.hypersphere_direction(t[None])[0])(t[0])
    lengths = torch.cat([torch.ones(1, dtype=torch.float64), t[0].sin()[:-1].cumprod(0)])
    torch.testing.assert_close(jacobian.T @ jacobian, torch.diag(lengths.square()), atol=m * EPS, rtol=0)
    torch.testing.assert_close(jacobian, forward, atol=m * EPS, rtol=0)


def angles_between(u, v):
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def longest_turn(t, size):
    """Find the steps of the given length that turn the most, by gradient ascent on the distance."""
    step = torch.randn_like(t)
    u = F.hypersphere_direction(t)
    for _ in range(30):
        step = (step / step.norm(dim=1, keepdim=True) * size).detach().requires_grad_()
        (slope,) = torch.autograd.grad((F.hypersphere_direction(t + step) - u).square().sum(), step)
        step = step + size * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (step / step.norm(dim=1, keepdim=True) * size).detach()


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("m", [2, 12, 300])
def test_a_step_of_the_angles_turns_the_direction_by_no_more(m, size):
    t = uniform_angles(50, m, torch.float64)
    first = torch.zeros_like(t)
    first[:, 0] = size
    random = torch.randn_like(t)
    steps = {
        "random": random / random.norm(dim=1, keepdim=True) * size,
        "the first angle": first,
        "the worst": longest_turn(t, size),
        "a sign step": torch.randn_like(t).sign() * size / math.sqrt(m - 1),
    }
    turns = {
        name: angles_between(F.hypersphere_direction(t), F.hypersphere_direction(t + step))
        for name, step in steps.items()
    }
    for name, turn in turns.items():
        # Each angle carries an ulp of up to pi, each product m roundings.
        assert (turn <= size + 8 * math.sqrt(m) * EPS).all(), name
    # The first angle reaches the bound: it moves along a whole circle, up to the other pole.
    assert turns["the first angle"].max() > 0.99 * min(size, 1)


# ---- Autograd, vmap, compile, and autocast --------------------------------------------------------------------------

EPS = torch.finfo(torch.float64).eps
# Two ways to compute sums of at most 80 products below 20, with third derivatives below 100 and as many roundings.
CLOSE = {"rtol": 1e-12, "atol": 2 * 80 * 20 * EPS}


def off_the_kink(op, n, m, rows):
    """Float64 arguments. Their pre-activations are not near 0, where differences would straddle relu's corner."""
    while True:
        arguments, grad_output = op.draw(n, m, torch.float64, rows)
        if op is not LAYERS["gmp relu"]:
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
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_derivatives_are_right_twice(op):
    arguments, _ = off_the_kink(op, 2, 4, 3)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(op.ours, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(op.ours, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("op", LAYERS.values(), ids=LAYERS)
def test_derivatives_of_many_samples_are_right_twice(op):
    arguments, _ = off_the_kink(op, 3, 5, FUSED + 2)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(op.ours, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(op.ours, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
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


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
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


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
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


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_vmap_is_a_loop(op):
    """vmap runs over each argument alone and over all, along every dimension, and over the gradients too."""
    for rows in (3, FUSED + 1) if op in LAYERS.values() else (0,):
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


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_vmap_within_vmap_and_over_nothing(op):
    arguments, _ = op.draw(4, 5, torch.float64, 3)
    stacked = [tensor + normal(2, 6, *[1] * tensor.dim(), dtype=torch.float64) for tensor in arguments.values()]
    last = [tensor.movedim(0, -1) for tensor in stacked]
    actual = torch.vmap(torch.vmap(op.ours), in_dims=-1)(*last)
    for i, j in itertools.product(range(2), range(6)):
        torch.testing.assert_close(actual[i, j], op.plain(*(tensor[i, j] for tensor in stacked)), **CLOSE)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


def test_opcheck():
    ops = torch.ops.lcw_ops
    checked = set()

    def check(overload, *arguments):
        checked.add(str(overload))
        torch.library.opcheck(overload, arguments)

    for n, m, rows, dtype in [(4, 6, 3, torch.float32), (2, 1, FUSED + 8, torch.bfloat16)]:
        direction, grad_direction = draw_direction(n, m, dtype)
        check(ops.hypersphere_direction.cpp, direction["angles"])
        check(ops.hypersphere_direction_backward.cpp, grad_direction, direction["angles"])
        normal_arguments, grad_output = draw_normalize(n, m, dtype)
        check(ops.normalize_scale.cpp, *normal_arguments.values())
        check(ops.normalize_scale_backward.cpp, grad_output, *normal_arguments.values())
        arguments, grad_output = draw_gmp(n, m, dtype, rows)
        x, angles, radius, location = arguments.values()
        for relu, keep_direction in ((False, False), (True, True)):
            forward = (x, angles, radius, location, relu, False, True, keep_direction)
            check(ops.gmp_linear.cpp, *forward)
            _, activated, kept = ops.gmp_linear.cpp(*forward)
            needs = (keep_direction, True, True, relu)
            check(ops.gmp_linear_backward.cpp, grad_output, x, angles, radius, activated, kept, relu, False, *needs)
        weight, scale = normal_arguments.values()
        for bias in (location, None):
            check(ops.weight_norm_linear.cpp, x, weight, scale, bias, False)
            needs = (True, bias is None, True, bias is not None)
            check(ops.weight_norm_linear_backward.cpp, grad_output, x, weight, scale, False, *needs)
    assert len(checked) == 8


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
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


def test_compile_without_gradients_and_in_autocast():
    arguments, _ = draw_gmp(6, 5, torch.float32, 4)
    compiled = torch.compile(lambda *a: F.gmp_linear(*a, "relu"), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments.values()), F.gmp_linear(**arguments, activation="relu"))
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = compiled(*arguments.values()), F.gmp_linear(**arguments, activation="relu")
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


def test_autocast_keeps_the_precision_of_directions_and_normalised_rows():
    for op in ROW_OPS.values():
        arguments, grad_output = op.draw(5, 6, torch.float32)
        expected = evaluate(op.ours, arguments, grad_output)
        with torch.autocast("cpu", torch.bfloat16):
            actual = evaluate(op.ours, arguments, grad_output)
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
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


def test_a_backward_pass_uses_the_backend_of_its_forward_pass():
    arguments, grad_output = draw_gmp(5, 6, torch.float32, 4)
    expected = evaluate(F.gmp_linear, arguments, grad_output)
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    output = F.gmp_linear(**leaves)
    with lcw_ops.use_backend("reference"):
        gradients = torch.autograd.grad(output, leaves.values(), grad_output)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected[name])


def test_compiled_kernels_are_the_choice_on_a_cpu():
    before, backends._requested = backends._requested, None
    try:
        assert backends.choose(hypersphere.NAME, torch.device("cpu")) == "cpp"
    finally:
        backends._requested = before


# ---- Errors ---------------------------------------------------------------------------------------------------------

ONES = torch.ones


def gmp(x=(2, 4), angles=(3, 3), radius=(3,), location=(3,), activation=None, **dtypes):
    shapes = {"x": x, "angles": angles, "radius": radius, "location": location}
    return F.gmp_linear(**ones(shapes, dtypes), activation=activation)


def weight_norm(x=(2, 4), weight=(3, 4), scale=(3,), bias=(3,), **dtypes):
    return F.weight_norm_linear(**ones({"x": x, "weight": weight, "scale": scale, "bias": bias}, dtypes))


def ones(shapes, dtypes):
    """Tensors of ones by name; ``dtypes`` has keys like "x_dtype"."""
    return {name: ONES(shape, dtype=dtypes.get(f"{name}_dtype", torch.float32)) for name, shape in shapes.items()}


WRONG_SHAPES = [
    (lambda: F.hypersphere_direction(ONES(3)), r"hypersphere_direction: angles has shape \(3,\); expected \(n, m-1\)"),
    (lambda: F.hypersphere_direction(ONES(3, 2, 1)), "hypersphere_direction: angles has shape"),
    (lambda: F.hypersphere_direction(ONES(())), r"angles has shape \(\)"),
    (lambda: F.hypersphere_angles(ONES(3)), "hypersphere_angles: weight has shape"),
    (lambda: F.hypersphere_angles(ONES(3, 0)), "hypersphere_angles: weight has shape"),
    (lambda: F.normalize_scale(ONES(3), ONES(3)), "normalize_scale: weight has shape"),
    (lambda: F.normalize_scale(ONES(3, 0), ONES(3)), r"weight has shape \(3, 0\); expected \(n, m\) with m >= 1"),
    (lambda: F.normalize_scale(ONES(3, 2), ONES(2)), r"scale has shape \(2,\); expected \(3,\), one value per unit"),
    (lambda: F.normalize_scale(ONES(3, 2), ONES(3, 1)), r"scale has shape \(3, 1\)"),
    (lambda: F.normalize_scale(ONES(1, 2), ONES(())), r"scale has shape \(\)"),
    (lambda: gmp(x=(2, 3)), r"gmp_linear: x has shape \(2, 3\); expected \(\.\.\., 4\), one more than the columns"),
    (lambda: gmp(x=()), r"gmp_linear: x has shape \(\)"),
    (lambda: gmp(angles=(3, 3, 1)), "gmp_linear: angles has shape"),
    (lambda: gmp(angles=(3,)), "gmp_linear: angles has shape"),
    (lambda: gmp(radius=(2,)), "gmp_linear: radius has shape"),
    (lambda: gmp(radius=(3, 1)), "gmp_linear: radius has shape"),
    (lambda: gmp(location=(4,)), "gmp_linear: location has shape"),
    (lambda: gmp(location=()), "gmp_linear: location has shape"),
    (lambda: gmp(activation="tanh"), "activation is 'tanh'; expected one of None, 'relu'"),
    (lambda: weight_norm(x=(2, 3)), r"weight_norm_linear: x has shape \(2, 3\); expected \(\.\.\., 4\)"),
    (lambda: weight_norm(x=()), r"weight_norm_linear: x has shape \(\)"),
    (lambda: weight_norm(weight=(3, 4, 1)), "weight_norm_linear: weight has shape"),
    (lambda: weight_norm(x=(2, 0), weight=(3, 0)), "weight_norm_linear: weight has shape"),
    (lambda: weight_norm(scale=(4,)), "weight_norm_linear: scale has shape"),
    (lambda: weight_norm(bias=(1,)), "weight_norm_linear: bias has shape"),
]


@pytest.mark.parametrize(("call", "words"), WRONG_SHAPES)
def test_shapes_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
    with torch.autocast("cpu"), pytest.raises(ValueError, match=words):
        call()
    with FakeTensorMode(), pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.hypersphere_direction(None), "hypersphere_direction: angles is a NoneType"),
        (lambda: F.hypersphere_direction(ONES(3, 2).long()), "angles is torch.int64; expected float64"),
        (lambda: F.hypersphere_direction(ONES(0, 2).bool()), "angles is torch.bool"),
        (lambda: F.hypersphere_angles([[1.0]]), "hypersphere_angles: weight is a list"),
        (lambda: F.hypersphere_angles(ONES(3, 2, dtype=torch.complex64)), "weight is torch.complex64"),
        (lambda: F.normalize_scale(None, ONES(3)), "normalize_scale: weight is a NoneType"),
        (lambda: F.normalize_scale(ONES(3, 2), None), "normalize_scale: scale is a NoneType"),
        (lambda: F.normalize_scale(ONES(3, 2), 1.0), "normalize_scale: scale is a float"),
        (lambda: F.normalize_scale(ONES(3, 2), ONES(3).half()), "scale is torch.float16; expected torch.float32"),
        (lambda: F.gmp_linear(None, ONES(3, 3), ONES(3), ONES(3)), "gmp_linear: x is a NoneType"),
        (lambda: F.gmp_linear([1.0], ONES(3, 3), ONES(3), ONES(3)), "gmp_linear: x is a list"),
        (lambda: F.gmp_linear(ONES(2, 4), None, ONES(3), ONES(3)), "gmp_linear: angles is a NoneType"),
        (lambda: F.gmp_linear(ONES(2, 4), ONES(3, 3), None, ONES(3)), "gmp_linear: radius is a NoneType"),
        (lambda: F.gmp_linear(ONES(2, 4), ONES(3, 3), ONES(3), None), "gmp_linear: location is a NoneType"),
        (lambda: gmp(angles_dtype=torch.float64), "angles is torch.float64; expected torch.float32, as x is"),
        (lambda: gmp(radius_dtype=torch.bfloat16), "radius is torch.bfloat16; expected torch.float32"),
        (lambda: gmp(location_dtype=torch.float64), "location is torch.float64; expected torch.float32"),
        (lambda: gmp(x_dtype=torch.int64), "x is torch.int64"),
        (lambda: F.weight_norm_linear(None, ONES(3, 4), ONES(3)), "weight_norm_linear: x is a NoneType"),
        (lambda: F.weight_norm_linear(ONES(2, 4), None, ONES(3)), "weight_norm_linear: weight is a NoneType"),
        (lambda: F.weight_norm_linear(ONES(2, 4), ONES(3, 4), None), "weight_norm_linear: scale is a NoneType"),
        (lambda: F.weight_norm_linear(ONES(2, 4), ONES(3, 4), ONES(3), [1.0]), "bias is a list"),
        (lambda: weight_norm(weight_dtype=torch.float64), "weight is torch.float64; expected torch.float32"),
        (lambda: weight_norm(scale_dtype=torch.float16), "scale is torch.float16; expected torch.float32"),
        (lambda: weight_norm(bias_dtype=torch.float16), "bias is torch.float16; expected torch.float32"),
    ],
)
def test_wrong_types_and_dtypes(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("op", OPS)
def test_sparse_and_nested_tensors_and_other_devices(op):
    """Such tensors are refused: a fake kernel would return memory that was never written."""
    arguments, _ = OPS[op].draw(3, 4, torch.float32, 5)
    nested = torch.nested.nested_tensor([ONES(2, 4), ONES(1, 4)], layout=torch.jagged)
    for name, tensor in arguments.items():
        with pytest.raises(TypeError, match=f"{name} is sparse_coo; expected a dense tensor"):
            OPS[op].ours(**arguments | {name: tensor.to_sparse()})
        with pytest.raises(TypeError, match=f"{name} is a nested tensor; expected a dense tensor"):
            OPS[op].ours(**arguments | {name: nested})
        if len(arguments) > 1:
            for autocast in (False, True):
                with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match="Move one of the two"):
                    OPS[op].ours(**arguments | {name: tensor.to("meta")})


def test_a_backend_that_cannot_run_says_so():
    for name, op in OPS.items():
        arguments, _ = op.draw(3, 4, torch.float32, 5)
        stem = "hypersphere_direction" if name in ("direction", "gmp", "gmp relu") else "normalize_scale"
        words = f"{stem} has no cuda kernel"
        with lcw_ops.use_backend("cuda"), pytest.raises(lcw_ops.BackendError, match=words):
            op.ours(**arguments)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_meta_tensors_have_shapes_only(op):
    arguments, _ = op.draw(3, 4, torch.bfloat16, 5)
    with lcw_ops.use_backend("reference"):
        on_meta = op.ours(**{name: tensor.to("meta") for name, tensor in arguments.items()})
    output = op.ours(**arguments)
    assert (on_meta.shape, on_meta.dtype, on_meta.is_meta) == (output.shape, output.dtype, True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = op.ours(**arguments)
    assert (fake.shape, fake.dtype, fake.device) == (output.shape, output.dtype, output.device)


def raw_calls():
    """Yield every op's name, its tensors by name and its options, all of them valid."""
    x, angles, per_unit = ONES(5, 4), ONES(3, 3), ONES(3)
    for many in (False, True):
        kept = {"activated": ONES(5, 3), "direction": ONES(3, 4) if many else ONES(0)}
        yield (
            "gmp_linear",
            {"x": x, "angles": angles, "radius": per_unit, "location": per_unit},
            (
                many,
                False,
                True,
                many,
            ),
        )
        yield (
            "gmp_linear_backward",
            {"grad_output": ONES(5, 3), "x": x, "angles": angles, "radius": per_unit, **kept},
            (many, False, True, True, True, True),
        )
        yield (
            "weight_norm_linear",
            {"x": x, "weight": ONES(3, 4), "scale": per_unit, "bias": None if many else per_unit},
            (False,),
        )
        yield (
            "weight_norm_linear_backward",
            {"grad_output": ONES(5, 3), "x": x, "weight": ONES(3, 4), "scale": per_unit},
            (False, True, True, True, True),
        )
    yield "hypersphere_direction", {"angles": angles}, ()
    yield "hypersphere_direction_backward", {"grad_direction": ONES(3, 4), "angles": angles}, ()
    yield "normalize_scale", {"weight": ONES(3, 4), "scale": per_unit}, ()
    yield "normalize_scale_backward", {"grad_output": ONES(3, 4), "weight": ONES(3, 4), "scale": per_unit}, ()


def is_refused(overload, *arguments):
    try:
        overload(*arguments)
    except RuntimeError:
        return True
    return False


def test_ops_called_by_themselves_refuse_what_does_not_fit():
    """Direct calls must not read beyond an argument either."""
    for name, arguments, options in raw_calls():
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
            # A size is free where no other argument shares it.
            alone = {
                ("hypersphere_direction", "angles"): ("longer", "shorter", "fewer rows", "more rows", "another dtype"),
                ("normalize_scale", "weight"): ("longer", "shorter"),
                ("gmp_linear", "x"): ("fewer rows", "more rows"),
                ("weight_norm_linear", "x"): ("fewer rows", "more rows"),
            }.get((name, argument), ())
            for kind, replacement in wrong.items():
                if kind in alone:
                    continue
                changed = {**arguments, argument: replacement}
                assert is_refused(overload, *changed.values(), *options), f"{name}: {argument} with {kind}"


# ---- Instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_arguments_is_read(monkeypatch, flush, dtype):
    """Too wide a vector would touch memory that is not mapped, and the process would end here."""
    monkeypatch.setenv("LCW_OPS_MATMUL", "own")

    def guarded(tensor):
        # Without elements there is nothing to guard.
        return between_guards(tensor, flush) if tensor.numel() else tensor

    for op in ROW_OPS.values():
        for n, m in [(1, 1), (1, 2), (3, 3), (2, 9), (5, 16), (3, 17), (7, 33), (2, 127), (40, 513)]:
            arguments, grad_output = op.draw(n, m, dtype)
            laid_out = {name: guarded(tensor) for name, tensor in arguments.items()}
            assert all(tensor.isfinite().all() for tensor in evaluate(op.ours, laid_out, guarded(grad_output)).values())
    for op in LAYERS.values():
        for rows, n, m in [(1, 1, 1), (2, 5, 2), (3, 5, 17), (8, 24, 64), (32, 3, 16), (33, 7, 33), (70, 26, 15)]:
            arguments, grad_output = op.draw(n, m, dtype, rows)
            laid_out = {name: guarded(tensor) for name, tensor in arguments.items()}
            assert all(tensor.isfinite().all() for tensor in evaluate(op.ours, laid_out, guarded(grad_output)).values())


# ---- Gradients of arguments that depend on each other ----------------------------------------------------------------


def _dependent_calls():
    """name -> (leaves, a function of them in which a layer's arguments depend on each other, or are one tensor)."""
    x, square, vector = (normal(*shape, dtype=torch.float64) for shape in ((5, 4), (4, 4), (4,)))
    angles = uniform_angles(4, 4, torch.float64)

    def gmp_twice(x, angles, radius):
        return F.gmp_linear(F.gmp_linear(x, angles, radius, radius, "relu"), angles, radius, radius, "relu")

    def norm_twice(x, weight):
        once = F.weight_norm_linear(x, weight, weight.norm(dim=1))
        return F.weight_norm_linear(once, weight, weight[0], weight[0])

    return {"gmp": ((x, angles, vector), gmp_twice), "weight norm": ((x, square), norm_twice)}


@pytest.mark.parametrize("name", ["gmp", "weight norm"])
def test_arguments_that_depend_on_each_other(name):
    leaves, function = _dependent_calls()[name]
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


def test_float64_does_not_mix_under_autocast():
    x, angles, weight, vector = normal(2, 4), normal(3, 3), normal(3, 4), normal(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"gmp_linear: angles is torch\.float64; expected torch\.float32"):
            F.gmp_linear(x, angles.double(), vector, vector)
        with pytest.raises(TypeError, match=r"weight_norm_linear: weight is torch\.float32; expected torch\.float64"):
            F.weight_norm_linear(x.double(), weight, vector)
        assert F.gmp_linear(*(tensor.double() for tensor in (x, angles, vector, vector))).dtype == torch.float64


def test_a_layer_without_gradients_keeps_no_activations(monkeypatch):
    kept = []
    op = hypersphere._gmp_linear["cpp"]

    def watched(*arguments):
        results = op(*arguments)
        kept.append(results[1].numel())
        return results

    monkeypatch.setitem(hypersphere._gmp_linear, "cpp", watched)
    x, angles, vector = normal(2, 4), normal(3, 3), normal(3)
    F.gmp_linear(x, angles, vector, vector, "relu")
    F.gmp_linear(x.requires_grad_(), angles, vector, vector, "relu")
    F.gmp_linear(x, angles, vector, vector)
    assert kept == [0, 6, 0]


def test_no_gradient_is_a_view():
    """User code changes and detaches the gradients that autograd gives."""
    for layer in LAYERS.values():
        for rows in (2, FUSED + 1, 200):
            arguments, grad_output = layer.draw(8, 128, torch.float32, rows)
            leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
            gradients = torch.autograd.grad(layer.ours(**leaves), list(leaves.values()), grad_output)
            for name, gradient in zip(leaves, gradients, strict=True):
                assert not gradient._is_view(), (name, rows)
                gradient.mul_(torch.ones((), requires_grad=True)).detach_()


def test_angles_get_the_same_gradient_in_the_rows_memory():
    """With more samples the angles' gradient overwrites the rows' gradient, by threads that overtake each other."""
    for n, m in [(1, 64), (2, 64), (7, 64), (300, 64), (1000, 65), (50, 300)]:
        arguments, grad_output = draw_gmp(n, m, torch.float32, FUSED + 8)
        x, angles, radius, location = arguments.values()
        _, activated, direction = torch.ops.lcw_ops.gmp_linear.cpp(x, angles, radius, location, False, True, True, True)
        rest = (False, True, False, True, False, False)
        for count in (1, 2, 3, 5):
            with threads(count):
                _, grad_angles, _, _ = torch.ops.lcw_ops.gmp_linear_backward.cpp(
                    grad_output, x, angles, radius, activated, direction, *rest
                )
            # The op computes the rows' gradient in the same way, so that only the recurrence can differ.
            grad_rows = (radius * grad_output).T @ x
            expected = torch.ops.lcw_ops.hypersphere_direction_backward.cpp(grad_rows, angles)
            # The products may be added in another order.
            bound = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert grad_angles.is_contiguous()
            assert grad_angles.shape == angles.shape
            assert (grad_angles - expected).abs().max() <= bound, (n, m, count)


def test_python_asks_the_kernel_how_few_samples_are_few():
    """Only the kernel has the number. A compiled program takes it as a constant."""
    assert torch.ops.lcw_ops.gmp_linear_few_samples.cpp() == hypersphere.few_samples("cpp") == FUSED
    compiled = torch.compile(lambda x: x * hypersphere.few_samples("cpp"), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == FUSED
