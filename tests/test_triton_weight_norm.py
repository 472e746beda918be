"""The Triton kernels of weight normalization against the float64 reference, through the registered ops.

Without a GPU they run in Triton's interpreter (see support/triton_process.py), which is slow: every shape is as small
as its test allows.
"""

import math

import pytest
import torch
from support.numerics import hostile_layouts
from support.triton_layers import (
    DTYPES,
    EMPTY_SHAPES,
    LAYER_SHAPES,
    assert_only_needed,
    compare,
    gradients,
    normal,
    use_short_programs,
    wide,
)
from support.triton_process import import_kernels, multiply_bfloat16

from lcw_ops import reference
from lcw_ops.ops import library
from lcw_ops.ops import weight_norm as op

kernels = import_kernels("weight_norm", op.NAME)

pytestmark = pytest.mark.usefixtures("one_thread")

normalize, normalize_backward, weight_norm, weight_norm_backward = (
    library.get_overload(name, "triton")
    for name in (op.NORMALIZE, op.NORMALIZE_BACKWARD, op.WEIGHT_NORM_LINEAR, op.WEIGHT_NORM_LINEAR_BACKWARD)
)


@pytest.fixture(autouse=True)
def _interpreted_bfloat16_products(monkeypatch):
    multiply_bfloat16(monkeypatch)


@pytest.fixture
def short_programs(monkeypatch):
    use_short_programs(monkeypatch, kernels)


def assert_rows_match(units, features, dtype, device):
    """Judge both ops on rows, the normalisation and its backward."""
    weight, gradient = (normal(units, features, dtype=dtype, device=device) for _ in range(2))
    scale = normal(units, dtype=dtype, device=device)
    for name, function, plain, arguments in (
        ("normalize", normalize, reference.normalize_scale, (weight, scale)),
        ("normalize_backward", normalize_backward, reference.normalize_scale_backward, (gradient, weight, scale)),
    ):
        compare(name, function(*arguments), plain(*arguments), plain(*wide(*arguments)), features)


def eager_weight_norm(x, weight, scale, bias):
    return torch.nn.functional.linear(x, reference.normalize_scale(weight, scale), bias)


def assert_layer_matches(rows, units, features, dtype, device):
    shapes = (rows, features), (units, features), (units,), (units,)
    arguments = [normal(*shape, dtype=dtype, device=device) for shape in shapes]
    grad_output = normal(rows, units, dtype=dtype, device=device)
    output = weight_norm(*arguments, True)
    actual = weight_norm_backward(grad_output, *arguments[:3], True, True, True, True, True)
    exact = gradients(eager_weight_norm, wide(*arguments), grad_output.double())
    eager = gradients(eager_weight_norm, arguments, grad_output)
    compare("weight_norm", (output, *actual), eager, exact, max(rows, features))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("units", "features"), [(3, 1), (5, 2), (3, 3), (2, 65)])
def test_rows_in_every_dtype(units, features, dtype, device):
    assert_rows_match(units, features, dtype, device)


def test_wide_rows(device):
    assert_rows_match(1, 1152, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", [32, 33, 67])
def test_rows_longer_than_a_program_holds(features, dtype, device, short_programs):
    assert_rows_match(5, features, dtype, device)


def test_more_rows_than_a_program_has(device):
    assert_rows_match(131, 2, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 67])
def test_layers_in_every_dtype(rows, dtype, device):
    assert_layer_matches(rows, 3, 19, dtype, device)


@pytest.mark.parametrize(("rows", "units", "features"), LAYER_SHAPES)
def test_layers_of_every_size(rows, units, features, device):
    assert_layer_matches(rows, units, features, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_programs_share_a_unit(dtype, device, short_programs):
    launch = kernels.choose_fused_launch(3, 2, 70, dtype.itemsize, kernels.device_facts(device))
    assert launch["splits"] > 1
    assert_layer_matches(3, 2, 70, dtype, device)


@pytest.mark.parametrize(("rows", "units", "features"), EMPTY_SHAPES)
def test_nothing_to_multiply(rows, units, features, device):
    assert_layer_matches(rows, units, features, torch.float32, device)
    assert_rows_match(units, features, torch.float32, device)


def test_gradients_that_are_not_needed_are_empty(device):
    x, weight, scale = (normal(*shape, device=device) for shape in ((3, 5), (2, 5), (2,)))
    assert_only_needed(weight_norm_backward, (normal(3, 2, device=device), x, weight, scale, False))


@pytest.mark.parametrize("rows", [4, 66])
def test_nan_stays_in_its_sample_and_its_unit(rows, device):
    x, weight = normal(rows, 5, device=device), normal(3, 5, device=device)
    scale, bias, grad_output = normal(3, device=device), normal(3, device=device), normal(rows, 3, device=device)
    x[1, 2] = weight[2, 1] = float("nan")
    output = weight_norm(x, weight, scale, bias, True)
    assert output[1].isnan().all()
    assert output[:, 2].isnan().all()
    assert output[[0, 2, 3]][:, :2].isfinite().all()
    actual = weight_norm_backward(grad_output, x, weight, scale, True, True, True, True, True)
    exact = gradients(eager_weight_norm, wide(x, weight, scale, bias), grad_output.double())[1:]
    for one, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows(dtype, device):
    """A zero row has no direction: its result is zero, and so are its derivatives."""
    weight, scale = normal(3, 6, dtype=dtype, device=device), normal(3, dtype=dtype, device=device)
    weight[1] = 0
    gradient, x = normal(3, 6, dtype=dtype, device=device), normal(2, 6, dtype=dtype, device=device)
    grad_weight, grad_scale = normalize_backward(gradient, weight, scale)
    for result in (normalize(weight, scale), grad_weight, grad_scale[:, None]):
        assert result.isfinite().all()
        assert torch.equal(result[1], torch.zeros_like(result[1]))
    bias = normal(3, dtype=dtype, device=device)
    assert torch.equal(weight_norm(x, weight, scale, bias, True)[:, 1], bias[1].expand(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("short", [False, True])
def test_lengths_from_the_smallest_to_the_largest_float(dtype, short, device, request):
    """Sizes may change within a row too, so that the sum of earlier squares must be rescaled."""
    if short:
        request.getfixturevalue("short_programs")
    info = torch.finfo(dtype)
    weight = normal(5, 70, dtype=torch.float64, device=device).clamp(-2, 2)
    # The interpreter does not know bfloat16's subnormal numbers (Triton 3.7).
    below = 8 if dtype.itemsize >= 4 or device.type == "cuda" else -4
    small, large = math.log2(info.smallest_normal) - below, math.log2(info.max) - 1.1
    steps = torch.linspace(small, large, 70, dtype=torch.float64, device=device)
    powers = torch.stack([small + 0 * steps, large + 0 * steps, steps, steps.flip(0), 0 * steps])
    # As a single factor, 2 ** powers may be below float64's normal numbers.
    weight = (weight * 2 ** (powers / 2) * 2 ** (powers / 2)).to(dtype)
    scale, x = normal(5, dtype=dtype, device=device), normal(2, 70, dtype=dtype, device=device)
    exact = reference.normalize_scale(*wide(weight, scale))
    compare("normalized", normalize(weight, scale), reference.normalize_scale(weight, scale), exact, 70)
    expected = torch.nn.functional.linear(x.double(), exact)
    eager = torch.nn.functional.linear(x, reference.normalize_scale(weight, scale))
    compare("output", weight_norm(x, weight, scale, None, True), eager, expected, 70)


@pytest.mark.parametrize("name", ["x", "weight", "scale", "bias", "grad_output"])
def test_hostile_strides(name, device):
    shapes = {"x": (3, 4), "weight": (4, 4), "scale": (4,), "bias": (4,), "grad_output": (3, 4)}
    values = {argument: normal(*shape, device=device) for argument, shape in shapes.items()}

    def results(x, weight, scale, bias, grad_output):
        return [
            normalize(weight, scale),
            *normalize_backward(grad_output[:1].expand(4, -1), weight, scale),
            weight_norm(x, weight, scale, bias, True),
            *weight_norm_backward(grad_output, x, weight, scale, True, *(True,) * 4),
        ]

    expected = results(**values)
    for layout_name, layout in hostile_layouts(values[name]).items():
        for actual, wanted in zip(results(**values | {name: layout}), expected, strict=True):
            # torch's own products may sum another layout in another order.
            torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=2e-6, msg=f"{name} {layout_name}")


def test_same_bits_every_time(device, short_programs):
    x, weight = normal(9, 70, device=device), normal(3, 70, device=device)
    scale, bias, grad_output = normal(3, device=device), normal(3, device=device), normal(9, 3, device=device)

    def results():
        gradients = weight_norm_backward(grad_output, x, weight, scale, False, *(True,) * 4)
        return [weight_norm(x, weight, scale, bias, False), *gradients]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_opcheck(device):
    x, weight, scale = normal(2, 5, device=device), normal(3, 5, device=device), normal(3, device=device)
    for function, arguments in (
        (normalize, (weight, scale)),
        (normalize_backward, (weight, weight, scale)),
        (weight_norm, (x, weight, scale, None, True)),
        (weight_norm_backward, (normal(2, 3, device=device), x, weight, scale, True, True, False, True, False)),
    ):
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
