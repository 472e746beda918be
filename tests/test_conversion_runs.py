"""Runs of ``lcw_ops.convert`` on inputs: models that write into what they get, that hold layers twice, or that fail."""

import pytest
import torch
from torch import nn

import lcw_ops
from lcw_ops import nn as ours
from lcw_ops.conversion import UnitScale

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm. is deprecated:FutureWarning")


def reasons(report: lcw_ops.conversion.Report) -> dict[str, str]:
    return {left.name: left.reason for left in report.left}


# ---- Sources and arguments -------------------------------------------------------------------------------------------


def conv_of_ours() -> nn.Module:
    return ours.WeightNormConv2d(4, 6, (3, 2), stride=2, padding=1, padding_mode="circular", groups=2)


@pytest.mark.parametrize(
    "make, target, shape",
    [
        (lambda: ours.WeightNormLinear(3, 4), ours.LCWLinear, (5, 2, 3)),
        (conv_of_ours, ours.LCWConv2d, (3, 4, 5, 6)),
        (lambda: ours.WeightNormConv1d(2, 4, 3, padding="same", padding_mode="reflect"), ours.LCWConv1d, (2, 2, 7)),
    ],
)
def test_layers_of_ours_are_sources_and_their_biases_take_up_the_mean(make, target, shape):
    """On inputs that are constant the correction is exact where no window has a border: there the output stays."""
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.bias.normal_()
    model = nn.Sequential(layer)
    x = torch.full(shape, 1.5)
    before = model(x).detach()
    report = lcw_ops.convert(model, {type(layer): target}, inputs=x)
    assert type(model[0]) is target
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=64 * torch.finfo(x.dtype).eps)
    assert report.errors["0"].value < 1e-5 < report.errors["0"].without


@pytest.mark.parametrize("wrong", ["0", 3, ["0"]])
def test_a_filter_that_is_no_function_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=r"^convert: filter is a (str|int|list); expected a function"):
        lcw_ops.convert(nn.Sequential(nn.Linear(3, 3)), "lcw", filter=wrong)


@pytest.mark.parametrize(
    "batch, came",
    [
        ({"x": torch.ones(2, 3)}, "a batch that is a dict;"),
        ([], "a batch that is a list;"),
        (({"x": torch.ones(2, 3)}, 1), "a batch that is a tuple that begins with a dict;"),
    ],
)
def test_update_means_names_a_batch_of_another_type(batch, came):
    model = nn.Sequential(ours.InputMeanNorm(3))
    model[0].running_mean.fill_(2.0)
    with pytest.raises(TypeError, match=f"^update_means: loader has given {came} expected batches that are a tensor"):
        ours.update_means([torch.ones(2, 3), batch], model)
    assert torch.equal(model[0].running_mean, torch.full((3,), 2.0)) and model.training


# ---- Folded modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, shape", [(-1, (4, 3)), (-3, (2, 3, 4, 5))])
def test_a_unit_scale_scripts(dim, shape):
    scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    module, x = UnitScale(scale, dim), torch.randn(shape)
    expected = x * scale.detach().reshape([3] + [1] * (-1 - dim))
    assert torch.equal(module(x), expected)
    assert torch.equal(torch.jit.script(module)(x), expected)


@pytest.mark.parametrize(
    "make",
    [lambda **o: ours.OrthogonalFilterRNN(3, 4, **o), lambda **o: ours.OrthogonalFilterMLP(3, 4, 2, 5, **o)],
    ids=["rnn", "mlp"],
)
def test_folding_keeps_the_order_of_trained_parameters(make):
    model = nn.Sequential(make(alpha=nn.Parameter(torch.tensor(0.9)), beta=nn.Parameter(torch.tensor(0.1))))
    names = [name for name, _ in model.named_parameters()]
    assert {"0.alpha", "0.beta"} <= set(names)
    assert [name for name, _ in lcw_ops.fold(model).model.named_parameters()] == names
