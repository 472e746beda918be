"""The ops of GmP on the compiled CPU kernels: directions and their layer. support/unit_op_tests.py has the rule."""

import math

import numpy as np
import pytest
import torch
from support.numerics import (
    as_exact,
    evaluate,
    needs_more_digits,
    saved_tensors,
    threads,
)
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
    EPS,
    FUSED,
    GMP,
    OPS,
    assert_op,
    draw_direction,
    draw_gmp,
    exact_direction,
    normal,
    uniform_angles,
)

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops import backends, hypersphere

pytestmark = pytest.mark.usefixtures("compiled_kernel", "one_thread")

STEM = GMP


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fan_in_1(dtype):
    """A unit of one input has no angles and the direction 1."""
    assert torch.equal(F.hypersphere_direction(torch.empty(3, 0, dtype=dtype)), torch.ones(3, 1, dtype=dtype))


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_arguments_are_left_as_they_were_with_relu():
    assert_arguments_are_left_as_they_were(OPS["gmp relu"])


def test_what_is_kept_for_backward():
    """For few samples M, a layer of n units keeps M n numbers beside its arguments, and none of the weight's size."""
    n, m = 64, 100
    for rows, direction in ((FUSED, 0), (FUSED + 1, n * m)):
        for name in ("gmp", "gmp relu"):
            arguments, _ = OPS[name].draw(n, m, torch.float32, rows)
            own = sum(tensor.numel() for tensor in arguments.values())
            for needed, activated, u in (
                (list(arguments), rows * n, direction),
                (["angles", "radius", "location"], rows * n, 0),
                (["angles", "location"], rows * n * (name == "gmp relu"), 0),
                (["x"], rows * n * (name == "gmp relu"), direction),
            ):
                leaves = {key: tensor.detach().requires_grad_(key in needed) for key, tensor in arguments.items()}
                _, saved = saved_tensors(lambda leaves=leaves, name=name: OPS[name].ours(**leaves))
                assert sum(tensor.numel() for tensor in saved) <= own + activated + u, (rows, name, needed)


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
            assert_op(f"{size} in {columns[:3]}", OPS["direction"], [(arguments, grad_output)])


@pytest.mark.parametrize("m", [2, 3, 9, 1152, 4608])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_directions_have_length_1(dtype, m):
    direction = F.hypersphere_direction(uniform_angles(20, m, dtype))
    # Every sine is off by a few halves of an ulp at random, and passes its error on to all later components.
    allowed = 4 * math.sqrt(m) * torch.finfo(dtype).eps
    assert ((direction.double().norm(dim=1) - 1).abs() <= allowed).all()


# ---- NaN, infinity, and poles ---------------------------------------------------------------------------------------


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


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize(
    ("name", "bad"),
    # relu turns -infinity into a finite 0, and hides units that do not fire.
    [("gmp", math.nan), ("gmp", math.inf), ("gmp", -math.inf), ("gmp relu", math.nan)],
)
def test_nan_and_infinity_stay_in_their_row(name, bad):
    assert_bad_values_stay_in_their_row(OPS[name], bad)


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
    assert_op("poles", OPS["direction"], [({"angles": t}, grad_output)])
    actual = evaluate(F.hypersphere_direction, {"angles": t}, grad_output)
    behind = (t == 0).cumsum(1).bool()
    assert (actual["output"][:, 1:][behind] == 0).all()
    assert (actual["angles"][:, 1:][behind[:, :-1]] == 0).all()
    for rows in (3, FUSED + 1):
        arguments, grad_output = draw_gmp(len(t), 5, dtype, rows)
        result = evaluate(F.gmp_linear, arguments | {"angles": t}, grad_output)
        assert (result["angles"][:, 1:][behind[:, :-1]] == 0).all()
        assert_op("layer at poles", OPS["gmp"], [(arguments | {"angles": t}, grad_output)])


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
        result = evaluate(OPS["gmp relu"].ours, arguments, torch.ones(rows, 4))
        z = x[:, :1] + location
        expected = radius * z.relu()
        assert torch.equal(result["output"].nan_to_num(99.0), expected.nan_to_num(99.0))
        fires = (z > 0).float()
        good = torch.arange(rows) != 2
        assert torch.equal(result["x"][good, 0], (radius * fires)[good].sum(1))
        assert result["radius"].isnan().all()
        arguments["x"] = x.nan_to_num(-9.0)
        result = evaluate(OPS["gmp relu"].ours, arguments, torch.ones(rows, 4))
        z = arguments["x"][:, :1] + location
        assert torch.equal(result["radius"], z.relu().sum(0))
        assert torch.equal(result["location"], radius * (z > 0).sum(0))


@pytest.mark.usefixtures("every_multiplier")
@pytest.mark.parametrize("name", ["gmp", "gmp relu"])
def test_radius_of_zero_and_of_any_sign(name):
    for rows in (4, FUSED + 4):
        arguments, grad_output = OPS[name].draw(6, 9, torch.float32, rows)
        positive = arguments["radius"].abs() + 0.1
        results = [
            evaluate(OPS[name].ours, arguments | {"radius": radius}, grad_output)
            for radius in (positive, -positive, torch.zeros(6))
        ]
        plus, minus, zero = results
        for key, sign in (("output", -1), ("x", -1), ("angles", -1), ("location", -1), ("radius", 1)):
            assert torch.equal(minus[key], sign * plus[key]), key
            if key != "radius":
                assert torch.equal(zero[key], torch.zeros_like(zero[key])), key
        # The gradient of the radius does not depend on the radius.
        assert torch.equal(zero["radius"], plus["radius"])


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
        arguments, grad_output = draw_gmp(n, m, dtype, rows)
        x, angles, radius, location = arguments.values()
        for relu, keep_direction in ((False, False), (True, True)):
            forward = (x, angles, radius, location, relu, False, True, keep_direction)
            check(ops.gmp_linear.cpp, *forward)
            _, activated, kept = ops.gmp_linear.cpp(*forward)
            needs = (keep_direction, True, True, relu)
            check(ops.gmp_linear_backward.cpp, grad_output, x, angles, radius, activated, kept, relu, False, *needs)
    assert len(checked) == 4


def test_compile_without_gradients_and_in_autocast():
    arguments, _ = draw_gmp(6, 5, torch.float32, 4)
    compiled = torch.compile(lambda *a: F.gmp_linear(*a, "relu"), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments.values()), F.gmp_linear(**arguments, activation="relu"))
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = compiled(*arguments.values()), F.gmp_linear(**arguments, activation="relu")
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected)


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


def gmp(x=(2, 4), angles=(3, 3), radius=(3,), location=(3,), activation=None, **dtypes):
    shapes = {"x": x, "angles": angles, "radius": radius, "location": location}
    return F.gmp_linear(**ones(shapes, dtypes), activation=activation)


WRONG_SHAPES = [
    (lambda: F.hypersphere_direction(ONES(3)), r"hypersphere_direction: angles has shape \(3,\); expected \(n, m-1\)"),
    (lambda: F.hypersphere_direction(ONES(3, 2, 1)), "hypersphere_direction: angles has shape"),
    (lambda: F.hypersphere_direction(ONES(())), r"angles has shape \(\)"),
    (lambda: F.hypersphere_angles(ONES(3)), "hypersphere_angles: weight has shape"),
    (lambda: F.hypersphere_angles(ONES(3, 0)), "hypersphere_angles: weight has shape"),
    (lambda: gmp(x=(2, 3)), r"gmp_linear: x has shape \(2, 3\); expected \(\.\.\., 4\), one more than the columns"),
    (lambda: gmp(x=()), r"gmp_linear: x has shape \(\)"),
    (lambda: gmp(angles=(3, 3, 1)), "gmp_linear: angles has shape"),
    (lambda: gmp(angles=(3,)), "gmp_linear: angles has shape"),
    (lambda: gmp(radius=(2,)), "gmp_linear: radius has shape"),
    (lambda: gmp(radius=(3, 1)), "gmp_linear: radius has shape"),
    (lambda: gmp(location=(4,)), "gmp_linear: location has shape"),
    (lambda: gmp(location=()), "gmp_linear: location has shape"),
    (lambda: gmp(activation="tanh"), "activation is 'tanh'; expected one of None, 'relu'"),
]


@pytest.mark.parametrize(("call", "words"), WRONG_SHAPES)
def test_shapes_that_do_not_fit(call, words):
    assert_refused_in_every_mode(call, words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.hypersphere_direction(None), "hypersphere_direction: angles is a NoneType"),
        (lambda: F.hypersphere_direction(ONES(3, 2).long()), "angles is torch.int64; expected float64"),
        (lambda: F.hypersphere_direction(ONES(0, 2).bool()), "angles is torch.bool"),
        (lambda: F.hypersphere_angles([[1.0]]), "hypersphere_angles: weight is a list"),
        (lambda: F.hypersphere_angles(ONES(3, 2, dtype=torch.complex64)), "weight is torch.complex64"),
        (lambda: F.gmp_linear(None, ONES(3, 3), ONES(3), ONES(3)), "gmp_linear: x is a NoneType"),
        (lambda: F.gmp_linear([1.0], ONES(3, 3), ONES(3), ONES(3)), "gmp_linear: x is a list"),
        (lambda: F.gmp_linear(ONES(2, 4), None, ONES(3), ONES(3)), "gmp_linear: angles is a NoneType"),
        (lambda: F.gmp_linear(ONES(2, 4), ONES(3, 3), None, ONES(3)), "gmp_linear: radius is a NoneType"),
        (lambda: F.gmp_linear(ONES(2, 4), ONES(3, 3), ONES(3), None), "gmp_linear: location is a NoneType"),
        (lambda: gmp(angles_dtype=torch.float64), "angles is torch.float64; expected torch.float32, as x is"),
        (lambda: gmp(radius_dtype=torch.bfloat16), "radius is torch.bfloat16; expected torch.float32"),
        (lambda: gmp(location_dtype=torch.float64), "location is torch.float64; expected torch.float32"),
        (lambda: gmp(x_dtype=torch.int64), "x is torch.int64"),
    ],
)
def test_wrong_types_and_dtypes(call, words):
    with pytest.raises(TypeError, match=words):
        call()


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
    yield "hypersphere_direction", {"angles": angles}, ()
    yield "hypersphere_direction_backward", {"grad_direction": ONES(3, 4), "angles": angles}, ()


def test_ops_called_by_themselves_refuse_what_does_not_fit():
    """Direct calls must not read beyond an argument either."""
    free = {
        ("hypersphere_direction", "angles"): ("longer", "shorter", "fewer rows", "more rows", "another dtype"),
        ("gmp_linear", "x"): ("fewer rows", "more rows"),
    }
    assert_wrong_arguments_are_refused(raw_calls(), free)


def test_arguments_that_depend_on_each_other():
    x, vector = normal(5, 4, dtype=torch.float64), normal(4, dtype=torch.float64)

    def gmp_twice(x, angles, radius):
        return F.gmp_linear(F.gmp_linear(x, angles, radius, radius, "relu"), angles, radius, radius, "relu")

    assert_arguments_may_depend_on_each_other(gmp_twice, x, uniform_angles(4, 4, torch.float64), vector)


def test_float64_does_not_mix_under_autocast():
    x, angles, vector = normal(2, 4), normal(3, 3), normal(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"gmp_linear: angles is torch\.float64; expected torch\.float32"):
            F.gmp_linear(x, angles.double(), vector, vector)
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
