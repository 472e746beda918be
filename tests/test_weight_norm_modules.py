"""Layers with weight normalization. test_hypersphere_modules.py holds the tests that GmP's layers share with them."""

from functools import partial

import pytest
import torch
from support.unit_modules import (
    CONV_OPTIONS,
    FUNCTIONAL_CONVS,
    RANKS,
    WEIGHT_NORM_CONVS,
    assert_exact,
    assert_rows_close,
    draw_per_unit_,
    layers,
    torchs_product,
    weight_norm,
)

from lcw_ops import nn
from lcw_ops.nn import hypersphere

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_weight_norm_convolutions_take_torchs_arguments(rank, options):
    multiply, plain = torchs_product(rank, options)

    def draw(dtype):
        layer = draw_per_unit_(WEIGHT_NORM_CONVS[rank - 1](4, 8, 3, dtype=dtype, **options))
        return layer, torch.randn(2, 4, *(9, 8, 7)[:rank], dtype=dtype)

    assert_exact(draw, partial(weight_norm, multiply=multiply), ("weight", "scale", "bias"))
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
    assert_exact(draw, formula, ("weight", "scale", "bias"), dtype)


def test_weight_norm_starts_as_the_plain_layer():
    for (layer, x), plain in zip(
        layers()[6:],
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
        assert torch.equal(layer.weight, plain.weight)
        assert torch.equal(layer.bias, plain.bias)
        # A result sums at most 36 products below 5, and every weight has a handful of roundings.
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=36 * 5 * 8 * 2**-23)


@pytest.mark.parametrize("length", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_converting_a_trained_layer_keeps_its_function(length):
    plain = torch.nn.Linear(7, 5, dtype=torch.float64)
    torch.nn.init.normal_(plain.weight, 0, length)
    layer = nn.WeightNormLinear.from_linear(plain)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    assert_rows_close(layer.effective_weight(), plain.weight, 7)


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


def test_the_layers_keep_their_old_address():
    """Pickles name them under lcw_ops.nn.hypersphere."""
    for name in ("WeightNormLinear", "WeightNormConv1d", "WeightNormConv2d", "WeightNormConv3d"):
        assert getattr(hypersphere, name) is getattr(nn, name)
