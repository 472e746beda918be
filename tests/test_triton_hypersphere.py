"""The Triton kernels of GmP against the float64 reference, through the registered ops.

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
from lcw_ops.ops import hypersphere as op
from lcw_ops.ops import library

kernels = import_kernels("hypersphere", op.NAME)

pytestmark = pytest.mark.usefixtures("one_thread")

direction, direction_backward, gmp, gmp_backward = (
    library.get_overload(name, "triton")
    for name in (op.DIRECTION, op.DIRECTION_BACKWARD, op.GMP_LINEAR, op.GMP_LINEAR_BACKWARD)
)


@pytest.fixture(autouse=True)
def _interpreted_bfloat16_products(monkeypatch):
    multiply_bfloat16(monkeypatch)


@pytest.fixture
def short_programs(monkeypatch):
    use_short_programs(monkeypatch, kernels)


def make_angles(units, fan_in, dtype=torch.float32, *, device):
    """Angles of directions that are uniform on the sphere: random angles would make late components vanish."""
    return reference.hypersphere_angles(normal(units, fan_in, dtype=torch.float64, device=device)).to(dtype)


def assert_rows_match(units, fan_in, dtype, device):
    """Judge both ops on rows, the directions and their backward."""
    angles = make_angles(units, fan_in, dtype, device=device)
    gradient = normal(units, fan_in, dtype=dtype, device=device)
    for name, function, plain, arguments in (
        ("direction", direction, reference.hypersphere_direction, (angles,)),
        ("direction_backward", direction_backward, reference.hypersphere_direction_backward, (gradient, angles)),
    ):
        compare(name, function(*arguments), plain(*arguments), plain(*wide(*arguments)), fan_in)


def assert_gmp_matches(rows, units, fan_in, dtype, device, relu=True):
    arguments = [
        normal(rows, fan_in, dtype=dtype, device=device),
        make_angles(units, fan_in, dtype, device=device),
        # The radius has both signs.
        normal(units, dtype=dtype, device=device),
        normal(units, dtype=dtype, device=device),
    ]
    grad_output = normal(rows, units, dtype=dtype, device=device)

    def layer(*arguments):
        return reference.gmp_linear(*arguments, "relu" if relu else None)

    output, activated, u = gmp(*arguments, relu, True, True, rows > kernels.FUSED_ROWS)
    x, angles, radius, _ = arguments
    # The backward takes the activated units from the forward, because a pre-activation near 0 may round to either sign.
    actual = gmp_backward(grad_output, x, angles, radius, activated, u, relu, True, True, True, True, True)
    exact = gradients(layer, wide(*arguments), grad_output.double())
    compare("gmp", (output, *actual), gradients(eager_gmp(relu), arguments, grad_output), exact, max(rows, fan_in))


def eager_gmp(relu):
    """The layer in plain torch. Every step but the direction is computed in the parameters' dtype."""

    def layer(x, angles, radius, location):
        z = torch.nn.functional.linear(x, reference.hypersphere_direction(angles), location)
        return radius * (z.relu() if relu else z)

    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("units", "fan_in"), [(3, 1), (5, 2), (3, 3), (2, 65)])
def test_rows_in_every_dtype(units, fan_in, dtype, device):
    assert_rows_match(units, fan_in, dtype, device)


def test_wide_rows(device):
    assert_rows_match(1, 1152, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fan_in", [32, 33, 67])
def test_rows_longer_than_a_program_holds(fan_in, dtype, device, short_programs):
    assert_rows_match(5, fan_in, dtype, device)


def test_more_rows_than_a_program_has(device):
    assert_rows_match(131, 2, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 67])
def test_layers_in_every_dtype(rows, dtype, device):
    assert_gmp_matches(rows, 3, 19, dtype, device)


@pytest.mark.parametrize(("rows", "units", "fan_in"), LAYER_SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_layers_of_every_size(rows, units, fan_in, relu, device):
    assert_gmp_matches(rows, units, fan_in, torch.float32, device, relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_programs_share_a_unit(dtype, device, short_programs):
    launch = kernels.choose_fused_launch(3, 2, 70, dtype.itemsize, kernels.device_facts(device))
    assert launch["splits"] > 1
    assert_gmp_matches(3, 2, 70, dtype, device)


def test_samples_summed_by_several_programs(device, short_programs):
    assert_gmp_matches(67, 2, 5, torch.float32, device)


@pytest.mark.parametrize(("rows", "units", "fan_in"), EMPTY_SHAPES)
def test_nothing_to_multiply(rows, units, fan_in, device):
    for relu in (False, True):
        assert_gmp_matches(rows, units, fan_in, torch.float32, device, relu)
    assert_rows_match(units, fan_in, torch.float32, device)


def test_gradients_that_are_not_needed_are_empty(device):
    x, angles = normal(3, 5, device=device), make_angles(2, 5, device=device)
    radius, location, grad_output = (normal(*shape, device=device) for shape in ((2,), (2,), (3, 2)))
    output, activated, u = gmp(x, angles, radius, location, True, False, True, False)
    assert u.shape == (0,)
    assert_only_needed(gmp_backward, (grad_output, x, angles, radius, activated, u, True, False))
    # The output has the same bits if nothing is kept.
    assert torch.equal(gmp(x, angles, radius, location, True, False, False, False)[0], output)
    plain, empty = gmp(x, angles, radius, location, False, False, False, False), x.new_empty((0,))
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
    """If sin t = 0 for an angle t, the direction ends in zeros. The gradients need no division by it."""
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
    """Both reductions of an angle to one turn, the angles near the limit between them, and either sign."""
    sizes = torch.logspace(-6, math.log10(largest), 40, dtype=torch.float64, device=device)
    edge = torch.tensor([799.9, 800.1, math.pi, 1e5, math.pi / 4], dtype=torch.float64, device=device)
    t = torch.cat([sizes, -sizes, edge]).to(dtype)[:, None]
    u = direction(t)
    exact = torch.cat([t.double().cos(), t.double().sin()], 1)
    if dtype == torch.float64:
        torch.testing.assert_close(u, exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
        return
    # The bound is relative to each component, even near 0.
    assert ((u.double() - exact).abs() <= 1.5 * torch.finfo(dtype).eps * exact.abs() + 1e-12).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_angles_spoil_the_components_behind_them(bad, device):
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


def test_a_bad_gradient_spoils_the_angles_before_it(device):
    angles, gradient = make_angles(3, 20, device=device), normal(3, 20, device=device)
    clean = direction_backward(gradient, angles)
    gradient[1, 9] = float("nan")
    spoiled = direction_backward(gradient, angles)
    assert spoiled[1, :10].isnan().all()
    assert torch.equal(spoiled[1, 10:], clean[1, 10:])
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("rows", [4, 66])
def test_nan_stays_in_its_sample_and_its_unit(rows, device):
    """A NaN passes the ReLU too, forward and backward, as in torch."""
    x, angles = normal(rows, 5, device=device), make_angles(3, 5, device=device)
    radius, location, grad_output = normal(3, device=device), normal(3, device=device), normal(rows, 3, device=device)
    x[1, 2] = angles[2, 1] = float("nan")
    output, activated, u = gmp(x, angles, radius, location, True, True, True, False)
    for result in (output, activated):
        assert result[1].isnan().all()
        assert result[:, 2].isnan().all()
        assert result[[0, 2, 3]][:, :2].isfinite().all()
    grads = gmp_backward(grad_output, x, angles, radius, activated, u, True, True, True, True, True, True)
    leaves = [tensor.double().requires_grad_() for tensor in (x, angles, radius, location)]
    exact = torch.autograd.grad(reference.gmp_linear(*leaves, "relu"), leaves, grad_output.double())
    for actual, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


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
        return [
            output,
            direction(angles),
            direction_backward(grad_output[:1, :1].expand(4, 5), angles),
            *gmp_backward(grad_output, x, angles, radius, activated, u, True, True, *needs),
        ]

    expected = results(**values)
    for layout_name, layout in hostile_layouts(values[name]).items():
        for actual, wanted in zip(results(**values | {name: layout}), expected, strict=True):
            # torch's own products may sum another layout in another order.
            torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=2e-6, msg=f"{name} {layout_name}")


def test_same_bits_every_time(device, short_programs):
    x, angles = normal(9, 70, device=device), make_angles(3, 70, device=device)
    radius, location, grad_output = normal(3, device=device), normal(3, device=device), normal(9, 3, device=device)

    def results():
        output, activated, u = gmp(x, angles, radius, location, True, False, True, False)
        needs = (True,) * 4
        return [output, *gmp_backward(grad_output, x, angles, radius, activated, u, True, False, *needs)]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_opcheck(device):
    x, angles, row_gradient = normal(2, 5, device=device), make_angles(3, 5, device=device), normal(3, 5, device=device)
    per_unit, grad_output, empty = normal(3, device=device), normal(2, 3, device=device), x.new_empty((0,))
    for function, arguments in (
        (direction, (angles,)),
        (direction_backward, (row_gradient, angles)),
        (gmp, (x, angles, per_unit, per_unit, True, True, True, True)),
        (gmp_backward, (grad_output, x, angles, per_unit, grad_output, empty, True, True, True, True, False, False)),
    ):
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_layers_know_when_kernels_are_fused():
    assert op.few_samples("triton") == kernels.FUSED_ROWS


def test_launches_fill_the_gpu():
    """Every column belongs to exactly one part, no part is empty, and a row fits in the warps of its program."""
    from lcw_ops.kernels import common

    device = kernels.Device(132, 227 * 1024, False)
    for rows in (1, 16, 33, 64):
        for units in (1, 100, 4096, 10**6):
            for features in (1, 63, 4096, 10**6, 3 * 2**30):
                for itemsize in (2, 4, 8):
                    launch = kernels.choose_fused_launch(rows, units, features, itemsize, device)
                    assert (launch["splits"] - 1) * launch["chunk"] < features <= launch["splits"] * launch["chunk"]
                    assert launch["chunk"] % launch["BLOCK_K"] == 0
                    assert launch["BLOCK_M"] >= rows
                    row_launch = kernels._direction_launch(units, features, itemsize, device)
                    assert row_launch["num_warps"] in (1, 2, 4, 8, 16)
                    assert row_launch["ROWS"] * row_launch["LANES"] == row_launch["num_warps"] * 32 * common.GROUP
    # The largest usual layer has a warp for every row; a few long rows have as many warps as a row can have.
    assert kernels._direction_launch(4096, 4096, 4, device)["num_warps"] == 1
    assert kernels._direction_launch(16, 16384, 4, device)["num_warps"] == 16
