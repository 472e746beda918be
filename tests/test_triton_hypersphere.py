"""The Triton kernels of weights on the hypersphere against the float64 reference, through the registered ops.

Without a GPU they run in Triton's interpreter, in the process that test_triton_kernels.py starts: every shape here is
as small as what it shows allows.
"""

import importlib
import math
import os

import pytest
import torch
from support.numerics import assert_as_exact_as_eager, hostile_layouts

from lcw_ops import reference
from lcw_ops.ops import backends, library
from lcw_ops.ops import hypersphere as op

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICE_TYPE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu")).type
if (missing := backends.missing_reason(op.NAME, "triton", DEVICE_TYPE)) is not None:
    pytest.skip(f"{missing}; test_triton_kernels.py starts such a process", allow_module_level=True)

kernels = importlib.import_module("lcw_ops.kernels.hypersphere")

pytestmark = pytest.mark.usefixtures("one_thread")

direction, direction_backward, normalize, normalize_backward, gmp, gmp_backward, weight_norm, weight_norm_backward = (
    library.get_overload(name, "triton")
    for name in (
        op.DIRECTION,
        op.DIRECTION_BACKWARD,
        op.NORMALIZE,
        op.NORMALIZE_BACKWARD,
        op.GMP_LINEAR,
        op.GMP_LINEAR_BACKWARD,
        op.WEIGHT_NORM_LINEAR,
        op.WEIGHT_NORM_LINEAR_BACKWARD,
    )
)


@pytest.fixture(autouse=True)
def _interpreted_bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as the integers of its bits, and its product multiplies these (Triton 3.7)."""
    if DEVICE_TYPE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        wide = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, *wide, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def short_programs(monkeypatch):
    """Programs that hold 16 columns of a row; products whose columns several programs share."""
    monkeypatch.setattr(kernels, "ROW_BYTES", 64)
    monkeypatch.setattr(kernels, "WARP_LANES", 16)
    monkeypatch.setattr(kernels, "TILE_ROW_BYTES", 64)
    monkeypatch.setattr(kernels, "LEAST_STEPS", 1)
    monkeypatch.setattr(kernels, "LEAST_SUMMED_ROWS", 8)
    monkeypatch.setattr(kernels, "_device", lambda device: kernels.Device(1, 227 * 1024, False))


def normal(*shape, dtype=torch.float32, device):
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


def make_angles(units, fan_in, dtype=torch.float32, *, device):
    """Of directions that are uniform on the sphere: random angles would make late components vanish."""
    return reference.hypersphere_angles(normal(units, fan_in, dtype=torch.float64, device=device)).to(dtype)


def wide(*tensors):
    return [tensor.double() for tensor in tensors]


def assert_rows_match(units, fan_in, dtype, device):
    """The four ops on rows."""
    angles, gradient = (
        make_angles(units, fan_in, dtype, device=device),
        normal(units, fan_in, dtype=dtype, device=device),
    )
    weight, scale = normal(units, fan_in, dtype=dtype, device=device), normal(units, dtype=dtype, device=device)
    for name, function, plain, arguments in (
        ("direction", direction, reference.hypersphere_direction, (angles,)),
        ("direction_backward", direction_backward, reference.hypersphere_direction_backward, (gradient, angles)),
        ("normalize", normalize, reference.normalize_scale, (weight, scale)),
        ("normalize_backward", normalize_backward, reference.normalize_scale_backward, (gradient, weight, scale)),
    ):
        compare(name, function(*arguments), plain(*arguments), plain(*wide(*arguments)), fan_in)


def compare(name, actual, eager, exact, terms):
    if isinstance(actual, torch.Tensor):
        actual, eager, exact = (actual,), (eager,), (exact,)
    for i, triple in enumerate(zip(actual, eager, exact, strict=True)):
        if triple[0].dtype == torch.float64:
            # The exact result is one of float64 itself: both sum, and multiply, in some order.
            scale = max(1.0, triple[2].abs().max().item()) if triple[2].numel() else 1.0
            bound = 4 * math.sqrt(max(terms, 4)) * torch.finfo(torch.float64).eps * scale
            torch.testing.assert_close(triple[0], triple[2], rtol=0, atol=bound, msg=f"{name} {i}")
        else:
            assert triple[0].dtype == triple[1].dtype
            assert_as_exact_as_eager(f"{name} {i}", *triple)


def gradients(function, arguments, grad_output):
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_gmp_matches(rows, units, fan_in, dtype, device, relu=True):
    arguments = [
        normal(rows, fan_in, dtype=dtype, device=device),
        make_angles(units, fan_in, dtype, device=device),
        # Of both signs.
        normal(units, dtype=dtype, device=device),
        normal(units, dtype=dtype, device=device),
    ]
    grad_output = normal(rows, units, dtype=dtype, device=device)

    def layer(*arguments):
        return reference.gmp_linear(*arguments, "relu" if relu else None)

    output, activated, u = gmp(*arguments, relu, True, True, rows > kernels.FUSED_ROWS)
    x, angles, radius, _ = arguments
    # Which units are active is not decided anew: a rounded 0 may be either.
    actual = gmp_backward(grad_output, x, angles, radius, activated, u, relu, True, True, True, True, True)
    exact = gradients(layer, wide(*arguments), grad_output.double())
    compare("gmp", (output, *actual), gradients(eager_gmp(relu), arguments, grad_output), exact, max(rows, fan_in))


def eager_gmp(relu):
    """What a user of plain torch writes, every step in the parameters' dtype but the direction."""

    def layer(x, angles, radius, location):
        z = torch.nn.functional.linear(x, reference.hypersphere_direction(angles), location)
        return radius * (z.relu() if relu else z)

    return layer


def eager_weight_norm(x, weight, scale, bias):
    return torch.nn.functional.linear(x, reference.normalize_scale(weight, scale), bias)


def assert_weight_norm_matches(rows, units, fan_in, dtype, device):
    arguments = [
        normal(rows, fan_in, dtype=dtype, device=device),
        normal(units, fan_in, dtype=dtype, device=device),
        normal(units, dtype=dtype, device=device),
        normal(units, dtype=dtype, device=device),
    ]
    grad_output = normal(rows, units, dtype=dtype, device=device)
    output = weight_norm(*arguments, True)
    actual = weight_norm_backward(grad_output, *arguments[:3], True, True, True, True, True)
    exact = gradients(eager_weight_norm, wide(*arguments), grad_output.double())
    eager = gradients(eager_weight_norm, arguments, grad_output)
    compare("weight_norm", (output, *actual), eager, exact, max(rows, fan_in))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("units", "fan_in"), [(3, 1), (5, 2), (3, 3), (2, 65)])
def test_rows_in_every_dtype(units, fan_in, dtype, device):
    assert_rows_match(units, fan_in, dtype, device)


def test_wide_rows(device):
    assert_rows_match(1, 1152, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fan_in", [16, 17, 35])
def test_rows_longer_than_a_program_holds(fan_in, dtype, device, short_programs):
    assert_rows_match(2, fan_in, dtype, device)


def test_more_rows_than_a_program_has(device):
    assert_rows_match(131, 2, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 67])
def test_layers_in_every_dtype(rows, dtype, device):
    assert_gmp_matches(rows, 3, 19, dtype, device)
    assert_weight_norm_matches(rows, 3, 19, dtype, device)


@pytest.mark.parametrize(
    ("rows", "units", "fan_in"), [(1, 1, 1), (1, 3, 2), (2, 1, 3), (64, 2, 7), (65, 2, 7), (7, 33, 5)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_layers_of_every_size(rows, units, fan_in, relu, device):
    assert_gmp_matches(rows, units, fan_in, torch.float32, device, relu)
    assert_weight_norm_matches(rows, units, fan_in, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_programs_share_a_unit(dtype, device, short_programs):
    launch = kernels.choose_launch(3, 2, 35, dtype.itemsize, kernels._device(device))
    assert launch["splits"] > 1
    assert_gmp_matches(3, 2, 35, dtype, device)
    assert_weight_norm_matches(3, 2, 35, dtype, device)


def test_samples_summed_by_several_programs(device, short_programs):
    assert_gmp_matches(67, 2, 5, torch.float32, device)


@pytest.mark.parametrize(("rows", "units", "fan_in"), [(0, 3, 4), (3, 0, 4), (0, 0, 1), (70, 0, 4)])
def test_nothing_to_multiply(rows, units, fan_in, device):
    for relu in (False, True):
        assert_gmp_matches(rows, units, fan_in, torch.float32, device, relu)
    assert_weight_norm_matches(rows, units, fan_in, torch.float32, device)
    assert_rows_match(units, fan_in, torch.float32, device)


def test_gradients_that_are_not_needed_are_empty(device):
    x, angles = normal(3, 5, device=device), make_angles(2, 5, device=device)
    radius, location, weight = (normal(*shape, device=device) for shape in ((2,), (2,), (2, 5)))
    grad_output, empty = normal(3, 2, device=device), x.new_empty((0,))
    output, activated, u = gmp(x, angles, radius, location, True, False, True, False)
    assert u.shape == (0,)
    arguments = grad_output, x, angles, radius, activated, u, True, False
    everything = gmp_backward(*arguments, True, True, True, True)
    norm_arguments = grad_output, x, weight, radius, False
    norm_everything = weight_norm_backward(*norm_arguments, True, True, True, True)
    for i in range(4):
        needs = [j == i for j in range(4)]
        for all_of_them, one in (
            (everything, gmp_backward(*arguments, *needs)),
            (norm_everything, weight_norm_backward(*norm_arguments, *needs)),
        ):
            assert torch.equal(one[i], all_of_them[i])
            assert all(one[j].shape == (0,) for j in range(4) if j != i)
    # Nothing was kept: the output does not change.
    assert torch.equal(gmp(x, angles, radius, location, True, False, False, False)[0], output)
    plain = gmp(x, angles, radius, location, False, False, False, False)
    assert plain[1].shape == plain[2].shape == (0,)
    grad_x = gmp_backward(grad_output, x, angles, radius, empty, empty, False, False, True, False, False, False)[0]
    torch.testing.assert_close(grad_x, (radius * grad_output) @ reference.hypersphere_direction(angles))


def test_kept_directions_are_the_directions(device):
    x, angles = normal(66, 5, device=device), make_angles(2, 5, device=device)
    radius, location = normal(2, device=device), normal(2, device=device)
    for rows in (2, 66):
        _, activated, u = gmp(x[:rows], angles, radius, location, False, True, True, True)
        assert torch.equal(u, direction(angles))
        torch.testing.assert_close(activated, x[:rows] @ u.mT + location, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_poles(dtype, device):
    """sin t = 0: a direction that ends, and gradients without a division."""
    angles = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.7, 0.0, 1.1, -0.4], [0.0, 1.3, 0.0, 2.0], [math.pi, 2.0, -1.0, 0.0]],
        dtype=dtype,
        device=device,
    )
    gradient = normal(4, 5, dtype=dtype, device=device)
    u, grad_angles = direction(angles), direction_backward(gradient, angles)
    assert torch.equal(u[0], torch.eye(5, dtype=dtype, device=device)[0])
    compare("u", u, reference.hypersphere_direction(angles), reference.hypersphere_direction(angles.double()), 5)
    plain = reference.hypersphere_direction_backward
    compare("gradient", grad_angles, plain(gradient, angles), plain(*wide(gradient, angles)), 5)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e6), (torch.float64, 1e6), (torch.bfloat16, 1e4)])
def test_angles_of_many_turns(dtype, largest, device):
    """Both reductions, and where one ends and the other begins; of either sign."""
    sizes = torch.logspace(-6, math.log10(largest), 40, dtype=torch.float64, device=device)
    edge = torch.tensor([799.9, 800.1, math.pi, 1e5, math.pi / 4], dtype=torch.float64, device=device)
    t = torch.cat([sizes, -sizes, edge]).to(dtype)[:, None]
    u = direction(t)
    exact = torch.cat([t.double().cos(), t.double().sin()], 1)
    if dtype == torch.float64:
        torch.testing.assert_close(u, exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
        return
    # Relative to each component: also where it is next to nothing.
    assert ((u.double() - exact).abs() <= 1.5 * torch.finfo(dtype).eps * exact.abs() + 1e-12).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_angles_spoil_what_follows_them(bad, device):
    angles = make_angles(3, 20, device=device)
    clean, gradient = direction(angles), normal(3, 20, device=device)
    clean_gradient = direction_backward(gradient, angles)
    angles[1, 9] = bad
    u, grad_angles = direction(angles), direction_backward(gradient, angles)
    assert u[1, 9:].isnan().all()
    assert torch.equal(u[1, :9], clean[1, :9])
    assert grad_angles[1].isnan().all()
    assert torch.equal(u[[0, 2]], clean[[0, 2]])
    assert torch.equal(grad_angles[[0, 2]], clean_gradient[[0, 2]])


def test_a_bad_gradient_spoils_what_lies_before_it(device):
    angles, gradient = make_angles(3, 20, device=device), normal(3, 20, device=device)
    clean = direction_backward(gradient, angles)
    gradient[1, 9] = float("nan")
    spoiled = direction_backward(gradient, angles)
    assert spoiled[1, :10].isnan().all()
    assert torch.equal(spoiled[1, 10:], clean[1, 10:])
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("rows", [4, 66])
def test_nan_stays_in_its_sample_and_its_unit(rows, device):
    """And passes through the ReLU, forward and backward, as torch's."""
    x, angles, weight = normal(rows, 5, device=device), make_angles(3, 5, device=device), normal(3, 5, device=device)
    radius, location, grad_output = normal(3, device=device), normal(3, device=device), normal(rows, 3, device=device)
    x[1, 2] = angles[2, 1] = weight[2, 1] = float("nan")
    output, activated, u = gmp(x, angles, radius, location, True, True, True, False)
    projected = weight_norm(x, weight, radius, location, True)
    for result in (output, activated, projected):
        assert result[1].isnan().all()
        assert result[:, 2].isnan().all()
        assert result[[0, 2, 3]][:, :2].isfinite().all()
    grads = gmp_backward(grad_output, x, angles, radius, activated, u, True, True, True, True, True, True)
    leaves = [tensor.double().requires_grad_() for tensor in (x, angles, radius, location)]
    exact = torch.autograd.grad(reference.gmp_linear(*leaves, "relu"), leaves, grad_output.double())
    for actual, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows(dtype, device):
    """No direction: zero, with zero derivatives."""
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
    """Also where the size changes within a row: what was summed before is scaled anew."""
    if short:
        request.getfixturevalue("short_programs")
    info = torch.finfo(dtype)
    weight = normal(5, 40, dtype=torch.float64, device=device).clamp(-2, 2)
    # The interpreter does not know bfloat16's subnormal numbers (Triton 3.7).
    below = 8 if dtype.itemsize >= 4 or device.type == "cuda" else -4
    small, large = math.log2(info.smallest_normal) - below, math.log2(info.max) - 1.1
    steps = torch.linspace(small, large, 40, dtype=torch.float64, device=device)
    powers = torch.stack([small + 0 * steps, large + 0 * steps, steps, steps.flip(0), 0 * steps])
    # Two factors, for one alone would overflow.
    weight = (weight * 2 ** (powers / 2) * 2 ** (powers / 2)).to(dtype)
    scale, x = normal(5, dtype=dtype, device=device), normal(2, 40, dtype=dtype, device=device)
    exact = reference.normalize_scale(*wide(weight, scale))
    compare("normalized", normalize(weight, scale), reference.normalize_scale(weight, scale), exact, 40)
    expected = torch.nn.functional.linear(x.double(), exact)
    eager = torch.nn.functional.linear(x, reference.normalize_scale(weight, scale))
    compare("output", weight_norm(x, weight, scale, None, True), eager, expected, 40)


@pytest.mark.parametrize("name", ["x", "angles", "radius", "location", "grad_output"])
def test_hostile_strides(name, device):
    values = {
        "x": normal(3, 5, device=device),
        "angles": make_angles(4, 5, device=device),
        "radius": normal(4, device=device),
        "location": normal(4, device=device),
        "grad_output": normal(3, 4, device=device),
    }

    def results(x, angles, radius, location, grad_output):
        output, activated, u = gmp(x, angles, radius, location, True, True, True, False)
        needs = (True,) * 4
        row_gradient = grad_output[:1].expand(4, -1)
        return [
            output,
            direction(angles),
            direction_backward(row_gradient[:, :1].expand(4, 5), angles),
            normalize(angles, radius),
            *normalize_backward(row_gradient, angles, radius),
            weight_norm(x[:, 1:], angles, radius, location, True),
            *gmp_backward(grad_output, x, angles, radius, activated, u, True, True, *needs),
            *weight_norm_backward(grad_output, x[:, 1:], angles, radius, True, *needs),
        ]

    expected = results(**values)
    for layout_name, layout in hostile_layouts(values[name]).items():
        for actual, wanted in zip(results(**values | {name: layout}), expected, strict=True):
            # torch's own products may sum another layout in another order.
            torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=2e-6, msg=f"{name} {layout_name}")


def test_same_bits_every_time(device, short_programs):
    x, angles, weight = normal(9, 40, device=device), make_angles(3, 40, device=device), normal(3, 40, device=device)
    radius, location, grad_output = normal(3, device=device), normal(3, device=device), normal(9, 3, device=device)

    def results():
        output, activated, u = gmp(x, angles, radius, location, True, False, True, False)
        needs = (True,) * 4
        return [
            output,
            weight_norm(x, weight, radius, location, False),
            *gmp_backward(grad_output, x, angles, radius, activated, u, True, False, *needs),
        ]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_opcheck(device):
    x, angles, weight = normal(2, 5, device=device), make_angles(3, 5, device=device), normal(3, 5, device=device)
    per_unit, grad_output, empty = normal(3, device=device), normal(2, 3, device=device), x.new_empty((0,))
    for function, arguments in (
        (direction, (angles,)),
        (direction_backward, (weight, angles)),
        (normalize, (weight, per_unit)),
        (normalize_backward, (weight, weight, per_unit)),
        (gmp, (x, angles, per_unit, per_unit, True, True, True, True)),
        (gmp_backward, (grad_output, x, angles, per_unit, grad_output, empty, True, True, True, True, False, False)),
        (weight_norm, (x, weight, per_unit, None, True)),
        (weight_norm_backward, (grad_output, x, weight, per_unit, True, True, False, True, False)),
    ):
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_layers_know_when_kernels_are_fused():
    assert op.FUSED_ROWS["triton"] == kernels.FUSED_ROWS


def test_launches_fill_the_gpu():
    """Every column belongs to one part and none is empty; a row fits its program's warps."""
    device = kernels.Device(132, 227 * 1024, False)
    for rows in (1, 16, 33, 64):
        for units in (1, 100, 4096, 10**6):
            for features in (1, 63, 4096, 10**6, 3 * 2**30):
                for itemsize in (2, 4, 8):
                    launch = kernels.choose_launch(rows, units, features, itemsize, device)
                    assert (launch["splits"] - 1) * launch["chunk"] < features <= launch["splits"] * launch["chunk"]
                    assert launch["chunk"] % launch["BLOCK_K"] == 0
                    assert launch["BLOCK_M"] >= rows
                    row_launch = kernels._direction_launch(units, features, itemsize, device)
                    assert row_launch["num_warps"] in (1, 2, 4, 8, 16)
                    assert row_launch["ROWS"] * row_launch["LANES"] == row_launch["num_warps"] * 32 * kernels.GROUP
    # The layer that counts: a warp for every row. A few long rows: as many as a row can have.
    assert kernels._direction_launch(4096, 4096, 4, device)["num_warps"] == 1
    assert kernels._direction_launch(16, 16384, 4, device)["num_warps"] == 16
