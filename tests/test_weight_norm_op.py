"""Tests of weight norm's op beyond those that it shares with GmP's, which are in test_hypersphere_op.py."""

import itertools

import numpy as np
import pytest
import torch
from support.numerics import as_exact, assert_by_the_rule, evaluate
from support.unit_ops import (
    FUSED,
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


@pytest.fixture
def compiled_kernel():
    with lcw_ops.use_backend("cpp"):
        yield


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


def test_the_backend_is_chosen_under_the_stems_own_name():
    assert weight_norm.NAME == "normalize_scale"
    assert backends.choose(weight_norm.NAME, torch.device("cpu")) == "cpp"
    with lcw_ops.use_backend("cuda"), pytest.raises(lcw_ops.BackendError, match="normalize_scale: backend 'cuda'"):
        F.weight_norm_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
