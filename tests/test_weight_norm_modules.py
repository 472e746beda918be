"""Weight-norm layers: torch's arguments, conversions, float64 results, and the tests shared with GmP."""

import inspect
from functools import partial

import pytest
import torch
from support.unit_module_tests import *  # noqa: F403
from support.unit_modules import (
    CONV_OPTIONS,
    EPS,
    FUNCTIONAL_CONVS,
    PLAIN_CONVS,
    RANKS,
    WEIGHT_NORM,
    WEIGHT_NORM_CONVS,
    assert_exact,
    assert_rows_close,
    draw_per_unit_,
    torchs_product,
    weight_norm,
    weight_norm_layers,
)

from lcw_ops import nn
from lcw_ops.nn import hypersphere

pytestmark = pytest.mark.usefixtures("one_thread")

STEM = WEIGHT_NORM


@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_weight_norm_convolutions_take_torchs_arguments(rank, options):
    multiply, plain = torchs_product(rank, options)

    def draw(dtype):
        layer = draw_per_unit_(WEIGHT_NORM_CONVS[rank - 1](4, 8, 3, dtype=dtype, **options))
        return layer, torch.randn(2, 4, *(9, 8, 7)[:rank], dtype=dtype)

    assert_exact(draw, partial(weight_norm, multiply=multiply), ("weight_v", "weight_g", "bias"))
    layer, _ = draw(torch.float32)
    assert layer.extra_repr() == plain.extra_repr()
    assert layer.weight.shape == layer.effective_weight().shape == plain.weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (50, 6), (2, 3, 6)], ids=str)
def test_weight_norm_linear_is_the_formula(shape, bias, dtype):
    def draw(dtype):
        return draw_per_unit_(nn.WeightNormLinear(6, 5, bias, "cpu", dtype)), torch.randn(shape, dtype=dtype)

    formula = partial(weight_norm, multiply=torch.nn.functional.linear)
    assert_exact(draw, formula, ("weight_v", "weight_g", "bias"), dtype)


def test_signatures_are_torchs():
    for rank in RANKS:
        torchs = list(inspect.signature(PLAIN_CONVS[rank - 1]).parameters)
        assert list(inspect.signature(WEIGHT_NORM_CONVS[rank - 1]).parameters) == torchs
    assert list(inspect.signature(nn.WeightNormLinear).parameters) == list(
        inspect.signature(torch.nn.Linear).parameters
    )


def test_representations():
    assert repr(nn.WeightNormLinear(3, 4, False)) == "WeightNormLinear(in_features=3, out_features=4, bias=False)"


def test_weight_norm_starts_as_the_plain_layer():
    for (layer, x), plain in zip(
        weight_norm_layers(),
        [
            torch.nn.Linear(6, 5),
            torch.nn.Conv1d(4, 6, 3),
            torch.nn.Conv2d(4, 6, 3, groups=2),
            torch.nn.Conv3d(4, 6, (1, 2, 3)),
        ],
        strict=True,
    ):
        for reset in (layer, plain):
            torch.manual_seed(7)
            reset.reset_parameters()
        assert torch.equal(layer.weight_v, plain.weight)
        assert torch.equal(layer.bias, plain.bias)
        # A result sums at most 36 products below 5, and every weight has a handful of roundings.
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=36 * 5 * 8 * 2**-23)


@pytest.mark.parametrize("length", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_converting_a_trained_layer_keeps_its_function(length):
    plain = torch.nn.Linear(7, 5, dtype=torch.float64)
    torch.nn.init.normal_(plain.weight, 0, length)
    layer = nn.WeightNormLinear.from_linear(plain)
    assert torch.equal(layer.weight_v, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    assert_rows_close(layer.effective_weight(), plain.weight, 7)


@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_a_trained_convolution_keeps_its_function(rank, options):
    plain = PLAIN_CONVS[rank - 1](4, 8, 3, dtype=torch.float64, **options).eval()
    x = torch.randn(2, 4, *(9, 8, 7)[:rank], dtype=torch.float64)
    expected = plain(x)
    fan_in = plain.weight[0].numel()
    # Weights and biases are below 1, inputs below 5. Every row is off by at most 32 sqrt(m) eps of its length.
    tolerance = 2 * 32 * fan_in * 5 * EPS
    normed = WEIGHT_NORM_CONVS[rank - 1].from_conv(plain)
    torch.testing.assert_close(normed(x), expected, rtol=0, atol=tolerance)
    assert not normed.training
    assert plain.extra_repr() == normed.extra_repr()


def test_zero_rows_of_a_trained_layer():
    plain = torch.nn.Linear(3, 4)
    with torch.no_grad():
        plain.weight[1] = 0
        plain.bias[1] = 0
    x = torch.cat([torch.ones(1, 3), torch.randn(5, 3)])
    normed = nn.WeightNormLinear.from_linear(plain)
    assert normed.weight_g[1] == 0
    assert not normed(x)[:, 1].any()
    with torch.no_grad():
        plain.bias[1] = -2
    # 3 products below 4, each with a handful of roundings.
    torch.testing.assert_close(nn.WeightNormLinear.from_linear(plain)(x), plain(x), rtol=0, atol=3 * 4 * 8 * 2**-23)


def test_only_the_plain_layer_is_converted():
    for call in (
        lambda: nn.WeightNormLinear.from_linear(torch.nn.Conv2d(3, 4, 1)),
        lambda: nn.WeightNormConv3d.from_conv(torch.nn.Conv2d(3, 4, 1)),
    ):
        with pytest.raises(TypeError, match=r"from_(linear|conv): layer is a \w+; expected a torch\.nn\.\w+"):
            call()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_bias_multiplies_by_its_effective_weight(training, mode):
    made = nn.WeightNormLinear(6, 5, bias=False), *(kind(4, 6, 3, bias=False) for kind in WEIGHT_NORM_CONVS)
    inputs = torch.randn(3, 6), torch.randn(2, 4, 9), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8, 7)
    plain = torch.nn.functional.linear, *FUNCTIONAL_CONVS
    for layer, x, multiply in zip(made, inputs, plain, strict=True):
        draw_per_unit_(layer).train(training)
        with mode():
            # 108 products below 5 x 5, summed in two orders.
            torch.testing.assert_close(
                layer(x), multiply(x, layer.effective_weight()), rtol=0, atol=2 * 108 * 25 * 2**-23
            )


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_that_would_be_broadcast_is_refused(training):
    module = nn.WeightNormLinear(3, 4).train(training)
    module.bias = torch.nn.Parameter(torch.ones(1))
    with torch.no_grad(), pytest.raises(ValueError, match=r"bias has shape \(1,\); expected \(4,\)"):
        module(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nn.WeightNormLinear(0, 4), ValueError, "WeightNormLinear: a unit has 0 inputs"),
        (lambda: nn.WeightNormConv2d(3, 4, 3, padding="some"), ValueError, "padding"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_layers_keep_their_old_address():
    """Pickles name them under lcw_ops.nn.hypersphere."""
    for name in ("WeightNormLinear", "WeightNormConv1d", "WeightNormConv2d", "WeightNormConv3d"):
        assert getattr(hypersphere, name) is getattr(nn, name)
