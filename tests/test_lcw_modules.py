"""LCWLinear and LCWConv1d/2d/3d: torch.nn's arguments and state, weights kept in inference, nets of 100 sigmoid layers.

In inference a layer keeps its constrained weight until the parameter changes.
"""

import copy
import inspect
import itertools
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import init, nn
from lcw_ops._layer_kinds import is_conv, is_linear
from lcw_ops.jobs import data

pytestmark = pytest.mark.usefixtures("compiled_kernel", "one_thread")

CONVS = [(nn.LCWConv1d, torch.nn.Conv1d, 1), (nn.LCWConv2d, torch.nn.Conv2d, 2), (nn.LCWConv3d, torch.nn.Conv3d, 3)]


@pytest.fixture
def compiled_kernel():
    with lcw_ops.use_backend("cpp"):
        yield


def layers(basis=False, **options):
    """One layer of each kind, with its input."""
    return [
        (nn.LCWLinear(6, 5, basis=basis, **options), torch.randn(4, 6)),
        (nn.LCWConv1d(4, 6, 3, basis=basis, **options), torch.randn(2, 4, 9)),
        (nn.LCWConv2d(4, 6, 3, basis=basis, **options), torch.randn(2, 4, 7, 8)),
        (nn.LCWConv3d(4, 6, (1, 2, 3), basis=basis, **options), torch.randn(2, 4, 3, 4, 5)),
    ]


def trained_name(layer):
    return "weight_v" if layer.basis else "weight_u"


def trained(layer):
    """The parameter from which the layer computes its weight."""
    return getattr(layer, trained_name(layer))


def plain_layer(layer, kind, *arguments, **options):
    """torch's layer with the weight that ours applies."""
    plain = kind(*arguments, **options)
    plain.load_state_dict({**plain.state_dict(), "weight": layer.weight.detach()}, strict=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain


# ---- Arguments and results ------------------------------------------------------------------------------------------

CONV_OPTIONS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": "same", "dilation": 2, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"dilation": 2},
    {"groups": 2},
    {"groups": 4, "padding": "same"},
    {"bias": False},
    {"groups": 2, "stride": 2, "padding": 1, "dilation": 2, "bias": False},
]


@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "torchs", "rank"), CONVS, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("basis", [False, True])
def test_convolutions_take_torchs_arguments(basis, ours, torchs, rank, options):
    layer = ours(4, 8, 3, basis=basis, **options)
    torch.nn.init.normal_(layer.bias) if layer.bias is not None else None
    plain = plain_layer(layer, torchs, 4, 8, 3, **options)
    x = torch.randn(2, 4, *(9, 8, 7)[:rank], requires_grad=True)
    for inputs in (x, x[0]):
        output = layer(inputs)
        torch.testing.assert_close(output, plain(inputs), rtol=0, atol=0)
    grad_output = torch.randn_like(layer(x))
    gradients = [torch.autograd.grad(module(x), x, grad_output)[0] for module in (layer, plain)]
    assert torch.equal(*gradients)
    sums = layer.effective_weight().flatten(1).sum(1)
    # 108 entries below 2 are off by half an ulp each, and by as much again because the mean is rounded.
    assert sums.abs().max() <= 4 * 27 * 2**-23
    assert repr(layer) == repr(plain).replace(torchs.__name__, ours.__name__)[:-1] + f", basis={basis})"


@pytest.mark.parametrize(("ours", "torchs", "rank"), CONVS, ids=["1d", "2d", "3d"])
def test_positional_arguments_are_torchs(ours, torchs, rank):
    arguments = (4, 6, 3, 2, 1, 1, 2, False, "circular", "cpu", torch.float64)
    layer, plain = ours(*arguments), torchs(*arguments)
    assert repr(layer) == repr(plain).replace(torchs.__name__, ours.__name__)[:-1] + ", basis=False)"
    assert layer.weight.shape == plain.weight.shape
    assert layer.weight.dtype == torch.float64
    assert layer(torch.randn(1, 4, *(8,) * rank, dtype=torch.float64)).shape[:2] == (1, 6)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 30])
def test_linear_is_torchs_with_the_effective_weight(rows, bias, basis):
    layer = nn.LCWLinear(7, 5, bias, basis, "cpu", torch.float64)
    plain = plain_layer(layer, torch.nn.Linear, 7, 5, bias, "cpu", torch.float64)
    x = torch.randn(rows, 7, dtype=torch.float64)
    # Seven products below 10 are summed in two orders.
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=2 * 7 * 10 * 2**-52)
    assert repr(layer) == f"LCWLinear(in_features=7, out_features=5, bias={bias}, basis={basis})"
    assert not isinstance(layer, torch.nn.Linear)
    assert is_linear(layer)
    assert not is_conv(layer)


@pytest.mark.parametrize("basis", [False, True])
def test_every_parameter_gets_the_gradient_of_the_formula(basis):
    for layer, x in layers(basis):
        weight = trained(layer).detach().requires_grad_()
        constrained = F.lcw_weight(weight, basis).view_as(layer.effective_weight())
        output = layer(x)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
        if isinstance(layer, nn.LCWLinear):
            expected = torch.nn.functional.linear(x, constrained, layer.bias)
        else:
            expected = layer._conv_forward(x, constrained, layer.bias)
        gradient, bias_gradient = torch.autograd.grad(expected, [weight, layer.bias], grad_output)
        # Sums of at most 2 x 84 products below 10.
        torch.testing.assert_close(trained(layer).grad, gradient, rtol=0, atol=168 * 10 * 2**-23)
        torch.testing.assert_close(layer.bias.grad, bias_gradient, rtol=0, atol=168 * 10 * 2**-23)


@pytest.mark.parametrize("basis", [False, True])
def test_a_fan_in_of_1_leaves_the_bias(basis):
    """A single weight whose sum is zero is zero."""
    depthwise = partial(nn.LCWConv2d, 3, 3, 1, groups=3)
    for layer, x in [
        (nn.LCWLinear(1, 4, basis=basis), torch.randn(5, 1)),
        (nn.LCWConv1d(1, 4, 1, basis=basis), torch.randn(5, 1, 6)),
        (depthwise(basis=basis), torch.randn(2, 3, 4, 4)),
    ]:
        torch.nn.init.normal_(layer.bias)
        assert not layer.effective_weight().any()
        shape = (1, -1) if x.dim() == 2 else (1, -1, *(1,) * (x.dim() - 2))
        output = layer(x)
        assert torch.equal(output, layer.bias.view(shape).expand_as(output))
        output.sum().backward()
        assert trained(layer).grad is None or not trained(layer).grad.any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("basis", [False, True])
def test_no_units(basis):
    assert nn.LCWLinear(5, 0, basis=basis)(torch.randn(2, 5)).shape == (2, 0)
    if not basis:
        layer = nn.LCWLinear(0, 5)
        assert torch.equal(layer(torch.randn(2, 0)), layer.bias.expand(2, 5))


def test_zero_padding_aside_a_constant_input_gives_the_bias():
    layer = nn.LCWConv2d(3, 5, 3, padding=1, padding_mode="reflect")
    torch.nn.init.normal_(layer.bias)
    output = layer(torch.full((1, 3, 6, 6), 4.0))
    # 27 products below 8 cancel.
    torch.testing.assert_close(output, layer.bias.view(1, -1, 1, 1).expand_as(output), rtol=0, atol=27 * 8 * 2**-23)


def test_compiled_layers():
    for basis in (False, True):
        for layer, x in layers(basis)[::2]:
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            layer(x).sum().backward()
            expected = trained(layer).grad.clone()
            layer.zero_grad()
            output = compiled(x)
            output.sum().backward()
            torch.testing.assert_close(output, layer(x), rtol=0, atol=36 * 10 * 2**-23)
            torch.testing.assert_close(trained(layer).grad, expected, rtol=0, atol=168 * 10 * 2**-23)


def test_compiled_inference_sees_every_edit():
    layer, x = layers()[2]
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=36 * 10 * 2**-23)
            trained(layer).data.neg_()


# ---- State ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_layers_are_copied_and_come_back(how, basis, used, tmp_path):
    for (layer, x), (other, _) in zip(layers(basis), layers(basis), strict=True):
        layer.eval()
        if used:
            # From now on the layer keeps its constrained weight.
            with torch.inference_mode():
                layer(x)
        if how == "state dict":
            torch.save(layer.state_dict(), tmp_path / "layer.pt")
            other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
            assert [*layer.state_dict()] == [trained_name(layer), "bias"]
        elif how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            torch.save(layer, tmp_path / "layer.pt")
            other = torch.load(tmp_path / "layer.pt", weights_only=False)
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        with torch.no_grad():
            trained(other).mul_(2)
            assert not torch.equal(other.eval()(x), layer(x))


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layers_take_on_another_dtype(dtype, basis):
    for (layer, x), (made, _) in zip(layers(basis), layers(basis, dtype=dtype), strict=True):
        layer.eval()
        with torch.no_grad():
            expected = layer(x)
            moved = layer.to(dtype)
            output = moved(x.to(dtype))
            assert output.dtype == made(x.to(dtype)).dtype == dtype
            weight = F.lcw_weight(trained(moved), basis)
            assert torch.equal(moved.effective_weight(), weight.view_as(moved.effective_weight()))
        # Input, weight and constrained weight are rounded to dtype: three roundings in each of 36 products below 10.
        unit = max(torch.finfo(dtype).eps, 2**-23)
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=3 * 36 * 10 * unit)


@pytest.mark.parametrize("basis", [False, True])
def test_layers_on_the_meta_device_are_filled_later(basis):
    for (layer, x), (source, _) in zip(layers(basis, device="meta"), layers(basis), strict=True):
        assert trained(layer).is_meta
        with lcw_ops.use_backend("reference"):
            assert layer(x.to("meta")).is_meta
        layer.to_empty(device="cpu")
        layer.load_state_dict(source.state_dict())
        assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("basis", [False, True])
def test_initial_weights_have_variance_1_over_the_fan_in(basis):
    for layer in (
        nn.LCWLinear(500, 800, basis=basis),
        nn.LCWConv1d(50, 800, 10, basis=basis),
        nn.LCWConv2d(40, 800, (4, 3), groups=2, basis=basis),
        nn.LCWConv3d(20, 800, 3, basis=basis),
    ):
        fan_in = layer.effective_weight()[0].numel()
        for _ in range(2):
            # The variance of a sample variance of n normal numbers is 2 / n: five standard errors.
            error = 5 * math.sqrt(2 / trained(layer).numel())
            assert trained(layer).square().mean().item() * fan_in == pytest.approx(1, rel=error)
            assert not layer.bias.any()
            before = trained(layer).detach().clone()
            torch.nn.init.ones_(layer.bias)
            layer.reset_parameters()
            assert not torch.equal(trained(layer), before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("convolution", [False, True])
def test_both_parametrizations_train_alike(convolution, weight_decay, momentum):
    """SGD, momentum and L2 on u - mean(u) and on B v give the same effective weights: B B^T is a projection."""
    torch.set_default_dtype(torch.float64)
    try:
        make = partial(nn.LCWConv2d, 2, 6, 2) if convolution else partial(nn.LCWLinear, 9, 6)
        centred, basis = make(), make(basis=True)
        x = torch.randn(*(12, 2, 3, 3) if convolution else (40, 9)) + 2
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        # v = B^T w for the same effective weight at the start.
        basis.weight = centred.weight
    start = centred.weight.detach()
    target = torch.randn_like(centred(x))
    for layer in (centred, basis):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
        for _ in range(50):
            optimizer.zero_grad()
            (torch.tanh(layer(x)) - target).square().mean().backward()
            optimizer.step()
    difference = (centred.effective_weight() - basis.effective_weight()).abs().max()
    # 50 steps, each with a few roundings of numbers below 1. Momentum multiplies them by ten.
    assert difference < 50 * 10 * 2**-52
    assert (centred.effective_weight() - start).abs().max() > 1e-2


# ---- Never stale ----------------------------------------------------------------------------------------------------


def optimizer_step(layer):
    trained(layer).grad = torch.randn_like(trained(layer))
    torch.optim.SGD([trained(layer)], lr=0.1).step()
    trained(layer).grad = None


def edit_without_gradients(layer):
    with torch.no_grad():
        trained(layer).add_(torch.randn_like(trained(layer)))


def swap_two_elements(layer):
    flat = trained(layer).data.view(-1)
    flat[[0, 1]] = flat[[1, 0]]


def edit_one_element(layer):
    trained(layer).data.view(-1)[3] += 0.5


def edit_through_numpy(layer):
    trained(layer).detach().numpy()[...] *= 1.5


def set_data(layer):
    trained(layer).data = torch.randn_like(trained(layer))


def set_parameter(layer):
    setattr(layer, trained_name(layer), torch.nn.Parameter(torch.randn_like(trained(layer))))


def reuse_the_address(layer):
    """The allocator reuses the memory: the same address and the same version, but other content."""
    name, shape = trained_name(layer), trained(layer).shape
    delattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(torch.randn(shape)))


def load_another(layer, **options):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, **options)


def to_and_back(layer):
    edit_one_element(layer.to(torch.float64))
    layer.to(torch.float32)


def vector_to_parameters(layer):
    torch.nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters())


EDITS = {
    "optimizer step": optimizer_step,
    "load_state_dict": load_another,
    "load_state_dict(assign=True)": partial(load_another, assign=True),
    "data.mul_": lambda layer: trained(layer).data.mul_(2),
    "data.neg_": lambda layer: trained(layer).data.neg_(),
    "one element": edit_one_element,
    "two swapped": swap_two_elements,
    "data = other": set_data,
    "data = transposed": lambda layer: setattr(
        trained(layer),
        "data",
        torch.randn(trained(layer).shape[::-1]).permute(*reversed(range(trained(layer).dim()))),
    ),
    "numpy": edit_through_numpy,
    "no_grad": edit_without_gradients,
    "new parameter": set_parameter,
    "the same address": reuse_the_address,
    "to(float64) and back": to_and_back,
    "to(bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "channels last": lambda layer: layer.to(memory_format=torch.channels_last) if trained(layer).dim() == 4 else None,
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "init.lcw_": lambda layer: init.lcw_(trained(layer), basis=layer.basis),
    "vector_to_parameters": vector_to_parameters,
}


def fresh_output(layer, x):
    """The output of a layer with the same parameters and no kept weight."""
    if isinstance(layer, nn.LCWLinear):
        return F.lcw_linear(x, trained(layer), layer.bias, layer.basis)
    weight = F.lcw_weight(trained(layer), layer.basis).view(-1, *layer._filter_shape)
    return layer._conv_forward(x, weight, layer.bias)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("basis", [False, True])
def test_inference_is_never_stale(basis, edit, mode):
    for layer, x in layers(basis):
        layer.eval()
        with mode():
            before = layer(x)
        for _ in range(2):
            EDITS[edit](layer)
            x = x.to(trained(layer).dtype)
            with mode():
                output = layer(x)
                assert torch.equal(output, fresh_output(layer, x))
                assert torch.equal(layer(x), output)
            if edit not in ("channels last", "to(bfloat16)"):
                assert not torch.equal(output, before)
            before = output


def test_inference_within_inference_mode_is_never_stale():
    """Parameters made in inference mode have no version counter."""
    with torch.inference_mode():
        for layer, x in layers():
            layer.eval()
            for _ in range(3):
                assert torch.equal(layer(x), fresh_output(layer, x))
                trained(layer).mul_(1.5)


def test_a_weight_kept_in_one_mode_serves_in_the_others():
    layer, x = layers()[2]
    layer.eval()
    with torch.inference_mode():
        in_inference = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), in_inference)
    # An inference tensor cannot be saved for backward, so a call with gradients must not use a kept one.
    layer(x).sum().backward()
    assert trained(layer).grad.any()
    layer.train()(x).sum().backward()


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_weights_are_never_stale():
    for layer, x in layers():
        layer.eval()
        with torch.no_grad():
            before = layer(x)
            torch.nn.utils.parametrize.register_parametrization(layer, trained_name(layer), Doubled(), unsafe=True)
            assert torch.equal(layer(x), fresh_output(layer, x))
            assert not torch.equal(layer(x), before)
            layer.parametrizations[trained_name(layer)].original.mul_(3)
            assert torch.equal(layer(x), fresh_output(layer, x))
            with torch.nn.utils.parametrize.cached():
                assert torch.equal(layer(x), fresh_output(layer, x))
            torch.nn.utils.parametrize.remove_parametrizations(layer, trained_name(layer))
            assert torch.equal(layer(x), fresh_output(layer, x))


def test_functional_call_and_vmap_are_never_stale():
    for layer, x in layers():
        layer.eval()
        stacked = {name: torch.randn(3, *p.shape) for name, p in layer.named_parameters()}
        with torch.no_grad():
            layer(x)
            outputs = torch.vmap(partial(torch.func.functional_call, layer), in_dims=(0, None))(stacked, (x,))
            for k in range(3):
                one = {name: tensor[k] for name, tensor in stacked.items()}
                expected = torch.func.functional_call(copy.deepcopy(layer), one, (x,))
                assert torch.equal(torch.func.functional_call(layer, one, (x,)), expected)
                # 36 batched products below 20 are summed in another order.
                torch.testing.assert_close(outputs[k], expected, rtol=0, atol=36 * 20 * 2**-23)


def test_a_kept_weight_is_not_handed_out():
    """Every reading of the weight gives a copy: an edit of it leaves the kept weight alone."""
    layer, x = layers()[2]
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
        layer.effective_weight().mul_(2)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), expected)


def test_a_traced_layer_keeps_no_weight():
    """A tracer would make a kept weight a constant of its program."""
    layer, x = layers()[2]
    layer.eval()
    with torch.no_grad():
        layer(x)
        programs = [make_fx(lambda x: layer(x))(x)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            programs.append(torch.jit.trace(layer, x))
        trained(layer).data.mul_(2)
        for program in programs:
            # 36 products below 20.
            torch.testing.assert_close(program(x), layer(x), rtol=0, atol=36 * 20 * 2**-23)


@pytest.fixture
def computations(monkeypatch):
    """A list of shapes: those of the parameters from which constrained weights are computed."""
    shapes, compute = [], F.lcw_weight

    def counted(weight, basis=False):
        shapes.append(tuple(weight.shape))
        return compute(weight, basis)

    monkeypatch.setattr(F, "lcw_weight", counted)
    return shapes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("basis", [False, True])
def test_nothing_is_computed_again_from_an_unchanged_parameter(basis, mode, computations):
    for layer, x in layers(basis)[1:]:
        layer.eval()
        computations.clear()
        with mode():
            outputs = [layer(x) for _ in range(5)]
        assert computations == [trained(layer).shape]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        trained(layer).data.mul_(2)
        with mode():
            layer(x), layer(x)
        assert len(computations) == 2
        # The kept weight does not depend on the bias.
        layer.bias.data.add_(1)
        with mode():
            layer(x)
        assert len(computations) == 2


def test_with_gradients_or_in_training_nothing_is_kept(computations):
    for layer, x in layers()[1:]:
        computations.clear()
        layer.eval()
        layer(x), layer(x)
        layer.train()
        with torch.no_grad():
            layer(x), layer(x)
        assert len(computations) == 4


def test_every_layer_keeps_its_own_weight(computations):
    model = torch.nn.Sequential(nn.LCWConv2d(3, 4, 3), nn.LCWConv2d(4, 5, 3)).eval()
    tied = nn.LCWConv2d(3, 4, 3).eval()
    tied.weight_u = model[0].weight_u
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            model(x), tied(x)
        assert len(computations) == 3
        model[0].weight_u.neg_()
        model(x), tied(x)
    assert len(computations) == 5
    assert torch.equal(tied(x), fresh_output(tied, x))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nn.LCWConv2d(3, 4, 3, groups=2), ValueError, "in_channels must be divisible by groups"),
        (lambda: nn.LCWConv2d(3, 4, 3, padding="some"), ValueError, "padding"),
        (lambda: nn.LCWConv2d(3, 4, 3, colour="red"), TypeError, "colour"),
        (lambda: nn.LCWLinear(3, 4)(torch.randn(2, 5)), ValueError, r"lcw_linear: x has shape \(2, 5\)"),
        (lambda: nn.LCWLinear(3, 4)(torch.randn(2, 3).double()), TypeError, "weight is torch.float32"),
        (
            lambda: nn.LCWLinear(3, 4, basis=True).load_state_dict(torch.nn.Linear(5, 4).state_dict()),
            RuntimeError,
            r"weight has shape \(4, 5\); expected \(4, 3\)",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- 100 sigmoid layers ---------------------------------------------------------------------------------------------


def gaussian_mean(function):
    """E f(Z), Z ~ N(0, 1): the trapezium rule on 20,001 points, exact to rounding for functions as smooth as these."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    return ((function(z) * weights).sum() / weights.sum()).item()


def plain_scale_(weight, std=1.0):
    """Fill m plain weights per unit so that pre-activations keep their deviation s: variance s^2 / (m E f(sZ)^2)."""
    second_moment = gaussian_mean(lambda z: (std * z).sigmoid().square())
    return torch.nn.init.normal_(weight, 0, std / math.sqrt(weight.shape[1] * second_moment))


def deep_net(kind, features, width, depth, classes, dtype=torch.float32):
    """``depth`` layers of ``width`` sigmoids, filled for pre-activations of deviation 1, and a linear read-out."""
    layer = nn.LCWLinear if kind == "lcw" else torch.nn.Linear
    sizes = [features] + [width] * depth + [classes]
    linears = [layer(m, n, dtype=dtype) for m, n in itertools.pairwise(sizes)]
    for l, linear in enumerate(linears):
        if l == 0:
            torch.nn.init.normal_(linear.weight_u if kind == "lcw" else linear.weight, 0, 1 / math.sqrt(features))
        elif kind == "lcw":
            init.lcw_(linear.weight_u, "sigmoid")
        else:
            plain_scale_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    modules = [module for linear in linears[:-1] for module in (linear, torch.nn.Sigmoid())]
    return torch.nn.Sequential(*modules, linears[-1])


@pytest.mark.parametrize(("std", "lcw", "plain"), [(0.5, 1.004, 0.053), (1, 1.034, 0.153), (2, 1.178, 0.333)])
def test_variances_forward_and_backward_through_one_layer_are_the_derived_ones(std, lcw, plain):
    rows = width = 1000
    z = (std * torch.randn(rows, width)).requires_grad_()
    error = torch.randn(rows, width)
    constrained, ordinary = nn.LCWLinear(width, width), torch.nn.Linear(width, width, bias=False)
    init.lcw_(constrained.weight_u, "sigmoid", std)
    plain_scale_(ordinary.weight, std)
    # The weights are a million independent normal numbers, and so are the errors. The variance of a sample variance is
    # 2 / count. The slopes' own spread is below that of squares of normal numbers.
    standard_error = math.sqrt(3 * 2 / (rows * width))
    for layer, expected in ((constrained, lcw), (ordinary, plain)):
        output = layer(z.sigmoid())
        gradient = torch.autograd.grad(output, z, error)[0]
        # The expected factors have three decimals.
        assert gradient.var().item() == pytest.approx(expected, rel=5 * standard_error, abs=0.5e-3)
        # All units share the mean activation and its variance: 1000 units, each a sum over 1000 inputs.
        assert output.square().mean().item() == pytest.approx(std**2, rel=5 * math.sqrt(2 / width))


@pytest.mark.parametrize(("kind", "expected"), [("lcw", math.log10(13)), ("plain", math.log10(4e-82))])
def test_the_gradient_reaches_the_first_of_100_layers_with_lcw_only(kind, expected):
    """Width 128 and pre-activations of deviation 1, in float64: float32 has no number as small as 4e-82."""
    width, depth, nets = 128, 100, 8
    logarithms = []
    for _ in range(nets):
        model = deep_net(kind, width, width, depth, width, torch.float64)
        pre_activations, h = [], torch.randn(32, width, dtype=torch.float64)
        for module in model[:-1]:
            h = module(h)
            if is_linear(module):
                pre_activations.append(h)
        first, last = torch.autograd.grad((h * torch.randn_like(h)).sum(), [pre_activations[0], pre_activations[-1]])
        logarithms.append(math.log10(first.var() / last.var()))
    # The factor of a layer is a mean of 128 squares, off by sqrt(2 / 128) = 0.125 in each of the forward and backward
    # passes: in 99 layers the logarithm has a deviation of 0.125 sqrt(2 x 99) / ln(10) = 0.76 decades. A finite
    # width lowers every factor by 1 / 128, and the logarithm's mean by half its variance: by 0.34 and 0.66 decades.
    allowed = 0.34 + 0.66 + 5 * 0.76 / math.sqrt(nets)
    assert abs(sum(logarithms) / nets - expected) < allowed
    # The expected logarithm of the other kind is 83 decades away.
    assert allowed < 5


def accuracy_after_training(kind, seed):
    torch.manual_seed(seed)
    digits = data.load_digits()
    model = deep_net(kind, digits.features, 64, 100, digits.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(45):
        batch = torch.randint(len(digits.x_train), (256,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(digits.x_test).argmax(1) == digits.y_test).double().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_100_sigmoid_layers_learn_the_digits_with_lcw_only(seed):
    """Both nets have the same width, optimizer, batches and steps: eight passes over the images, in our settings."""
    lcw, plain = (accuracy_after_training(kind, seed) for kind in ("lcw", "plain"))
    print(f"seed {seed}: accuracy with LCW {lcw:.3f}, with plain weights {plain:.3f}")
    # The ten classes have 35 to 37 of the 360 test images: a constant answer is right for at most 0.103 of them.
    # Guessing has a standard error of 0.016, so 0.3 is twelve standard errors away.
    assert plain < 0.11
    assert lcw > 0.3


# ---- Regressions -----------------------------------------------------------------------------------------------------


def test_a_kept_weight_has_no_part_in_forward_mode():
    layer, x = nn.LCWConv1d(2, 3, 2).eval(), torch.randn(1, 2, 5)
    weight, tangent = layer.weight_u.detach().clone(), torch.randn_like(layer.weight_u)
    with torch.no_grad():
        layer(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, tangent)
            output = torch.func.functional_call(layer, {"weight_u": dual}, (x,))
            actual = forward_ad.unpack_dual(output).tangent
        expected = torch.nn.functional.conv1d(x, F.lcw_weight(tangent))
    torch.testing.assert_close(actual, expected)


def test_a_kept_weight_does_not_meet_a_request_for_another_backend():
    layer, x = nn.LCWConv1d(2, 3, 2).eval(), torch.randn(1, 2, 5)
    with torch.no_grad():
        layer(x)
        with pytest.raises(lcw_ops.BackendError), lcw_ops.use_backend("cuda"):
            layer(x)


def test_a_basis_without_inputs():
    with pytest.raises(ValueError, match="LCWLinear: a unit has no inputs"):
        nn.LCWLinear(0, 3, basis=True)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize(("module_class", "plain", "rank"), CONVS)
def test_skip_init_and_help_know_the_arguments(module_class, plain, rank, basis):
    assert list(inspect.signature(module_class).parameters) == [*inspect.signature(plain).parameters, "basis"]

    class OfAnother(module_class):
        def __init__(self, channels):
            super().__init__(channels, channels, 1)

    assert list(inspect.signature(OfAnother).parameters) == ["channels"]
    module = torch.nn.utils.skip_init(module_class, 3, 4, 2, basis=basis)
    assert module.weight.device.type == "cpu"
    assert module.weight.shape == module_class(3, 4, 2, basis=basis).weight.shape
