"""The LPS rules against closed forms: q(f) = E f(Z)^2, unit second moments, and the probabilities of dying ReLUs.

Z is standard normal. Q. Chen, W. Hao, J. He, 2022; all constants are derived here. Statistical tests are seeded, and
allow 5 stated standard errors.
"""

import itertools
import math

import pytest
import torch

from lcw_ops.reference import (
    activation_variance,
    anchored,
    gaussian_expectation,
    heavy_tail,
    hermite_coefficients,
    hermite_roots,
    hermite_second_moment,
    hermite_variance,
    joint,
)
from lcw_ops.reference.lps import ACTIVATIONS

RULES = {"joint": joint, "heavy_tail": heavy_tail}

# q(f) of the Hermite series of f up to degree 2, 3 and 4, and of f itself.
SECOND_MOMENTS = {
    "relu": (0.48873, 0.48873, 0.49536, 0.5),
    "leaky_relu": (0.48901, 0.48901, 0.49551, 0.50005),
    "sigmoid": (0.29269, 0.29334, 0.29334, 0.29338),
    "tanh": (0.36688, 0.38891, 0.38891, 0.39429),
    "silu": (0.35424, 0.35424, 0.35567, 0.35578),
    "softplus": (0.92108, 0.92108, 0.92124, 0.92125),
    "elu": (0.63998, 0.64312, 0.64391, 0.64495),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@pytest.mark.parametrize("power", range(0, 13, 2))
def test_the_quadrature_has_the_moments_of_the_normal_law(power):
    exact = math.prod(range(1, power, 2))
    assert gaussian_expectation(lambda z: z**power) == pytest.approx(exact, rel=1e-13)
    assert gaussian_expectation(lambda z: z ** (power + 1)) == pytest.approx(0, abs=1e-13 * exact)


def test_the_quadrature_does_not_see_the_kink_of_relu():
    assert gaussian_expectation(torch.relu) == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-14)
    assert activation_variance("relu") == pytest.approx(0.5 - 1 / (2 * math.pi), rel=1e-14)


@pytest.mark.parametrize("std", [1e-4, 1e-2, 1.0])
def test_variance_of_a_narrow_law_is_the_squared_slope(std):
    # sigmoid(sz) = 1/2 + sz/4 - (sz)^3/48 + ..: Var = s^2/16 (1 - s^2/2 + O(s^4)).
    relative = activation_variance("sigmoid", std) / (std**2 / 16) - 1
    assert relative == pytest.approx(-(std**2) / 2, rel=0.5, abs=1e-11)


def test_variance_of_a_wide_law_is_that_of_a_step():
    # sigmoid becomes a step: Var = 1/4 - E f(1-f), and E f(1-f) = phi(0)/s (1 - pi^2 / (6 s^2) + O(s^-4)), s = 100.
    expected = 0.25 - 1e-2 / math.sqrt(2 * math.pi) * (1 - math.pi**2 / 6e4)
    assert activation_variance("sigmoid", 100) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("activation", SECOND_MOMENTS)
def test_second_moments_by_degree(activation):
    ours = [hermite_second_moment(activation, degree) for degree in (2, 3, 4, None)]
    # SECOND_MOMENTS has five decimals.
    assert ours == pytest.approx(SECOND_MOMENTS[activation], abs=0.5e-5)


def test_relu_coefficients_have_closed_forms():
    # The squares of the Hermite coefficients c_0 .. c_4 are 1/(2 pi), 1/4, 1/(4 pi), 0 and 1/(48 pi).
    expected = 1 / (2 * math.pi) + 1 / 4 + 1 / (4 * math.pi) + 1 / (48 * math.pi)
    assert hermite_second_moment("relu", 4) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("activation", SECOND_MOMENTS)
def test_second_moments_rise_with_the_degree_to_the_exact_one(activation):
    moments = [hermite_second_moment(activation, degree) for degree in range(1, 30)]
    exact = hermite_second_moment(activation)
    assert all(low <= high + 1e-15 for low, high in itertools.pairwise(moments))
    # ReLU's series converges the slowest: c_k^2 falls like k^(-5/2), and the rest from degree 29 on is below 1e-3.
    assert 0 <= exact - moments[-1] + 1e-14 < 1e-3


def step(z):
    return (z > 0.3).to(z.dtype)


def ramp(z):
    return (z - 0.7).clamp(0, 1.1)


def normal_integrals(low, high):
    """E Z^k over [low, high], k = 0, 1, 2, in closed form."""
    density = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (low, high)]
    probability = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return probability, density[0] - density[1], probability + low * density[0] - high * density[1]


@pytest.mark.parametrize("std", [1.0, 0.6, 3.0])
def test_kinks_and_steps_of_a_function_may_be_anywhere(std):
    # Var 1[sZ > 0.3] = p (1 - p).
    p = math.erfc(0.3 / std / math.sqrt(2)) / 2
    assert activation_variance(step, std) == pytest.approx(p * (1 - p), rel=1e-13)
    # ramp(sz) = s z - 0.7 between 0.7 and 1.8, and 1.1 above.
    p, first, second = normal_integrals(0.7 / std, 1.8 / std)
    above = math.erfc(1.8 / std / math.sqrt(2)) / 2
    mean = std * first - 0.7 * p + 1.1 * above
    square = std**2 * second - 1.4 * std * first + 0.49 * p + 1.21 * above
    assert activation_variance(ramp, std) == pytest.approx(square - mean**2, rel=1e-13)
    if std == 1:
        assert hermite_second_moment(ramp) == pytest.approx(square, rel=1e-13)


@pytest.mark.parametrize(
    ("function", "second_moment"),
    [
        (torch.sign, 1.0),
        (lambda z: z**3, 15.0),
        (lambda z: z.exp(), math.exp(2)),
        (lambda z: torch.full_like(z, 2.0), 4.0),
        (lambda z: (50 * z).cos(), 0.5),
        (torch.zeros_like, 0.0),
    ],
)
def test_second_moments_of_functions_in_closed_form(function, second_moment):
    assert hermite_second_moment(function) == pytest.approx(second_moment, rel=1e-12)


def test_a_function_in_float32_is_as_exact_as_float32():
    assert hermite_second_moment(lambda z: z.float().sigmoid()) == pytest.approx(
        hermite_second_moment("sigmoid"), rel=8 * 2**-23
    )


@pytest.mark.parametrize("name", SECOND_MOMENTS)
@pytest.mark.parametrize("degree", [1, 4, 12])
def test_a_function_has_the_coefficients_of_its_name(name, degree):
    ours = hermite_coefficients(ACTIVATIONS[name], degree)
    assert ours == pytest.approx(hermite_coefficients(name, degree), rel=0, abs=1e-13)


def test_a_module_is_copied_and_left_as_it_was():
    module = torch.nn.Sequential(torch.nn.PReLU(init=0.01), torch.nn.Dropout(0.5)).train()
    slope = module[0].weight
    # The slope is a float32 number.
    expected = 0.5 + 0.5 * slope.item() ** 2
    assert hermite_second_moment(module) == pytest.approx(expected, rel=1e-13)
    assert module.training
    assert module[0].weight is slope
    assert slope.dtype == torch.float32


def test_the_variance_is_the_second_moment_without_the_mean():
    # ReLU: c_0^2 = 1 / (2 pi).
    assert hermite_variance("relu") == pytest.approx(0.5 - 1 / (2 * math.pi), rel=1e-13)
    for degree in (1, 4):
        expected = hermite_second_moment("relu", degree) - 1 / (2 * math.pi)
        assert hermite_variance("relu", degree) == pytest.approx(expected, rel=1e-13)


def test_roots_have_closed_forms():
    # P_2 of a ReLU is (z^2 + sqrt(2 pi) z + 1) / (2 sqrt(2 pi)).
    half = math.sqrt(2 * math.pi) / 2
    expected = [-half - math.sqrt(half**2 - 1), -half + math.sqrt(half**2 - 1)]
    assert hermite_roots("relu", 2) == pytest.approx(expected, rel=1e-12)
    # c_3 of a ReLU is 0 up to rounding, which must not give a root far away.
    assert hermite_roots("relu", 3) == pytest.approx(expected, rel=1e-12)
    # tanh is odd: 0 and two opposite roots. P_1 has the root 0.
    low, middle, high = hermite_roots("tanh", 3)
    assert low == pytest.approx(-high, rel=1e-12)
    assert abs(middle) < 1e-14
    c1, c3 = (hermite_coefficients("tanh", 3)[k] for k in (1, 3))
    # c_1 z + c_3 (z^3 - 3 z) / sqrt(6) = 0.
    assert high == pytest.approx(math.sqrt(3 - math.sqrt(6) * c1 / c3), rel=1e-12)
    assert hermite_roots("identity", 5) == pytest.approx([0.0], abs=1e-14)
    assert hermite_roots("softplus", 2) == []


@pytest.mark.parametrize("activation", SECOND_MOMENTS)
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7])
def test_the_polynomial_vanishes_at_its_roots_and_changes_sign_as_often(activation, degree):
    coefficients = torch.tensor(hermite_coefficients(activation, degree), dtype=torch.float64)

    def polynomial(z):
        h = [torch.ones_like(z), z]
        for k in range(1, degree):
            h.append((z * h[-1] - math.sqrt(k) * h[-2]) / math.sqrt(k + 1))
        return sum(c * values for c, values in zip(coefficients, h, strict=False))

    roots = hermite_roots(activation, degree)
    assert roots == sorted(roots)
    values = polynomial(torch.tensor(roots, dtype=torch.float64))
    assert values.abs().max().item() < 1e-10 if roots else True
    # A grid over all roots that are not far away: those of odd order change the sign.
    edge = 2 + max(map(abs, roots), default=0)
    grid = polynomial(torch.linspace(-edge, edge, 200_001, dtype=torch.float64)).sign()
    assert (grid[1:] * grid[:-1] < 0).sum() == len(roots)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_zero_sum_rows_have_second_moment_1_whatever_the_mean_of_the_inputs(rule, bias):
    units, fan_in, variance = 100_000, 6, 0.4
    weight, offset = RULES[rule](units, fan_in, variance, bias, generator(), zero_sum=True)
    assert weight.sum(1).abs().max() < 1e-11
    a = normal(fan_in, seed=1)
    a = (a - a.mean()) * math.sqrt((fan_in - 1) * variance) / (a - a.mean()).norm()
    for mean in (0.0, 5.0):
        z = weight @ (a + mean) + (offset if bias else 0)
        standard_error = z.square().std() / math.sqrt(units)
        assert standard_error < 0.05
        assert abs(z.square().mean() - 1) < 5 * standard_error


def test_zero_sum_joint_has_one_scale_for_the_coordinates_and_the_bias():
    weight, bias = joint(50_000, 7, 0.5, generator=generator(), zero_sum=True)
    variance = 1 / (6 * 0.5 + 1)
    assert abs(weight.square().sum(1).mean() / (6 * variance) - 1) < 5 * math.sqrt(2 / 6 / 50_000)
    assert abs(bias.square().mean() / variance - 1) < 5 * math.sqrt(2 / 50_000)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_zero_sum_row_of_one_input_is_zero(rule, bias):
    weight, offset = RULES[rule](50, 1, 0.5, bias, generator(), zero_sum=True)
    assert torch.equal(weight, torch.zeros(50, 1).double())
    if bias:
        assert abs(offset.square().mean() - 1) < 5 * math.sqrt(2 / 50)


def test_anchored_zero_sum_rows_vanish_at_a_sample_and_are_off_as_rarely():
    count, units = 5, 40_000
    samples = normal(count, 4) + 7
    weight, bias = anchored(units, samples, generator=generator(), zero_sum=True)
    assert weight.sum(1).abs().max() < 1e-13
    z = samples @ weight.T + bias
    assert z.abs().amin(0).max() < 1e-12
    assert z.std(correction=0).item() == pytest.approx(1, rel=1e-12)
    off = (z <= 1e-11).all(0).double().mean()
    assert abs(off - 1 / count) < 5 * math.sqrt(0.2 * 0.8 / units)


def test_anchored_takes_one_root_for_each_unit():
    samples, roots = normal(20, 5), normal(50, seed=3)
    weight, bias = anchored(50, samples, roots, generator=generator())
    z = samples @ weight.T + bias
    assert (z - roots).abs().amin(0).max() < 1e-13
    assert (z - roots).std(correction=0).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_pre_activations_have_second_moment_1(rule, bias):
    units, fan_in, q = 100_000, 6, 0.5
    weight, offset = RULES[rule](units, fan_in, q, bias, generator())
    a = normal(fan_in, seed=1)
    a *= math.sqrt(q) / a.square().mean().sqrt()
    z = weight @ a + (offset if bias else 0)
    # Over one input, the sample's own spread is the yardstick: heavy tails have a large fourth moment.
    standard_error = z.square().std() / math.sqrt(units)
    assert standard_error < 0.05
    assert abs(z.square().mean() - 1) < 5 * standard_error


def test_joint_has_the_one_scale_of_the_formula_for_weights_and_bias():
    weight, bias = joint(50_000, 7, 0.5, generator=generator())
    variance = 1 / (7 * 0.5 + 1)
    # ReLU hidden layers with the exact q: s^2 = 2 / (n + 2).
    assert variance == 2 / (7 + 2)
    for group in (weight, bias):
        standard_error = variance * math.sqrt(2 / group.numel())
        assert abs(group.square().mean() - variance) < 5 * standard_error


def test_heavy_tailed_layers_have_the_sum_of_squares_exactly():
    weight, bias = heavy_tail(64, 9, 0.3, generator=generator())
    assert (0.3 * weight.square().sum(1) + bias.square()).mean().item() == pytest.approx(1, rel=1e-13)


def test_heavy_tails_are_cauchy_up_to_the_clip():
    weight, _ = heavy_tail(200_000, 1, generator=generator())
    # c = g / |g0| is Cauchy: P(|c| < x) = 2/pi atan(x), and the median of |c| is 1. The layer's unknown scale drops out
    # if |c| is compared with the sample's median. The clip at |g0| < 0.1 alters 8 % of the draws, all far out, so that
    # P(|c| < x) moves by less than E|g| 0.1 x^2.
    scaled = weight[:, 0].abs()
    median = scaled.median()
    assert abs((scaled < median / 2).double().mean() - 2 / math.pi * math.atan(0.5)) < 0.01
    assert abs((scaled < median * 2).double().mean() - 2 / math.pi * math.atan(2)) < 0.02
    assert scaled.max() < 200 * median


def test_anchored_zero_sets_pass_through_a_sample():
    samples = normal(20, 5)
    weight, bias = anchored(50, samples, generator=generator())
    z = samples @ weight.T + bias
    # Every unit is 0 at one sample, up to rounding, and the layer's standard deviation is 1.
    assert z.abs().amin(0).max() < 1e-14
    assert z.std(correction=0).item() == pytest.approx(1, rel=1e-13)


def test_anchored_takes_the_root_it_is_given():
    samples = normal(20, 5)
    without, bias = anchored(50, samples, generator=generator())
    weight, moved = anchored(50, samples, root=0.7, generator=generator())
    ratio = weight[0, 0] / without[0, 0]
    torch.testing.assert_close(weight, ratio * without, rtol=1e-13, atol=0)
    # The anchors are the same, so the biases of all units differ by the scaled root alone.
    scaled_root = moved - ratio * bias
    assert scaled_root[0] > 0
    torch.testing.assert_close(scaled_root, scaled_root[:1].expand(50), rtol=0, atol=1e-13)
    z = samples @ weight.T + moved
    assert (z - scaled_root).abs().amin(0).max() < 1e-13


@pytest.mark.parametrize("count", [2, 5, 17])
def test_an_anchored_unit_is_off_on_all_samples_with_probability_one_over_their_number(count):
    units = 40_000
    samples = normal(count, 3)
    weight, bias = anchored(units, samples, generator=generator(1))
    # At its anchor a unit is 0 up to rounding. At the other samples it is 1e-5 or more away from 0, for all but 1e-5 of
    # the units.
    off = ((samples @ weight.T + bias) <= 1e-12).all(0).double().mean()
    p = 1 / count
    assert abs(off - p) < 5 * math.sqrt(p * (1 - p) / units)


@pytest.mark.parametrize(
    "samples", [normal(1, 4), normal(1, 4).expand(30, 4), torch.zeros(30, 4), 1e8 + torch.zeros(9, 4)]
)
def test_anchored_on_equal_samples_keeps_the_scale_of_the_draw(samples):
    weight, bias = anchored(10_000, samples, generator=generator())
    standard_error = math.sqrt(2 / weight.numel()) / 4
    assert abs(weight.square().mean() - 1 / 4) < 5 * standard_error
    assert (samples.double() @ weight.T + bias).abs().max() <= 1e-14 * samples.abs().max().item() * 8


def deep_relu_nets(draw, width, depth, samples):
    """Yield the outputs of a ReLU net's hidden layers, each drawn by draw(inputs, fan_in, l)."""
    h = samples
    for l in range(depth):
        weight, bias = draw(h, h.shape[1], l)
        h = (h @ weight.T + bias).relu()
        yield h


@pytest.mark.parametrize(("width", "depth"), [(2, 10), (3, 10), (5, 30)])
def test_a_layer_dies_at_one_input_with_the_closed_probability(width, depth):
    nets = 3000
    g = generator(width * depth)
    h, dead = torch.ones(nets, 4, 1, dtype=torch.float64), torch.zeros(nets, dtype=torch.bool)
    for l in range(depth):
        # The layers of all nets are drawn at once: joint draws every entry independently.
        weight, bias = joint(nets * width, h.shape[1], 1.0 if l == 0 else 0.5, generator=g)
        h = (weight.view(nets, width, -1) @ h + bias.view(nets, width, 1)).relu()
        dead |= (h == 0).all(1).squeeze(1)
    p = 1 - (1 - 2.0**-width) ** depth
    assert abs(dead.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / nets)


@pytest.mark.parametrize(
    ("rule", "width", "depth", "table"),
    [
        ("he", 3, 10, 0.637),
        ("joint", 3, 10, 0.613),
        ("anchored", 3, 10, 0.107),
        ("he", 5, 10, 0.140),
        ("joint", 5, 10, 0.140),
        ("anchored", 5, 10, 0.0),
    ],
)
def test_networks_are_constant_as_often_as_expected(rule, width, depth, table):
    nets = 600
    g = generator(1)
    grid = torch.linspace(-math.sqrt(3), math.sqrt(3), 65, dtype=torch.float64)[:, None]

    def draw(h, fan_in, l):
        if rule == "anchored":
            return anchored(width, h, generator=g)
        if rule == "joint":
            return joint(width, fan_in, 1.0 if l == 0 else 0.5, generator=g)
        return torch.randn(width, fan_in, generator=g).double() * math.sqrt(2 / fan_in), torch.zeros(width).double()

    def constant(h):
        return bool(((h - h[0]).abs() <= 1e-12 * h.abs().max()).all())

    share = sum(constant(list(deep_relu_nets(draw, width, depth, grid))[-1]) for _ in range(nets)) / nets
    # Both shares, the expected one and ours, are binomial measurements of 600 nets. A share of 0 counts as one net.
    standard_error = math.sqrt(2 * max(table * (1 - table), 1 / nets) / nets)
    assert abs(share - table) < 5 * standard_error


@pytest.mark.parametrize("rule", RULES)
def test_samplers_repeat_with_their_generator_and_leave_the_global_one(rule):
    state = torch.random.get_rng_state()
    first, second = (RULES[rule](4, 3, generator=generator(7)) for _ in range(2))
    other = RULES[rule](4, 3, generator=generator(8))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("units", "fan_in"), [(0, 3), (3, 0), (1, 1)])
def test_empty_and_single_layers(units, fan_in):
    for weight, bias in (
        joint(units, fan_in, generator=generator()),
        heavy_tail(units, fan_in, generator=generator()),
        anchored(units, normal(5, fan_in), generator=generator()),
    ):
        assert weight.shape == (units, fan_in)
        assert bias.shape == (units,)
        assert bias.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hermite_second_moment("selu"), ValueError, "activation is 'selu'; expected one of 'identity', 'relu'"),
        (lambda: hermite_second_moment("relu", -1), ValueError, "degree is -1"),
        (lambda: hermite_second_moment("relu", 2.5), TypeError, "degree is a float; expected an int, or None"),
        (lambda: hermite_second_moment("relu", True), TypeError, "degree is a bool"),
        (lambda: hermite_roots("relu", None), TypeError, "degree is a NoneType"),
        (lambda: hermite_second_moment(torch.log), ValueError, "function with values that are NaN or infinite"),
        (lambda: hermite_second_moment(lambda z: z.tolist()), TypeError, "a function that returns a list"),
        (lambda: hermite_second_moment(lambda z: z[:1]), ValueError, "expected an elementwise function"),
        (lambda: hermite_second_moment(lambda z: (z * z / 4).exp()), ValueError, "grows too fast"),
        (lambda: activation_variance(torch.rand_like), ValueError, "do not converge"),
        (lambda: activation_variance("relu", math.nan), ValueError, "std is nan"),
        (lambda: activation_variance("relu", 1e9), ValueError, "std is 1000000000.0; expected between 0.0001 and 100"),
        (lambda: joint(3, 4, -1.0), ValueError, "joint: second_moment is -1.0"),
        (lambda: heavy_tail(3, 4, math.inf), ValueError, "heavy_tail: second_moment is inf"),
        (lambda: anchored(3, torch.ones(4)), ValueError, r"samples has shape \(4,\)"),
        (lambda: anchored(3, torch.ones(0, 4)), ValueError, "with S >= 1"),
        (lambda: anchored(3, torch.tensor([[1.0, math.nan]])), ValueError, "NaN or infinite"),
        (lambda: anchored(3, torch.ones(2, 4, dtype=torch.int64)), TypeError, "samples is torch.int64"),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
