"""Initialisers: the constants of LCW, 100 sigmoid layers, LPS over whole models, and GmP's distribution of weights.

Statistical tests are seeded and allow 5 stated standard errors.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lcw_ops import init
from lcw_ops.reference import anchored, gaussian_expectation, heavy_tail, hypersphere_direction, joint, lcw_weight

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# m sv^2 by activation and std of the pre-activations, for fan-in m and weights of variance sv^2.
LCW_CONSTANTS = [
    ("sigmoid", 0.1, 16.08),
    ("sigmoid", 0.5, 17.91),
    ("sigmoid", 1, 23.05),
    ("sigmoid", 2, 40.58),
    ("tanh", 0.5, 1.441),
    ("tanh", 1, 2.536),
    ("relu", 0.1, 2.934),
    ("relu", 0.5, 2.934),
    ("relu", 1, 2.934),
    ("relu", 2, 2.934),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def empty(*shape, dtype=torch.float64):
    # NaN shows every entry that an initialiser leaves out.
    return torch.full(shape, math.nan, dtype=dtype)


def check_variance(sample, expected, known_digits=0.0):
    """The mean square of a normal sample is within 5 standard errors sqrt(2 / count), plus the constant's rounding."""
    relative = sample.double().square().mean().item() / expected - 1
    assert abs(relative) < 5 * math.sqrt(2 / sample.numel()) + known_digits


@pytest.mark.parametrize(("activation", "std", "constant"), LCW_CONSTANTS)
@pytest.mark.parametrize("basis", [False, True])
def test_lcw_draws_with_the_derived_variance(activation, std, constant, basis):
    m = 50
    weight = init.lcw_(empty(4000, m - basis), activation, std, basis, generator())
    check_variance(weight, constant / m, known_digits=0.5e-2 / constant)


def test_lcw_on_the_first_layer_expects_standardised_data():
    weight = init.lcw_(empty(500, 4, 5, 5), None, 2.0, generator=generator())
    check_variance(weight, 2.0**2 / 100)


@pytest.mark.parametrize(("basis", "fan_in"), [(False, 1), (False, 2), (True, 2)])
def test_lcw_draws_with_the_derived_variance_for_one_and_two_inputs_too(basis, fan_in):
    weight = init.lcw_(empty(20_000, fan_in - basis), None, basis=basis, generator=generator())
    check_variance(weight, 1 / fan_in)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "softplus", "gelu"])
@pytest.mark.parametrize("basis", [False, True])
def test_lcw_keeps_the_spread_of_the_pre_activations(activation, basis):
    m, units, std = 2000, 2000, 0.7
    f = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softplus": F.softplus, "gelu": F.gelu}
    a = f[activation](std * torch.randn(m, generator=generator(1), dtype=torch.float64))
    weight = init.lcw_(empty(units, m - basis), activation, std, basis, generator())
    z = lcw_weight(weight, basis) @ a
    # Two errors: sqrt(2 / units) of the units, and that of a's empirical variance, at most sqrt(6 / m) for these laws.
    assert abs(z.square().mean() / std**2 - 1) < 5 * math.sqrt(2 / units + 6 / m)


@pytest.mark.parametrize(("std", "lcw", "plain"), [(1, 1.034, 0.153), (0.5, 1.004, 0.053), (2, 1.178, 0.333)])
def test_the_backward_factor_of_sigmoid_layers_is_the_derived_one(std, lcw, plain):
    variance_of_lcw = init.lcw_(empty(1000, 1000), "sigmoid", std, generator=generator()).square().mean().item()
    slope = gaussian_expectation(lambda z: ((std * z).sigmoid() * (1 - (std * z).sigmoid())).square())
    second_moment = gaussian_expectation(lambda z: (std * z).sigmoid().square())
    # A million draws: 5 standard errors are 0.7 %. The expected factors have three decimals.
    assert 1000 * variance_of_lcw * slope == pytest.approx(lcw, rel=0.008, abs=0.5e-3)
    assert std**2 / second_moment * slope == pytest.approx(plain, abs=0.5e-3)


def log10_gradient_variance_ratio(weights, seed):
    """log10 of Var(dE/dz_1) / Var(dE/dz_L) for a deep sigmoid net and a random linear loss."""
    width = weights[0].shape[1]
    h = torch.randn(32, width, dtype=torch.float64, generator=generator(seed))
    pre_activations = []
    for weight in weights:
        z = (h @ weight.T).requires_grad_()
        pre_activations.append(z)
        h = z.sigmoid()
    loss = (h * torch.randn(h.shape, dtype=torch.float64, generator=generator(seed + 1))).sum()
    gradients = torch.autograd.grad(loss, [pre_activations[0], pre_activations[-1]])
    return math.log10(gradients[0].var().item() / gradients[1].var().item())


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # The factors of 99 layers of infinite width. f is the sigmoid and Z is standard normal.
        ("lcw", 99 * math.log10(1.0336)),
        ("plain", 99 * math.log10(0.15283)),
        # For weights of variance 1 / m, the variance of z settles at v = E f(sqrt(v) Z)^2 = 0.26469, and a layer's
        # factor at E f'(sqrt(v) Z)^2.
        ("unit", 99 * math.log10(0.055721)),
    ],
)
def test_100_sigmoid_layers_keep_their_gradient_with_lcw_only(form, expected):
    width, depth = 128, 100
    g = generator(5)
    plain_std = 1 / math.sqrt(width * gaussian_expectation(lambda z: z.sigmoid().square()))

    def draw(l):
        weight = empty(width, width)
        if form == "lcw":
            return lcw_weight(init.lcw_(weight, "sigmoid" if l else None, generator=g))
        return weight.normal_(0, plain_std if form == "plain" and l else 1 / math.sqrt(width), generator=g)

    ratios = [log10_gradient_variance_ratio([draw(l) for l in range(depth)], seed) for seed in range(16)]
    # One net's log10 ratio has standard deviation 0.5 (99 layers of sqrt(2/128) and more), the mean of 16 an eighth.
    # At width 128 every factor is off by about 1/128, in all by about e^1, or 0.43 decades.
    assert abs(sum(ratios) / len(ratios) - expected) < 0.43 + 5 * 0.125


@pytest.mark.parametrize(("activation", "q"), [(None, 1.0), ("relu", 0.49536), ("sigmoid", 0.29334)])
def test_joint_draws_weights_and_bias_of_a_filter_as_one_group(activation, q):
    weight, bias = init.lps_(empty(20_000, 2, 3), empty(20_000), activation, generator=generator())
    for group in (weight, bias):
        check_variance(group, 1 / (6 * q + 1), known_digits=1e-5)


def test_degree_none_uses_the_activation_itself():
    weight, _ = init.lps_(empty(20_000, 7), empty(20_000), "relu", degree=None, generator=generator())
    check_variance(weight, 2 / 9)


def test_the_degree_is_4_unless_another_is_given():
    # The series of tanh has a term of degree 5.
    ours, degree_4, degree_5 = (
        init.lps_(empty(20, 7), empty(20), "tanh", generator=generator(), **options)
        for options in ({}, {"degree": 4}, {"degree": 5})
    )
    assert all(map(torch.equal, ours, degree_4))
    assert not any(map(torch.equal, ours, degree_5))
    ours, degree_4, degree_5 = (
        init.lps_model_(mlp(), activation="tanh", generator=generator(), **options)[2]
        for options in ({}, {"degree": 4}, {"degree": 5})
    )
    assert all(map(torch.equal, ours.parameters(), degree_4.parameters()))
    assert not any(map(torch.equal, ours.parameters(), degree_5.parameters()))


def test_each_rule_draws_from_its_own_law():
    samples = torch.randn(30, 7, generator=generator(1), dtype=torch.float64)
    laws = {
        "joint": joint(50, 7, 0.5, generator=generator()),
        "heavy_tail": heavy_tail(50, 7, 0.5, generator=generator()),
        "anchored": anchored(50, samples, generator=generator()),
    }
    for rule, law in laws.items():
        given = samples if rule == "anchored" else None
        ours = init.lps_(empty(50, 7), empty(50), "relu", rule, None, given, generator())
        torch.testing.assert_close(ours, law, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", ["joint", "heavy_tail"])
def test_a_layer_without_bias_has_unit_second_moment_too(rule):
    weight, bias = init.lps_(empty(20_000, 8), None, None, rule, generator=generator())
    assert bias is None
    # E z^2 = q ||w||^2 with q = 1. Over 20,000 units this is a mean of chi-squares; heavy_tail scales the mean to 1.
    assert weight.square().sum(1).mean().item() == pytest.approx(1, rel=5 * math.sqrt(2 / 8 / 20_000))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_anchored_without_samples_draws_them_from_the_assumed_law(activation):
    fan_in, units = 400, 4000
    weight, bias = init.lps_(empty(units, fan_in), empty(units), activation, "anchored", generator=generator())
    # b = -w.h has E b^2 = fan_in E w^2 q, and z = w.(h' - h) the variance 2 fan_in E w^2 Var h = 1.
    q, variance = (1, 1) if activation is None else (0.5, 0.5 - 1 / (2 * math.pi))
    # The data are 1024 draws of 400 entries; the units' own spread dominates.
    check_variance(bias, q / (2 * variance), known_digits=0.01)
    check_variance(weight, 1 / (2 * fan_in * variance), known_digits=0.01)


def test_anchored_puts_zero_sets_through_the_given_samples():
    samples = torch.randn(30, 6, generator=generator(1), dtype=torch.float64)
    weight, bias = init.lps_(empty(50, 2, 3), empty(50), rule="anchored", samples=samples, generator=generator())
    assert (samples @ weight.flatten(1).T + bias).abs().amin(0).max() < 1e-14


def mlp():
    return nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 4)).double()


def test_a_whole_mlp_gets_q_1_first_and_the_activations_q_after():
    model = mlp()
    assert init.lps_model_(model, generator=generator()) is model
    check_variance(torch.cat([model[0].weight.flatten(), model[0].bias]), 1 / (6 + 1))
    check_variance(model[2].weight, 1 / (300 * 0.49536 + 1))
    check_variance(model[4].weight, 1 / (300 * 0.49536 + 1))


def test_the_forward_pass_gives_the_order_of_execution():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(100, 100), nn.Linear(100, 100)

        def forward(self, x):
            return self.second(self.first(x).relu())

    x = torch.randn(3, 100, generator=generator(1)) + 2
    model = init.lps_model_(Swapped(), x, generator=generator())
    check_variance(model.first.weight, 1 / (x.square().sum(1).mean() + 1))
    h = model.first(x).relu().detach()
    check_variance(model.second.weight, 1 / (h.square().sum(1).mean() + 1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, (3, 2), stride=2, dilation=2, groups=4, padding="valid"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 2 * 3, 5),
    ).double()


def anchored_pre_activations(model, x):
    """The output of every layer with weights, in order."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
        for layer in model
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("make", [mlp, cnn])
def test_anchored_units_of_every_layer_vanish_at_a_real_input(make):
    model = make()
    x = torch.randn(40, *((6,) if make is mlp else (2, 8, 8)), generator=generator(1), dtype=torch.float64)
    init.lps_model_(model, x, rule="anchored", generator=generator())
    for z in anchored_pre_activations(model, x):
        assert z.transpose(0, 1).flatten(1).abs().amin(1).max() < 1e-12
        # The MLP is scaled on all 40 inputs, exactly. The CNN is scaled on a sample of patches from 40 images: the
        # deviation of at least 40 independent ones has the standard error 1 / sqrt(80).
        error = 1e-12 if make is mlp else 5 / math.sqrt(80)
        assert z.std(correction=0).item() == pytest.approx(1, abs=error)


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_keeps_its_mode_its_statistics_and_its_hooks(mode):
    model = cnn().train(mode)
    x = torch.randn(10, 2, 8, 8, dtype=torch.float64, generator=generator(1)) + 5
    init.lps_model_(model, x, rule="anchored", generator=generator())
    assert all(module.training is mode for module in model.modules())
    assert torch.equal(model[2].running_mean, torch.zeros(8).double())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (5, 4, 9)),
        (nn.Conv3d(2, 6, 2, stride=2), (3, 2, 4, 4, 4)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 4, 4)),
        (nn.Conv2d(6, 6, 3, padding=1), (6, 4, 4)),
        (nn.Linear(7, 5), (3, 11, 7)),
    ],
    ids=["circular", "3d", "depthwise", "unbatched", "sequence"],
)
def test_patches_are_the_inputs_of_the_units_of_any_layer(layer, shape):
    x = torch.randn(*shape, generator=generator(1))
    model = init.lps_model_(nn.Sequential(layer), x, rule="anchored", generator=generator())
    channel = -1 if isinstance(layer, nn.Linear) else len(shape) - len(layer.kernel_size) - 1
    nearest = model(x).detach().movedim(channel, 0).flatten(1).abs().amin(1)
    # float32 sums of at most 54 products of size about 1.
    assert nearest.max() < 54 * 2**-22


class Halved(nn.Module):
    """A parametrization that right_inverse does not invert."""

    def forward(self, x):
        return x / 2

    def right_inverse(self, x):
        return x


# How a layer is changed, and the reason for which it is refused.
CANNOT_EXPRESS = {
    "a bias": (
        lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
        "its bias has the parametrization Tanh, which has no right_inverse",
    ),
    "spectral norm": (parametrizations.spectral_norm, "its weight becomes another one"),
    "orthogonal": (parametrizations.orthogonal, "its weight becomes another one"),
    "half": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
        "its weight becomes another one",
    ),
    "half a bias": (
        lambda layer: parametrize.register_parametrization(layer, "bias", Halved()),
        "its bias becomes another one",
    ),
    "orthogonal by exp": (
        lambda layer: parametrizations.orthogonal(layer, use_trivialization=False, orthogonal_map="matrix_exp"),
        "its weight cannot be set: ",
    ),
    "the older spectral norm": (nn.utils.spectral_norm, "spectral norm divides its weight"),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "its weight is pruned"),
    "pruned bias": (lambda layer: prune.random_unstructured(layer, "bias", 0.5), "its bias is pruned"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("change", CANNOT_EXPRESS)
def test_layers_that_cannot_apply_the_drawn_weight_are_refused(change, with_inputs):
    """Their weight is computed from other tensors, so filling it, or setting these, would give another one."""
    model = mlp()
    reason = CANNOT_EXPRESS[change][1]
    CANNOT_EXPRESS[change][0](model[2])
    # Reading the weight in train mode lets spectral norm go on with its iteration.
    applied = model[2].weight.detach().clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(9, 6, dtype=torch.float64) if with_inputs else None
    with pytest.raises(
        ValueError, match=rf"lps_model_: model has layers that cannot take a drawn weight: 2 \({reason}"
    ):
        init.lps_model_(model, inputs)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.eval()[2].weight, applied)


def test_layers_the_pass_does_not_reach_are_filled_as_well():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    model.unused = nn.Linear(500, 200).double()
    model.forward = lambda x: model[1](model[0](x).relu())
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator(1))
    init.lps_model_(model, x, rule="joint", generator=generator())
    check_variance(model.unused.weight, 1 / (500 * 0.49536 + 1))


def test_a_shared_layer_is_filled_once_before_its_first_use():
    shared = nn.Linear(6, 6).double()
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(20, 6, dtype=torch.float64, generator=generator(1))
    init.lps_model_(model, x, rule="anchored", generator=generator())
    assert shared(x).abs().amin(0).max() < 1e-13


@pytest.mark.parametrize(
    ("rule", "inputs"),
    [
        ("anchored", torch.full((5, 6), math.nan)),
        ("anchored", torch.ones(0, 6)),
        # The pass fails only when the first layer runs, after that layer was filled.
        ("joint", torch.ones(5, 7)),
    ],
    ids=["nan", "empty", "wrong-width"],
)
def test_a_failing_pass_leaves_the_model_as_it_was(rule, inputs):
    model = mlp()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises((ValueError, RuntimeError)):
        init.lps_model_(model, inputs.double(), rule=rule)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("n_out", [1, 150])
def test_gmp_is_the_uniform_law_of_weights_in_polar_form(n_out):
    n, m = 400, 50
    angles, radius, location = init.gmp_(empty(n, m - 1), empty(n), empty(n), n_out, generator())
    weight = radius[:, None] * hypersphere_direction(angles)
    bound = math.sqrt(6 / (m + n_out))
    assert weight.abs().max() <= bound * (1 + 1e-12)
    # A uniform law on +-b has variance b^2/3 and relative standard error sqrt(4/5 / count) of it.
    assert weight.square().mean().item() / (bound**2 / 3) == pytest.approx(1, abs=5 * math.sqrt(0.8 / weight.numel()))
    assert abs(weight.mean()) < 5 * bound / math.sqrt(3 * weight.numel())
    assert torch.equal(location, torch.zeros(n).double())


def test_gmp_keeps_both_signs_of_the_last_component():
    angles, _, _ = init.gmp_(empty(1000, 8), empty(1000), empty(1000), generator=generator())
    negative = (hypersphere_direction(angles)[:, -1] < 0).double().mean()
    assert abs(negative - 0.5) < 5 * math.sqrt(0.25 / 1000)


def test_gmp_takes_the_number_of_units_for_out_features():
    default = init.gmp_(empty(30, 8), empty(30), empty(30), generator=generator())
    explicit = init.gmp_(empty(30, 8), empty(30), empty(30), 30, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(default, explicit, strict=True))


def initialise_all(dtype=torch.float64, n=5, m=4, seed=0):
    g = generator(seed)
    return [
        init.lcw_(empty(n, m, dtype=dtype), generator=g),
        init.lcw_(empty(n, m - 1, dtype=dtype), basis=True, generator=g),
        *(
            t
            for rule in init.RULES
            for t in init.lps_(empty(n, m, dtype=dtype), empty(n, dtype=dtype), None, rule, generator=g)
        ),
        *init.gmp_(empty(n, m - 1, dtype=dtype), empty(n, dtype=dtype), empty(n, dtype=dtype), generator=g),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (1, 1), (7, 13)])
def test_every_dtype_and_size_is_filled_completely(dtype, n, m):
    for tensor in initialise_all(dtype, n, m):
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


def test_generators_repeat_and_leave_the_global_one():
    state = torch.random.get_rng_state()
    first, second, other = initialise_all(seed=1), initialise_all(seed=1), initialise_all(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.random.get_rng_state())


def test_parameters_are_filled_in_place_through_any_stride_without_a_graph():
    base = empty(4, 12)
    weight, parameter = base.T[::2], nn.Parameter(empty(6, 4))
    assert init.lcw_(weight, generator=generator()) is weight
    assert init.lcw_(parameter, generator=generator()) is parameter
    assert base[:, 1::2].isnan().all()
    assert weight.isfinite().all()
    assert parameter.isfinite().all()
    assert parameter.grad_fn is None


def test_fan_in_0_is_left_alone():
    assert init.lcw_(torch.empty(3, 0)).shape == (3, 0)


W, B = torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.lcw_(W.int()), TypeError, "lcw_: weight is torch.int32"),
        (lambda: init.lcw_(B), ValueError, r"lcw_: weight has shape \(3,\); expected \(n, m, \*k\)"),
        (lambda: init.lcw_(W[..., None], basis=True), ValueError, r"expected \(n, m-1\)"),
        (lambda: init.lcw_(W, "swish"), ValueError, "activation is 'swish'; expected one of None, 'identity'"),
        (lambda: init.lcw_(W, std=-1.0), ValueError, "lcw_: std is -1.0; expected a finite number > 0"),
        (lambda: init.lcw_(W, std=math.nan), ValueError, "lcw_: std is nan"),
        (lambda: init.lcw_(W, std="1"), TypeError, "std is a str; expected a Python number"),
        (lambda: init.lps_(W, B, rule="cauchy"), ValueError, "rule is 'cauchy'; expected one of 'joint', 'heavy_tail'"),
        (lambda: init.lps_(W, B, "swish"), ValueError, "lps_: activation is 'swish'"),
        (lambda: init.lps_(W, B, degree=-2), ValueError, "degree is -2"),
        (lambda: init.lps_(W, torch.ones(4)), ValueError, r"lps_: bias has shape \(4,\); expected \(3,\)"),
        (lambda: init.lps_(W, B.double()), TypeError, "bias is torch.float64; expected torch.float32, as weight is"),
        (lambda: init.lps_(W, None, rule="anchored"), ValueError, "Use rule='joint' without a bias"),
        (lambda: init.lps_(W, B, samples=W), ValueError, "Only rule='anchored' uses samples"),
        (lambda: init.lps_(W, B, rule="anchored", samples=torch.ones(2, 5)), ValueError, r"expected \(S, 4\)"),
        (lambda: init.lps_model_(nn.ReLU()), ValueError, "lps_model_: model has no nn.Linear"),
        (lambda: init.lps_model_(nn.Linear(2, 2), rule="x"), ValueError, "lps_model_: rule is 'x'"),
        (
            lambda: init.lps_model_(nn.Sequential(nn.Linear(2, 2, bias=False)), rule="anchored"),
            ValueError,
            r"layers without bias \(0\)",
        ),
        (
            lambda: init.lps_model_(nn.Linear(4, 3), torch.ones(0, 4), rule="anchored"),
            ValueError,
            r"lps_model_: inputs has shape \(0, 4\); expected at least one sample",
        ),
        (lambda: init.gmp_(B, B, B), ValueError, "gmp_: angles has shape"),
        (lambda: init.gmp_(W, torch.ones(4), B), ValueError, "gmp_: radius has shape"),
        (lambda: init.gmp_(W, B, B, 0), ValueError, "out_features is 0; expected at least 1"),
    ],
)
def test_errors_name_the_argument_and_write_nothing(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert torch.equal(W, torch.ones(3, 4))
    assert torch.equal(B, torch.ones(3))
