"""lps_model_ on real models: which weight a layer applies afterwards, and E z^2 = 1 whatever precedes a layer.

The inputs of a layer's units are checked against torch's autograd: z is linear in the weight, so its gradient with
respect to a unit's weights is the unit's input. Statistical tests are seeded and allow 5 stated standard errors.
"""

import copy
import math

import pytest
import torch
from support.growing import GrowingCache
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lcw_ops
from lcw_ops import init
from lcw_ops.init import _inputs, _layers
from lcw_ops.reference import hermite_roots, hermite_second_moment, lcw_weight

pytestmark = pytest.mark.usefixtures("one_thread")

LCW, LCW_BASIS = "LCWLinear", "LCWLinear, basis"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def applied():
    """Our layers, whose ``weight`` is the one that they apply."""
    return lcw_ops.nn


def second_moments(model, x):
    """The mean square of the output of every layer with a weight, in the order of the calls."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out.detach().double().square().mean().item()))
        for layer in _layers.find_layers(model)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


# ---- The inputs of units --------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "sequence": (lambda: nn.Linear(5, 3), (2, 3, 5)),
    "conv": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9)),
    "circular": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), padding_mode="circular"), (2, 2, 4, 3)),
    "same": (lambda: nn.Conv2d(2, 2, (2, 3), padding="same"), (1, 2, 4, 3)),
    "depthwise": (lambda: nn.Conv3d(3, 6, 2, groups=3), (1, 3, 3, 2, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "stride": (lambda: nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), (2, 2, 5)),
    "gaps": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=3, output_padding=1), (1, 2, 4)),
    "dilated": (lambda: nn.ConvTranspose2d(2, 4, (3, 2), (2, 1), 1, (1, 0), 2, dilation=(2, 1)), (2, 2, 3, 4)),
    "cropped": (lambda: nn.ConvTranspose1d(2, 2, 2, padding=2), (1, 2, 7)),
    "3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (1, 2, 2, 2, 3)),
    "unbatched": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), (2, 3, 2)),
}


def inputs_of_units(layer, x):
    """(groups, positions, inputs): the gradient of z at each position with respect to the weights of its unit."""
    z = layer(x)
    unit_dim = z.dim() - 1 if isinstance(layer, nn.Linear) else z.dim() - len(layer.kernel_size) - 1
    by_unit = z.movedim(unit_dim, 0)
    groups = getattr(layer, "groups", 1)
    rows = []
    for group in range(groups):
        unit = group * (len(by_unit) // groups)
        gradients = [torch.autograd.grad(entry, layer.weight, retain_graph=True) for entry in by_unit[unit].flatten()]
        rows.append(torch.stack([_layers.rows_of(layer, gradient)[unit] for (gradient,) in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_measured_power_is_that_of_the_inputs_of_the_units(name, zero_sum):
    make, shape = LAYERS[name]
    layer = make().double()
    x = normal(*shape) + 1
    rows = inputs_of_units(layer, x)
    if zero_sum:
        rows = rows - rows.mean(2, keepdim=True)
    expected = rows.square().sum(2).mean(1)
    torch.testing.assert_close(_inputs.measured_power(layer, x, zero_sum), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_samples_are_inputs_of_the_units(name):
    make, shape = LAYERS[name]
    layer = make().double()
    x = normal(*shape)
    rows = inputs_of_units(layer, x)
    groups = _inputs.samples_of(layer, x, generator())
    assert len(groups) == len(rows)
    for samples, of_group in zip(groups, rows, strict=True):
        distance = (samples[:, None] - of_group[None]).abs().amax(2)
        assert distance.amin(1).max() == 0
        # 1024 draws of at most 60 positions leave none out, up to a probability of 1e-5.
        assert distance.amin(0).max() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_units_and_become_the_weight_again(name):
    layer = LAYERS[name][0]()
    rows = _layers.rows_of(layer, layer.weight)
    assert rows.shape == (layer.bias.numel(), layer.weight.numel() // layer.bias.numel())
    assert torch.equal(_layers.weight_of(layer, rows, layer.weight), layer.weight)


@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("name", ["transposed", "stride", "gaps", "dilated", "3d"])
def test_the_assumed_power_of_a_transposed_convolution_is_that_of_long_inputs(name, zero_sum, mean):
    """Each tap meets an input at one of `stride` positions. The border, where fewer do, is cut off here."""
    layer = LAYERS[name][0]().double()
    dims = len(layer.kernel_size)
    lengths = (600,) if dims == 1 else (60,) * 2 if dims == 2 else (16,) * 3
    x = normal(2, layer.in_channels, *lengths) + mean
    entries = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    inner = layer(torch.zeros_like(x)).shape[2:]
    power = _inputs.measured_power(layer, x, zero_sum).mean().item()
    assumed = _inputs.assumed_moment(layer, entries, 1 + mean**2, 1.0, zero_sum) * (entries - zero_sum)
    # At the border, up to 2 reaches of the kernel are lost of each length; the draws of x add 3 %.
    reach = [2 * (k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    border = sum(lost / length for lost, length in zip(reach, inner, strict=True))
    assert power / assumed == pytest.approx(1, abs=border + 0.03)


@pytest.mark.parametrize("name", ["stride", "gaps", "dilated"])
def test_drawn_samples_of_a_transposed_convolution_leave_out_the_missed_taps(name):
    layer = LAYERS[name][0]()
    entries = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    samples = _inputs.without_missed(layer, torch.ones(5000, entries), generator())
    drawn = {tuple(row.tolist()) for row in samples}
    shape = (1, layer.in_channels, *(6,) * len(layer.kernel_size))
    seen = inputs_of_units(layer.double(), torch.ones(shape, dtype=torch.float64))
    # A pattern of taps that meet an input occurs, and the drawn ones are among those of the real layer.
    assert drawn <= {tuple(row.tolist()) for row in seen.flatten(0, 1)}
    assert samples.double().mean().item() == pytest.approx(1 / math.prod(layer.stride), rel=0.1)


# ---- Which weight is applied ----------------------------------------------------------------------------------------


def wrapped(kind, make):
    """A layer under a constraint that can express every weight."""
    layer = make()
    if kind == "plain":
        return layer
    if kind == "weight norm":
        return parametrizations.weight_norm(layer)
    if kind == "weight norm of the whole tensor":
        return parametrizations.weight_norm(layer, dim=None)
    if kind == "weight norm, scaled":
        return parametrize.register_parametrization(parametrizations.weight_norm(layer, dim=1), "weight", Scaled())
    if kind == "the older weight norm":
        return nn.utils.weight_norm(layer)
    if kind == "the older weight norm of the whole tensor":
        return nn.utils.weight_norm(layer, dim=None)
    parametrize.register_parametrization(layer, "bias", Scaled())
    return layer


class Scaled(nn.Module):
    def forward(self, x):
        return 3 * x

    def right_inverse(self, x):
        return x / 3


WRAPPED = [
    "weight norm",
    "weight norm of the whole tensor",
    "weight norm, scaled",
    "the older weight norm",
    "the older weight norm of the whole tensor",
    "a scaled bias",
]


def eagerly(kind, name, tensor):
    """Eager torch's own result for a tensor that goes through the constraint and comes back."""
    if name == "bias":
        return tensor / 3 * 3
    dim = -1 if "whole" in kind else 1 if "scaled" in kind else 0
    tensor = tensor / 3 if "scaled" in kind else tensor
    normed = torch._weight_norm(tensor, torch.norm_except_dim(tensor, 2, dim), dim)
    return 3 * normed if "scaled" in kind else normed


def chain(kind, dtype):
    return nn.Sequential(
        nn.Unflatten(1, (2, 8)),
        wrapped(kind, lambda: nn.Conv1d(2, 6, 3, groups=2)),
        nn.ReLU(),
        wrapped(kind, lambda: nn.ConvTranspose1d(6, 4, 3, groups=2)),
        nn.ReLU(),
        nn.Flatten(),
        wrapped(kind, lambda: nn.Linear(32, 5)),
    ).to(dtype)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("rule", init.RULES)
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_constrained_layer_applies_the_weight_that_a_plain_layer_gets(kind, rule, with_inputs, dtype):
    x = normal(20, 16, dtype=dtype) if with_inputs else None
    model, plain, wide = chain(kind, dtype), chain("plain", dtype), chain("plain", torch.float64)
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    init.lps_model_(model, x, rule=rule, generator=generator(5))
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter, _ in before]
    init.lps_model_(plain, x, rule=rule, generator=generator(5))
    init.lps_model_(wide, None if x is None else x.double(), rule=rule, generator=generator(5))
    probe = normal(7, 16, seed=3, dtype=dtype)
    model(probe)
    for ours, theirs, exact in zip(model, plain, wide, strict=True):
        if not hasattr(theirs, "weight"):
            continue
        for name in ("weight", "bias"):
            drawn, plainly, ours_applied = getattr(exact, name), getattr(theirs, name), getattr(ours, name)
            if x is not None:
                # Compare within the dtype: the layers before have their own roundings, so the inputs differ.
                drawn = plainly.double()
            eager = eagerly(kind, name, drawn.to(dtype)).double()
            bound = 2 * (eager - drawn).abs().max() + torch.finfo(dtype).eps * drawn.abs().max()
            if x is not None and ours is not model[1]:
                # The measured moments follow the roundings of the layers before, over sums of at most 48 products.
                bound = bound + 48 * torch.finfo(dtype).eps * drawn.abs().max()
            assert (ours_applied.double() - drawn).abs().max() <= bound


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_older_weight_norm_shows_the_drawn_weight_at_once_and_after_an_error_the_earlier_one():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 4)).double()
    earlier = model[0].weight
    with pytest.raises(TypeError):
        init.lps_model_(model, (normal(3, 6), 1), generator=generator())
    assert model[0].weight is earlier
    with pytest.raises(ValueError, match="NaN or infinite"):
        init.lps_model_(model, normal(3, 6) * math.nan, generator=generator())
    assert model[0].weight is earlier
    init.lps_model_(model, normal(3, 6), generator=generator())
    shown = model[0].weight.clone()
    model(normal(2, 6))
    torch.testing.assert_close(model[0].weight, shown, rtol=1e-14, atol=0)
    assert not torch.equal(shown, earlier)


class Standardised(nn.Conv2d):
    """Weight standardisation: the forward pass applies another weight than ``weight``."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Logged(nn.Linear):
    """A forward pass of its own that computes the same."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return nn.functional.linear(x, self.weight, self.bias)


class NeedsMask(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


class LowRank(nn.Linear):
    """As adapters have it: at first the second factor is 0, so that the layer is the plain one."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Standardised(3, 4, 3, padding=1), "which does not apply its weight and bias"),
        (lambda: NeedsMask(3, 4), "which fails on a tensor alone"),
        (lambda: LowRank(3, 4), "which does not apply its weight and bias"),
    ],
)
def test_a_class_that_applies_another_weight_is_refused(make, reason):
    model = nn.Sequential(nn.Linear(3, 3), make())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"lps_model_: model has layers .*: 1 \(it has a forward pass .*{reason}"):
        init.lps_model_(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_class_with_an_equal_forward_pass_is_filled_and_not_called():
    model = nn.Sequential(Logged(6, 5).double())
    init.lps_model_(model, generator=generator())
    assert not hasattr(model[0], "calls")
    expected = init.lps_(torch.empty(5, 6).double(), torch.empty(5).double(), None, generator=generator())
    assert torch.equal(model[0].weight, expected[0])


def test_a_shared_weight_is_filled_once_and_each_layer_has_its_own_bias():
    first, second = nn.Linear(30, 30), nn.Linear(30, 30)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second).double()
    init.lps_model_(model, normal(50, 30), generator=generator())
    alone = init.lps_model_(nn.Sequential(nn.Linear(30, 30)).double(), normal(50, 30), generator=generator())
    assert second.weight is first.weight
    assert torch.equal(first.weight, alone[0].weight)
    assert torch.equal(first.bias, alone[0].bias)
    assert not torch.equal(second.bias, first.bias)
    with pytest.raises(ValueError, match=r"2 \(it shares its weight with 0"):
        init.lps_model_(model, normal(50, 30), rule="anchored")
    assert torch.equal(first.weight, alone[0].weight)


# ---- Our layers -----------------------------------------------------------------------------------------------------


def ours(nn_ours, kind, *sizes):
    if kind == LCW_BASIS:
        return nn_ours.LCWLinear(*sizes, basis=True)
    if kind == "zero_sum":
        return nn_ours.utils.parametrizations.zero_sum(nn.Linear(*sizes))
    if kind == "hypersphere":
        return nn_ours.utils.parametrizations.hypersphere(nn.Linear(*sizes))
    return getattr(nn_ours, kind)(*sizes)


ZERO_SUM = [LCW, LCW_BASIS, "zero_sum"]
FREE = ["GmPLinear", "WeightNormLinear", "hypersphere"]


@pytest.mark.filterwarnings("error:.*do not sum to zero")
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("kind", ZERO_SUM)
def test_twenty_zero_sum_layers_keep_their_variance(applied, kind, with_inputs):
    """With E a^2 in place of Var a, 98 % of it would be lost. The last layers of several nets are judged together."""
    width, depth, nets = 128, 20, 8
    x = normal(200, width, dtype=torch.float32)
    last = []
    for seed in range(nets):
        layers = [module for _ in range(depth) for module in (ours(applied, kind, width, width), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        init.lps_model_(model, x if with_inputs else None, generator=generator(seed))
        last.append(second_moments(model, x)[-1])
        for layer in _layers.find_layers(model):
            assert layer.weight.double().sum(1).abs().max() < 1e-4
    mean = sum(last) / nets
    # Without inputs a layer's factor 1 + O(sqrt(2 / width)) compounds over 20 layers: log z^2 has a spread of 0.5 at
    # most, and the polynomial's variance, 1.4 % below the exact one, adds 0.25. With inputs there is one factor only.
    spread = 5 * math.sqrt(2 / width / nets) if with_inputs else 0.25 + 5 * 0.5 / math.sqrt(nets)
    assert abs(math.log(mean)) < spread


@pytest.mark.parametrize("kind", ZERO_SUM)
def test_joint_draws_the_coordinates_of_a_zero_sum_row_and_its_bias_with_one_scale(applied, kind):
    model = nn.Sequential(ours(applied, kind, 6, 20_000)).double()
    init.lps_model_(model, generator=generator())
    # Standardised data: s^2 = 1 / ((6 - 1) 1 + 1). A row has 5 coordinates, so its square sums to 5 s^2.
    squares = model[0].weight.square().sum(1)
    assert abs(squares.mean() * 6 / 5 - 1) < 5 * math.sqrt(2 / 5 / 20_000)
    assert abs(model[0].bias.square().mean() * 6 - 1) < 5 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize("kind", [*ZERO_SUM, *FREE])
def test_anchored_units_of_constrained_layers_vanish_at_a_real_input(applied, kind):
    model = nn.Sequential(ours(applied, kind, 6, 30), nn.ReLU(), ours(applied, kind, 30, 20)).double()
    x = normal(40, 6)
    init.lps_model_(model, x, rule="anchored", generator=generator())
    with torch.no_grad():
        for layers in (model[:1], model):
            z = layers(x)
            assert z.abs().amin(0).max() < 1e-12
            assert z.std(correction=0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_free_constraints_apply_the_weight_of_a_plain_layer(applied, kind, dtype):
    model = nn.Sequential(ours(applied, kind, 16, 12), nn.ReLU(), ours(applied, kind, 12, 5)).to(dtype)
    plain = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype)
    for one in (model, plain):
        init.lps_model_(one, generator=generator())
    for index in (0, 2):
        # The angles of a direction are rounded, as are their sines: 16 units in the last place.
        torch.testing.assert_close(model[index].weight, plain[index].weight, rtol=0, atol=16 * torch.finfo(dtype).eps)
        torch.testing.assert_close(model[index].bias, plain[index].bias, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["GmPLinear", "WeightNormLinear", LCW, LCW_BASIS])
def test_constrained_layers_are_filled_from_uninitialised_memory(applied, kind):
    name, options = (LCW, {"basis": True}) if kind == LCW_BASIS else (kind, {})
    layer = nn.utils.skip_init(getattr(applied, name), 8, 4, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    init.lps_model_(nn.Sequential(layer), generator=generator())
    assert layer(torch.ones(2, 8)).isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("basis", [False, True])
def test_zero_sum_convolutions_have_e_z_squared_1(applied, basis, groups):
    model = nn.Sequential(applied.LCWConv2d(4, 4000, 3, padding=1, groups=groups, basis=basis)).double()
    x = normal(3, 4, 6, 6) * torch.tensor([1.0, 1, 5, 5]).view(4, 1, 1).double() + 7
    init.lps_model_(model, x, generator=generator())
    for part in model(x).detach().chunk(groups, 1):
        assert abs(part.square().mean() - 1) < 5 * math.sqrt(2 / (4000 / groups))


def test_a_gmp_layer_with_a_relu_and_negative_radii_is_filled(applied):
    layer = applied.GmPLinear(6, 5, activation="relu")
    with torch.no_grad():
        layer.radius.neg_()
    init.lps_model_(nn.Sequential(layer), rule="anchored", generator=generator())
    assert (layer.radius > 0).all()
    frozen = applied.GmPLinear(6, 5, bias=False)
    with pytest.raises(ValueError, match=r"layers without bias \(0\)"):
        init.lps_model_(nn.Sequential(frozen), rule="anchored")


# ---- What precedes a layer ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


class Gated(nn.Module):
    """Two branches with different activations, multiplied."""

    def __init__(self, width):
        super().__init__()
        self.value, self.gate, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.out(self.value(x).tanh() * self.gate(x).sigmoid())


def depthwise_separable(channels):
    return [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]


MODELS = {
    "residual": (lambda: nn.Sequential(*(Residual(nn.ReLU(), nn.Linear(96, 96)) for _ in range(40))), (64, 96)),
    "residual branches of two": (
        lambda: nn.Sequential(*(Residual(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96)) for _ in range(20))),
        (64, 96),
    ),
    "gated": (lambda: nn.Sequential(*(Gated(96) for _ in range(5))), (64, 96)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3), *depthwise_separable(64), *depthwise_separable(64)),
        (4, 3, 12, 12),
    ),
    "autoencoder": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1, groups=4),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 64, 2, stride=3),
        ),
        (4, 2, 16, 16),
    ),
    "layer norm and pooling": (
        lambda: nn.Sequential(
            nn.Linear(96, 96), nn.LayerNorm(96), nn.Softplus(), nn.Linear(96, 96), nn.AvgPool1d(4), nn.Linear(24, 96)
        ),
        (64, 96),
    ),
}


@pytest.mark.parametrize("rule", ["joint", "anchored"])
@pytest.mark.parametrize("name", MODELS)
def test_with_inputs_every_layer_has_unit_pre_activations(name, rule):
    make, shape = MODELS[name]
    x = normal(*shape, dtype=torch.float32) * 3 + 1
    of_layers = []
    for seed in range(4):
        model = make().eval()
        init.lps_model_(model, x, rule=rule, generator=generator(seed))
        of_layers.append(second_moments(model, x))
    means = [sum(of_layer) / len(of_layer) for of_layer in zip(*of_layers, strict=True)]
    # The joint law: z^2 is a mean over at least 64 units of 4 nets, each with a relative standard error sqrt(2). The
    # anchored rule makes the standard deviation 1, and the mean of z over a layer's units adds little to it.
    assert max(abs(mean - 1) for mean in means) < 5 * math.sqrt(2 / (64 * len(of_layers)))


def test_without_inputs_a_residual_net_is_beyond_what_the_activation_says():
    """The reason for which the docstring asks for inputs: without them this net's last layer has E z^2 above 1e6."""
    make, shape = MODELS["residual"]
    x = normal(*shape, dtype=torch.float32)
    model = init.lps_model_(make(), generator=generator())
    assert second_moments(model, x)[-1] > 1e6


@pytest.mark.parametrize("rule", init.RULES)
def test_without_inputs_a_transposed_convolution_has_unit_pre_activations(rule):
    model = nn.Sequential(
        nn.ConvTranspose1d(64, 256, 4, stride=2, groups=2), nn.ReLU(), nn.ConvTranspose1d(256, 256, 6, stride=3)
    )
    x = normal(8, 64, 100, dtype=torch.float32)
    moments = []
    for seed in range(8):
        init.lps_model_(model, rule=rule, generator=generator(seed))
        moments.append(second_moments(model, x))
    for of_layer in zip(*moments, strict=True):
        values = torch.tensor(of_layer)
        # The nets' own spread is the yardstick, as heavy tails have a large fourth moment, plus 4 % for the border.
        assert abs(values.mean() - 1) < 5 * values.std() / math.sqrt(8) + 0.04


def test_layers_that_are_read_but_not_called_come_before_the_data():
    """nn.MultiheadAttention reads out_proj.weight and never calls it; what follows must see the filled weight."""
    model = nn.TransformerEncoderLayer(96, 4, 256, dropout=0.0, batch_first=True)
    with torch.no_grad():
        model.self_attn.out_proj.weight.mul_(1000)
    x = normal(6, 10, 96, dtype=torch.float32)
    init.lps_model_(model, x, generator=generator())
    moments = second_moments(model, x)
    assert len(moments) == 2
    # linear1 of 256 units, linear2 of 96.
    for moment, units in zip(moments, (256, 96), strict=True):
        assert abs(moment - 1) < 5 * math.sqrt(2 / units)
    assert model.self_attn.out_proj.weight.abs().max() < 1


def test_inputs_may_be_keywords_and_reach_layers_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 40), nn.Linear(40, 3)

        def forward(self, x, scale):
            return self.second(input=self.first(input=x * scale).relu())

    model, positional = Keyword().double(), Keyword().double()
    x = normal(20, 6)
    init.lps_model_(model, {"x": x, "scale": 3}, rule="anchored", generator=generator())
    init.lps_model_(positional, (x, 3), rule="anchored", generator=generator())
    assert all(map(torch.equal, model.parameters(), positional.parameters()))
    assert model.first(x * 3).abs().amin(0).max() < 1e-12


def test_a_layer_that_sees_only_zeros_is_filled_as_without_inputs():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2000), nn.Flatten(), nn.Linear(2000, 3, bias=False))
    hook = model[1].register_forward_hook(lambda *_: torch.zeros(3, 4, dtype=torch.float64))
    model[3].register_forward_hook(lambda *_: torch.zeros(3, 2000, dtype=torch.float64))
    init.lps_model_(model.double(), normal(3, 5), generator=generator())
    hook.remove()
    expected = 1 / (4 * hermite_second_moment("relu", 4) + 1)
    assert abs(model[2].weight.square().mean() / expected - 1) < 5 * math.sqrt(2 / 8000)
    assert model[4].weight.isfinite().all()
    assert model[4].weight.abs().max() < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", init.RULES)
def test_narrow_nets_that_die_get_weights_of_ordinary_size(rule, dtype):
    """Behind a dead layer an anchored unit sees only the rounding at an anchor; scaled to 1 it would need 1e16."""
    x = torch.linspace(-1.7, 1.7, 65, dtype=dtype)[:, None]
    dead = 0
    for seed in range(20):
        layers = [module for l in range(12) for module in (nn.Linear(2 if l else 1, 2), nn.ReLU())]
        model = init.lps_model_(nn.Sequential(*layers).to(dtype), x, rule=rule, generator=generator(seed))
        # Inputs below 64 roundings are not scaled to 1.
        assert max(parameter.abs().max() for parameter in model.parameters()) < 1 / (4 * torch.finfo(dtype).eps)
        dead += model(x).std() < 1e-4
    assert dead > 0


def test_small_inputs_that_are_not_those_of_a_dead_layer_are_scaled():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2000)).double()
    model[0].register_forward_hook(lambda *_: 1e-12 * normal(30, 5))
    init.lps_model_(model, normal(30, 4), rule="anchored", generator=generator())
    assert model(normal(30, 4)).std(correction=0).item() == pytest.approx(1, rel=1e-12)


# ---- Lazy layers ----------------------------------------------------------------------------------------------------


def lazy():
    return nn.Sequential(
        nn.LazyConv2d(8, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.LazyConvTranspose2d(4, 2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


@pytest.mark.parametrize("rule", init.RULES)
def test_lazy_layers_are_initialised_by_the_pass_and_filled(rule):
    x = normal(6, 2, 5, 5, dtype=torch.float32)
    model = lazy()
    assert init.lps_model_(model, x, rule=rule, generator=generator()) is model
    made = lazy()
    made(x)
    made[1].reset_running_stats()
    init.lps_model_(made, x, rule=rule, generator=generator())
    assert type(model[5]) is nn.Linear
    assert all(map(torch.equal, model.parameters(), made.parameters()))
    assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_lazy_layers_without_inputs_or_beyond_them_are_refused_by_name():
    with pytest.raises(ValueError, match=r"lps_model_: model has lazy layers that are not initialised \(0, 3, 5\)"):
        init.lps_model_(lazy())
    model = lazy()
    model.unused = nn.LazyLinear(3)
    model.forward = lambda x: model[0](x)
    with pytest.raises(ValueError, match=r"3 \(it is lazy, and no input reaches it\)"):
        init.lps_model_(model, normal(6, 2, 5, 5, dtype=torch.float32))
    assert all(_layers.is_uninitialised(layer) for layer in (model[0], model[3], model.unused))


def test_an_error_leaves_lazy_layers_lazy():
    model = lazy()
    with pytest.raises(ValueError, match="NaN or infinite"):
        init.lps_model_(model, torch.full((6, 2, 5, 5), math.nan), rule="anchored")
    assert _layers.is_uninitialised(model[0])
    model(normal(6, 2, 5, 5, dtype=torch.float32))


# ---- Activations, roots, generators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", torch.relu),
        ("leaky_relu", nn.LeakyReLU()),
        ("sigmoid", torch.sigmoid),
        ("tanh", nn.Tanh()),
        ("silu", nn.SiLU(inplace=True)),
        ("gelu", nn.GELU()),
        ("softplus", nn.Softplus()),
        ("elu", lambda z: torch.where(z > 0, z, z.exp() - 1)),
    ],
)
def test_a_function_gives_the_weights_of_its_name(name, function):
    def draw(activation):
        g = generator()
        lcw = init.lcw_(torch.empty(5, 4).double(), activation, 0.7, generator=g)
        lps = init.lps_(torch.empty(5, 4).double(), torch.empty(5).double(), activation, generator=g)
        model = init.lps_model_(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), activation=activation, generator=g
        )
        return [lcw, *lps, *model.parameters()]

    # The two quadratures agree to 1e-13.
    torch.testing.assert_close(draw(function), draw(name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("degree", [3, 4])
@pytest.mark.parametrize("activation", ["tanh", "relu", nn.Hardtanh()])
def test_polynomial_roots_are_met_at_an_input_by_some_units_each(activation, degree):
    roots = torch.tensor(hermite_roots(activation, degree), dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 200), nn.ReLU(), nn.Linear(200, 300)).double()
    x = normal(30, 5)
    init.lps_model_(model, x, activation, "anchored", degree, generator(), root="polynomial")
    for z in (model[0](x), model(x)):
        distance = (z.detach()[..., None] - roots).abs().amin(0)
        assert distance.amin(1).max() < 1e-12
        met = (distance < 1e-12).sum(0)
        assert (met > len(distance) / len(roots) / 2).all()
    weight, bias = torch.empty(300, 5).double(), torch.empty(300).double()
    init.lps_(weight, bias, activation, "anchored", degree, x, generator(), root="polynomial")
    assert ((x @ weight.T + bias)[..., None] - roots).abs().amin((0, 2)).max() < 1e-12


def test_a_number_as_root_is_the_value_at_the_anchor():
    model = nn.Sequential(nn.Linear(5, 20)).double()
    x = normal(30, 5)
    init.lps_model_(model, x, rule="anchored", generator=generator(), root=0.7)
    z = model(x).detach()
    assert (z - 0.7).abs().amin(0).max() < 1e-12
    assert z.std(correction=0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rule", init.RULES)
@pytest.mark.parametrize("with_inputs", [False, True])
def test_a_generator_decides_everything(rule, with_inputs):
    def make():
        return nn.Sequential(
            nn.Unflatten(1, (4, 4)),
            nn.Conv1d(4, 8, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 4, 2, stride=2),
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(16, 3)),
        )

    x = normal(9, 16, dtype=torch.float32) if with_inputs else None
    root = "polynomial" if rule == "anchored" else 0.0
    model = make()
    state = torch.random.get_rng_state()
    first, second, other = (
        [
            tensor.clone()
            for tensor in init.lps_model_(model, x, "tanh", rule, 3, generator(seed), root).state_dict().values()
        ]
        for seed in (3, 3, 4)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, other))


def test_a_generator_of_another_device_is_honoured():
    """Here the layer is on the meta device, which has no numbers: the draws come from the CPU's generator."""
    model = nn.Sequential(nn.Linear(5, 4, device="meta"), nn.ConvTranspose1d(2, 3, 4, stride=2, device="meta"))
    for rule in init.RULES:
        g = generator()
        before = g.get_state()
        init.lps_model_(model, rule=rule, generator=g)
        assert not torch.equal(before, g.get_state())
    tensor = torch.empty(3, 4, device="meta")
    g = generator()
    for fill in (init.lcw_, lambda w, generator: init.gmp_(w, w[:, 0], w[:, 0], generator=generator)):
        before = g.get_state()
        fill(tensor, generator=g)
        assert not torch.equal(before, g.get_state())


# ---- Computed tensors -----------------------------------------------------------------------------------------------

FILLS = {
    "lcw_": lambda w: init.lcw_(w),
    "lps_": lambda w: init.lps_(w, torch.zeros(w.shape[0])),
    "lps_ bias": lambda w: init.lps_(torch.zeros(w.shape[0], 4), w[:, 0]),
    "gmp_": lambda w: init.gmp_(w, torch.zeros(w.shape[0]), torch.zeros(w.shape[0])),
    "gmp_ radius": lambda w: init.gmp_(torch.zeros(w.shape[0], 4), w[:, 0], torch.zeros(w.shape[0])),
    "gmp_ location": lambda w: init.gmp_(torch.zeros(w.shape[0], 4), torch.zeros(w.shape[0]), w[:, 0]),
}


@pytest.mark.parametrize("name", FILLS)
def test_a_computed_tensor_is_refused_because_filling_it_changes_nothing(name):
    layer = parametrizations.weight_norm(nn.Linear(4, 5))
    before = copy.deepcopy(layer.state_dict())
    function = name.split()[0]
    with pytest.raises(ValueError, match=rf"{function}: \w+ was computed from other tensors.*weight_u.*layer.weight ="):
        FILLS[name](layer.weight)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    parameter = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="was computed"):
        FILLS[name](parameter * 1)
    with pytest.raises(ValueError, match="was computed"):
        FILLS[name]((parameter * 1).view(5, 4))


@pytest.mark.parametrize("name", FILLS)
def test_parameters_buffers_and_views_of_them_are_filled(name):
    for base in (nn.Parameter(torch.full((10, 4), math.nan)), torch.full((10, 4), math.nan)):
        view = base[::2]
        FILLS[name](view.view(5, 4))
        with torch.no_grad():
            part = base[::2, :1] if " " in name else base[::2]
            assert part.isfinite().all()
            assert base[1::2].isnan().all()


@pytest.mark.parametrize("kind", ["GmPLinear", "WeightNormLinear", LCW, LCW_BASIS])
def test_the_weight_of_our_layers_is_refused(applied, kind):
    layer = ours(applied, kind, 4, 5)
    before = copy.deepcopy(layer.state_dict())
    for fill in (init.lcw_, lambda weight: init.lps_(weight, None)):
        with pytest.raises(ValueError, match="was computed from other tensors"):
            fill(layer.weight)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    if kind == LCW:
        init.lcw_(layer.weight_u, generator=generator())
        torch.testing.assert_close(layer.weight, lcw_weight(layer.weight_u))


# ---- Errors ---------------------------------------------------------------------------------------------------------

W, B = torch.ones(3, 4), torch.ones(3)


class Random(nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.lps_(W, B, root=1.0), ValueError, "lps_: root is 1.0 with rule 'joint'; expected 0"),
        (lambda: init.lps_(W, B, root="polynomial"), ValueError, "root is 'polynomial' with rule 'joint'"),
        (lambda: init.lps_(W, B, rule="anchored", root="zero"), ValueError, "root is 'zero'; expected a number or"),
        (lambda: init.lps_(W, B, rule="anchored", root=math.nan), ValueError, "root is nan; expected a finite number"),
        (lambda: init.lps_(W, B, rule="anchored", root=None), TypeError, "root is a NoneType"),
        (lambda: init.lps_(W, B, None, "anchored", root="polynomial"), ValueError, "lps_: activation is None"),
        (lambda: init.lps_(W, B, "tanh", "anchored", None, root="polynomial"), ValueError, "lps_: degree is None"),
        (lambda: init.lps_(W, B, "softplus", "anchored", 2, root="polynomial"), ValueError, "no real root"),
        (lambda: init.lcw_(W, nn.ReLU), TypeError, "activation is a function that returns a ReLU"),
        (lambda: init.lcw_(W, torch.sum), ValueError, r"that makes shape \(\) of"),
        (lambda: init.lcw_(W, torch.log), ValueError, "values that are NaN or infinite"),
        (lambda: init.lcw_(W, lambda z: (z.square() / 4).exp()), ValueError, "grows too fast"),
        (lambda: init.lcw_(W, Random()), ValueError, "do not converge; expected a function without randomness"),
        (lambda: init.lps_model_(nn.Linear(4, 3), activation=3), ValueError, "lps_model_: activation is 3"),
        (
            lambda: init.lps_model_(nn.Linear(4, 3), torch.full((2, 4), math.inf)),
            ValueError,
            "lps_model_: inputs give the layer itself NaN or infinite numbers",
        ),
    ],
)
def test_errors_name_the_argument_and_write_nothing(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert torch.equal(W, torch.ones(3, 4))
    assert torch.equal(B, torch.ones(3))


# ---- Tied embeddings, and models that leave traces -------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head has the embedding's weight, with a row for padding."""

    def __init__(self, how="same object", kind=nn.Linear):
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=0)
        self.hidden, self.head = nn.Linear(16, 16), kind(16, 40)
        if how == "same object":
            self.head.weight = self.embed.weight
        elif how == "same memory":
            self.head.weight = nn.Parameter(self.embed.weight.data)
        elif how == "overlap":
            self.head = kind(16, 30)
            self.head.weight = nn.Parameter(self.embed.weight.data[10:])

    def forward(self, tokens):
        return self.head(torch.relu(self.hidden(self.embed(tokens))))


@pytest.mark.parametrize("how", ["same object", "same memory", "overlap"])
@pytest.mark.parametrize("rule", ["joint", "anchored"])
@pytest.mark.parametrize("has_inputs", [True, False])
def test_a_weight_that_is_tied_to_an_embedding_stays(how, rule, has_inputs):
    """The head keeps the embedding's weight, gets a zero bias, and the hidden layer is filled on that basis."""
    torch.manual_seed(0)
    model = Tied(how)
    with torch.no_grad():
        model.embed.weight.mul_(0.02)
        model.head.bias.fill_(3.0)
    embedding, hidden = model.embed.weight.detach().clone(), model.hidden.weight.detach().clone()
    tokens = torch.randint(1, 40, (64, 5), generator=generator())
    moments = []
    for seed in range(40):
        init.lps_model_(model, tokens if has_inputs else None, rule=rule, generator=generator(seed))
        moments.append(model.hidden(model.embed(tokens)).square().mean().item())
    assert torch.equal(model.embed.weight, embedding)
    assert torch.equal(model.embed.weight[0], torch.zeros(16))
    assert torch.equal(model.head.weight, embedding[-len(model.head.weight) :])
    assert torch.equal(model.head.bias, torch.zeros_like(model.head.bias))
    assert not torch.equal(model.hidden.weight, hidden)
    if has_inputs and rule == "joint":
        moments = torch.tensor(moments)
        assert abs(moments.mean() - 1) <= 5 * moments.std() / math.sqrt(len(moments))


def test_a_tied_head_without_bias_is_no_obstacle_to_the_anchored_rule():
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    init.lps_model_(model, rule="anchored", generator=generator())
    assert torch.equal(model[0].weight, before)


def test_a_bias_that_another_module_holds_stays():
    class Predictions(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(3, 4)
            self.bias = self.decoder.bias

    model = Predictions()
    weight, bias = model.decoder.weight.detach().clone(), model.bias.detach().clone()
    init.lps_model_(model, generator=generator())
    assert torch.equal(model.bias, bias)
    assert not torch.equal(model.decoder.weight, weight)


class ShiftsItsInput(nn.Module):
    """It calls only one of its layers, so the pass is repeated. It writes into its input, or a buffer, or fails."""

    def __init__(self, fails=False):
        super().__init__()
        self.first, self.missed = nn.Linear(4, 64), nn.Linear(64, 2)
        self.register_buffer("running_mean", torch.zeros(3))
        self.fails = fails

    def forward(self, x, y=None):
        self.running_mean.add_(1)
        z = self.first(x.sub_(1.0))
        if self.fails:
            raise RuntimeError("broken on purpose")
        return torch.nn.functional.linear(z, self.missed.weight, self.missed.bias)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_the_pass_gets_a_fresh_copy_of_the_inputs_each_time(form):
    x = normal(256, 4, dtype=torch.float32) + 3
    before = x.clone()
    given = {"tensor": x, "tuple": (x, None), "list": [x, None], "dict": {"x": x}}[form]
    moments = []
    for seed in range(20):
        model = init.lps_model_(ShiftsItsInput(), given, generator=generator(seed))
        moments.append(model.first(before - 1).square().mean().item())
    assert torch.equal(x, before)
    moments = torch.tensor(moments)
    assert abs(moments.mean() - 1) <= 5 * moments.std() / math.sqrt(len(moments))


def test_a_model_whose_cache_grows_still_runs():
    model, x = GrowingCache(), torch.randn(8, 4)
    init.lps_model_(model, x)
    assert (model.length, len(model.cache)) == (1, 1)
    assert model(x).shape == (8, 4)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_restored_after_success_and_after_an_error(fails):
    model = ShiftsItsInput(fails)
    buffer, state = model.running_mean, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            init.lps_model_(model, normal(8, 4, dtype=torch.float32))
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    else:
        init.lps_model_(model, normal(8, 4, dtype=torch.float32))
        assert not torch.equal(model.first.weight, state["first.weight"])
    assert model.running_mean is buffer
    assert torch.equal(buffer, torch.zeros(3))
