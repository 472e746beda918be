"""Weight norm's ops on the compiled CPU kernels: rows and their layer. support/unit_op_tests.py has the rule."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.numerics import as_exact, assert_by_the_rule, evaluate, needs_more_digits, saved_tensors
from support.unit_op_tests import *  # noqa: F403
from support.unit_op_tests import (
    ONES,
    assert_arguments_are_left_as_they_were,
    assert_arguments_may_depend_on_each_other,
    assert_bad_values_stay_in_their_row,
    assert_refused_in_every_mode,
    assert_wrong_arguments_are_refused,
    ones,
)
from support.unit_ops import (
    DTYPES,
    FUSED,
    OPS,
    WEIGHT_NORM,
    draw_normalize,
    draw_weight_norm,
    exact_weight_norm,
    normal,
    plain_weight_norm,
)

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import reference
from lcw_ops.ops import backends, weight_norm

pytestmark = pytest.mark.usefixtures("compiled_kernel", "one_thread")

STEM = WEIGHT_NORM


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fan_in_1(dtype):
    """The normalised weight of a unit of one input is the weight's sign."""
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


def test_arguments_are_left_as_they_were_without_bias():
    assert_arguments_are_left_as_they_were(OPS["weight norm without bias"])


def test_only_arguments_are_kept_for_backward():
    for rows in (FUSED, FUSED + 1):
        arguments, _ = draw_weight_norm(64, 100, torch.float32, rows)
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in arguments.items()}
        _, saved = saved_tensors(lambda leaves=leaves: F.weight_norm_linear(**leaves))
        assert {tensor.data_ptr() for tensor in saved} <= {leaf.data_ptr() for leaf in leaves.values()}


# ---- Rows of zeros, of NaN and infinity, and of any length -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_stay_zero_with_zero_derivatives(op, dtype):
    for rows in (5, FUSED + 1):
        for m in (1, 7, 40):
            arguments, grad_output = op.draw(6, m, dtype, rows)
            arguments["weight"][[1, 5]] = 0.0
            result = evaluate(op.ours, arguments, grad_output)
            output = result["output"] if op is OPS["normalize"] else result["output"].T
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
def test_rows_of_any_length(op, dtype):
    """Squares of such numbers are 0 or infinite in their dtype; entries may be the smallest and the largest floats."""
    needs_more_digits(dtype)
    entries = torch.linspace(-3, 3, 30 * 23, dtype=torch.float64).view(30, 23).flip(0)
    for length in LENGTHS[dtype]:
        for rows in (3, FUSED + 1):
            arguments, grad_output = op.draw(30, 23, dtype, rows)
            arguments["weight"] = (entries * min(length, 1e306)).to(dtype)
            assert arguments["weight"].isfinite().all()
            # The shorter a row, the larger the gradient of its weight.
            if length < 1:
                grad_output = grad_output * max(length, torch.finfo(dtype).smallest_normal)
            result, eager = (evaluate(f, arguments, grad_output) for f in (op.ours, op.plain))
            exact = op.exact(arguments, grad_output)
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


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", WEIGHT_NORM.layers)
def test_nan_and_infinity_stay_in_their_row(name, bad):
    assert_bad_values_stay_in_their_row(OPS[name], bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_entry_spoils_its_own_row_only(dtype, bad):
    others = [0, 2]
    for width, place in [(1, 0), (4, 2), (20, 0), (20, 13), (40, 39)]:
        arguments, grad_output = draw_normalize(3, width + 1, dtype)
        clean = evaluate(F.normalize_scale, arguments, grad_output)
        arguments["weight"][1, place] = bad
        spoilt = evaluate(F.normalize_scale, arguments, grad_output)
        assert not spoilt["output"][1, place].isfinite()
        for name in clean:
            assert torch.equal(spoilt[name][others], clean[name][others]), name


@pytest.mark.parametrize(
    ("dtype", "size", "scale"), [(torch.float16, 1e-4, 100.0), (torch.float32, 1e-9, 1e35), (torch.float32, 1e9, 1e-30)]
)
def test_a_scale_far_from_the_rows_length_overflows_nothing(dtype, size, scale):
    """The gradient of x is finite where the normalised weight is, although scale / length is not."""
    weight = (size * normal(5, 64, dtype=torch.float64)).to(dtype)
    scales = torch.full((5,), scale, dtype=dtype)
    for rows in (FUSED, FUSED + 1):
        x, cotangent = normal(rows, 64, dtype=dtype).requires_grad_(), normal(rows, 5, dtype=dtype)
        result = F.weight_norm_linear(x, weight.requires_grad_(), scales)
        grad_x, _ = torch.autograd.grad(result, (x, weight), cotangent)
        exact = cotangent.double() @ reference.normalize_scale(weight.double(), scales.double())
        # Both factors and the result are rounded, and five terms are added.
        error = (grad_x.double() - exact).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * exact.abs().max()


# Numbers of samples for each way to compute a layer of 400 inputs: few, the largest number that counts as few, one of
# up to a quarter of the inputs, and one above that.
WAYS = (2, 64, 65, 101)


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weight_norm_of_huge_inputs_overflows_only_where_its_result_does(dtype):
    """Products with rows that are longer than their scale may overflow although the output does not."""
    m = 400
    for rows in WAYS:
        weight = (100 * normal(6, m, dtype=torch.float64)).to(dtype)
        scale, bias = torch.ones(6, dtype=dtype), normal(6, dtype=dtype)
        x = normal(rows, m, dtype=torch.float64).to(dtype)
        # The largest x is 0.3 of the largest number, and the output is of that size. A product with the row itself,
        # whose length is about 2000, would overflow.
        x[1] *= 0.3 * torch.finfo(dtype).max / x[1].abs().max()
        output = F.weight_norm_linear(x, weight, scale, bias)
        assert output.isfinite().all(), rows
        direction = as_exact(weight) / np.linalg.norm(as_exact(weight), axis=1, keepdims=True)
        exact = as_exact(x) @ direction.T + as_exact(bias)
        size = np.abs(as_exact(x)) @ np.abs(direction.T) + np.abs(as_exact(bias))
        # m terms are added in any order; in 16 bits the row, the product and the result are rounded as well.
        digits = 2.0**-24 if dtype == torch.bfloat16 else torch.finfo(dtype).eps
        rounded = 3 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        assert (np.abs(as_exact(output) - exact) <= (m * digits + rounded) * size).all(), rows


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("length", [1e-30, 1e-6, 1e6, 1e30])
def test_one_row_of_another_length_changes_no_result_by_more_than_roundings(length):
    """A row whose length is far from 1 makes the whole layer be computed in another way."""
    for rows in WAYS:
        arguments, grad_output = draw_weight_norm(5, 400, torch.float32, rows)
        changed = {**arguments, "weight": arguments["weight"].clone()}
        changed["weight"][2] *= length / changed["weight"][2].norm()
        exact = exact_weight_norm(changed, grad_output)
        actual = evaluate(F.weight_norm_linear, changed, grad_output)
        eager = evaluate(plain_weight_norm, changed, grad_output)
        for name in ("output", "x", "scale"):
            assert_by_the_rule(f"{name}, {rows} samples", [actual[name]], [eager[name]], [exact[name]])
        for unit in range(5):
            one, other, right = (result["weight"][unit] for result in (actual, eager, exact))
            assert_by_the_rule(f"weight {unit}, {rows} samples", [one], [other], [right])


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_weight_norm_overflow_only_where_they_must(dtype):
    """A factor scale / length far above 1, or a long row, does not make a finite gradient overflow."""
    m, largest = 400, torch.finfo(dtype).max
    for rows, length, size in itertools.product(WAYS, (3e-5, 6e4), (largest / 1e4, 1.0)):
        weight = normal(5, m, dtype=torch.float64)
        weight = (weight * length / weight.norm(dim=1, keepdim=True)).to(dtype)
        arguments = {"x": normal(rows, m, dtype=dtype), "weight": weight, "scale": torch.ones(5, dtype=dtype)}
        grad_output = (normal(rows, 5, dtype=torch.float64) * size / 1e3).to(dtype)
        exact = exact_weight_norm(arguments, grad_output)
        result = evaluate(F.weight_norm_linear, arguments, grad_output)
        for name in ("x", "weight", "scale"):
            is_in_range = np.abs(exact[name]) < float(largest) / 4
            assert result[name].isfinite().numpy()[is_in_range].all(), (name, rows, length, size)


@pytest.mark.usefixtures("every_multiplier")
def test_pruned_units_do_not_change_how_others_are_computed():
    """A row of zeros, or a scale near zero, is an ordinary number: the rest of the layer keeps its bits."""
    others = [0, 2, 4]
    for rows, dtype in itertools.product(WAYS, (torch.float32, torch.bfloat16)):
        arguments, grad_output = draw_weight_norm(5, 400, dtype, rows)
        clean = evaluate(F.weight_norm_linear, arguments, grad_output)
        pruned = {name: tensor.clone() for name, tensor in arguments.items()}
        pruned["weight"][1], pruned["scale"][3] = 0, 1e-12
        result = evaluate(F.weight_norm_linear, pruned, grad_output)
        assert torch.equal(result["output"][:, others], clean["output"][:, others]), rows
        bias = arguments["bias"] if "bias" in arguments else torch.zeros(5, dtype=dtype)
        assert torch.equal(result["output"][:, 1], bias[1].expand(rows))
        for name in ("weight", "scale"):
            assert torch.equal(result[name][others], clean[name][others]), (name, rows)
            assert not result[name][1].any()


# ---- Direct calls, autograd, and errors ------------------------------------------------------------------------------


def test_opcheck():
    ops = torch.ops.lcw_ops
    checked = set()

    def check(overload, *arguments):
        checked.add(str(overload))
        torch.library.opcheck(overload, arguments)

    for n, m, rows, dtype in [(4, 6, 3, torch.float32), (2, 1, FUSED + 8, torch.bfloat16)]:
        arguments, grad_output = draw_normalize(n, m, dtype)
        check(ops.normalize_scale.cpp, *arguments.values())
        check(ops.normalize_scale_backward.cpp, grad_output, *arguments.values())
        arguments, grad_output = draw_weight_norm(n, m, dtype, rows)
        x, weight, scale, some_bias = arguments.values()
        for bias in (some_bias, None):
            check(ops.weight_norm_linear.cpp, x, weight, scale, bias, False)
            needs = (True, bias is None, True, bias is not None)
            check(ops.weight_norm_linear_backward.cpp, grad_output, x, weight, scale, False, *needs)
    assert len(checked) == 4


def test_arguments_that_depend_on_each_other():
    def norm_twice(x, weight):
        once = F.weight_norm_linear(x, weight, weight.norm(dim=1))
        return F.weight_norm_linear(once, weight, weight[0], weight[0])

    x, square = normal(5, 4, dtype=torch.float64), normal(4, 4, dtype=torch.float64)
    assert_arguments_may_depend_on_each_other(norm_twice, x, square)


def layer_of_ones(x=(2, 4), weight=(3, 4), scale=(3,), bias=(3,), **dtypes):
    return F.weight_norm_linear(**ones({"x": x, "weight": weight, "scale": scale, "bias": bias}, dtypes))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.normalize_scale(ONES(3), ONES(3)), "normalize_scale: weight has shape"),
        (lambda: F.normalize_scale(ONES(3, 0), ONES(3)), r"weight has shape \(3, 0\); expected \(n, m\) with m >= 1"),
        (
            lambda: F.normalize_scale(ONES(3, 2), ONES(2)),
            r"scale has shape \(2,\); expected \(3,\), one value per unit",
        ),
        (lambda: F.normalize_scale(ONES(3, 2), ONES(3, 2)), r"scale has shape \(3, 2\)"),
        (lambda: F.normalize_scale(ONES(1, 2), ONES(())), r"scale has shape \(\)"),
        (lambda: layer_of_ones(x=(2, 3)), r"weight_norm_linear: x has shape \(2, 3\); expected \(\.\.\., 4\)"),
        (lambda: layer_of_ones(x=()), r"weight_norm_linear: x has shape \(\)"),
        (lambda: layer_of_ones(weight=(3, 4, 1)), "weight_norm_linear: weight has shape"),
        (lambda: layer_of_ones(x=(2, 0), weight=(3, 0)), "weight_norm_linear: weight has shape"),
        (lambda: layer_of_ones(scale=(4,)), "weight_norm_linear: scale has shape"),
        (lambda: layer_of_ones(bias=(1,)), "weight_norm_linear: bias has shape"),
    ],
)
def test_shapes_that_do_not_fit(call, words):
    assert_refused_in_every_mode(call, words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.normalize_scale(None, ONES(3)), "normalize_scale: weight is a NoneType"),
        (lambda: F.normalize_scale(ONES(3, 2), None), "normalize_scale: scale is a NoneType"),
        (lambda: F.normalize_scale(ONES(3, 2), 1.0), "normalize_scale: scale is a float"),
        (lambda: F.normalize_scale(ONES(3, 2), ONES(3).half()), "scale is torch.float16; expected torch.float32"),
        (lambda: F.weight_norm_linear(None, ONES(3, 4), ONES(3)), "weight_norm_linear: x is a NoneType"),
        (lambda: F.weight_norm_linear(ONES(2, 4), None, ONES(3)), "weight_norm_linear: weight is a NoneType"),
        (lambda: F.weight_norm_linear(ONES(2, 4), ONES(3, 4), None), "weight_norm_linear: scale is a NoneType"),
        (lambda: F.weight_norm_linear(ONES(2, 4), ONES(3, 4), ONES(3), [1.0]), "bias is a list"),
        (lambda: layer_of_ones(weight_dtype=torch.float64), "weight is torch.float64; expected torch.float32"),
        (lambda: layer_of_ones(scale_dtype=torch.float16), "scale is torch.float16; expected torch.float32"),
        (lambda: layer_of_ones(bias_dtype=torch.float16), "bias is torch.float16; expected torch.float32"),
    ],
)
def test_wrong_types_and_dtypes(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_float64_does_not_mix_under_autocast():
    x, weight, vector = normal(2, 4), normal(3, 4), normal(3)
    words = r"weight_norm_linear: weight is torch\.float32; expected torch\.float64"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=words):
        F.weight_norm_linear(x.double(), weight, vector)


def raw_calls():
    """Yield every op's name, its tensors by name and its options, all of them valid."""
    x, weight, per_unit = ONES(5, 4), ONES(3, 4), ONES(3)
    for bias in (None, per_unit):
        yield "weight_norm_linear", {"x": x, "weight": weight, "scale": per_unit, "bias": bias}, (False,)
    yield (
        "weight_norm_linear_backward",
        {"grad_output": ONES(5, 3), "x": x, "weight": weight, "scale": per_unit},
        (False, True, True, True, True),
    )
    yield "normalize_scale", {"weight": weight, "scale": per_unit}, ()
    yield "normalize_scale_backward", {"grad_output": ONES(3, 4), "weight": weight, "scale": per_unit}, ()


def test_ops_called_by_themselves_refuse_what_does_not_fit():
    """Direct calls must not read beyond an argument either."""
    free = {
        ("normalize_scale", "weight"): ("longer", "shorter"),
        ("weight_norm_linear", "x"): ("fewer rows", "more rows"),
        # torch's shape of the scale, (n, 1).
        ("weight_norm_linear", "scale"): ("one more dimension",),
        ("weight_norm_linear_backward", "scale"): ("one more dimension",),
    }
    assert_wrong_arguments_are_refused(raw_calls(), free)


@pytest.mark.parametrize("samples", [0, 2, 100])
def test_a_scale_in_torchs_shape_is_not_reshaped_by_autograd(samples):
    x, weight = torch.randn(samples, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    column = torch.randn(3, 1, requires_grad=True)
    vector, bias = column.detach().flatten().requires_grad_(), torch.randn(3, requires_grad=True)
    with lcw_ops.use_backend("cpp"):
        output, expected = (F.weight_norm_linear(x, weight, scale, bias) for scale in (column, vector))
    assert torch.equal(output, expected)
    assert all(node is None or node.name() == "torch::autograd::AccumulateGrad" for node, _ in next_nodes(output))
    gradients = torch.autograd.grad(output.square().sum(), (x, weight, column, bias))
    of_vector = torch.autograd.grad(expected.square().sum(), (x, weight, vector, bias))
    assert [gradient.shape for gradient in gradients] == [x.shape, weight.shape, (3, 1), (3,)]
    assert all(torch.equal(one.flatten(), other.flatten()) for one, other in zip(gradients, of_vector, strict=True))
    # zero_grad(set_to_none=False) detaches a gradient in place, which fails for a view.
    gradients[2].detach_()


def test_second_derivatives_of_a_scale_in_torchs_shape():
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (3, 4), (3, 1))]
    with lcw_ops.use_backend("cpp"):
        assert torch.autograd.gradgradcheck(F.weight_norm_linear, arguments)


def next_nodes(output):
    return output.grad_fn.next_functions


def test_the_backend_is_chosen_under_the_stems_own_name():
    assert weight_norm.NAME == "normalize_scale"
    assert backends.choose(weight_norm.NAME, torch.device("cpu")) == "cpp"
    with lcw_ops.use_backend("cuda"), pytest.raises(lcw_ops.BackendError, match="normalize_scale: backend 'cuda'"):
        F.weight_norm_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
