"""Runs of ``lcw_ops.convert`` on inputs: models that write into what they get, that hold layers twice, or that fail."""

import copy
import dataclasses
import functools

import pytest
import torch
from support.growing import GrowingCache
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
    ("make", "target", "shape"),
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
    ("batch", "came"),
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
    assert torch.equal(model[0].running_mean, torch.full((3,), 2.0))
    assert model.training


# ---- Models that leave traces ----------------------------------------------------------------------------------------


class ShiftInPlace(nn.Module):
    def forward(self, x):
        return x.sub_(1.0)


def nets_on_their_own_input() -> dict[str, nn.Module]:
    return {
        "subtracts": nn.Sequential(ShiftInPlace(), nn.Linear(4, 3)),
        "relu": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)),
    }


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("name", ["subtracts", "relu"])
def test_a_model_that_writes_into_its_input_gets_a_fresh_one_in_every_run(name, is_leaf, dry_run):
    """E of the output is kept exactly by the bias, so the mean of the outputs shows which inputs were seen."""
    torch.manual_seed(0)
    model = nets_on_their_own_input()[name]
    x = torch.randn(200, 4) + 2
    if not is_leaf:
        x = (x.requires_grad_() * 1).view(200, 4)
    before = x.detach().clone()
    original = copy.deepcopy(model)
    with torch.no_grad():
        expected = original(before.clone())
    report = lcw_ops.convert(model, "lcw", inputs=x, dry_run=dry_run)
    assert torch.equal(x.detach(), before)
    assert x.is_leaf is is_leaf
    new = lcw_ops.convert(original, "lcw", inputs=before, copy=True).model if dry_run else report.model
    with torch.no_grad():
        output = new(before.clone())
    torch.testing.assert_close(output.mean(0), expected.mean(0), rtol=0, atol=1e-5)
    measured = float((output - expected).double().norm() / expected.double().norm())
    assert report.output_change.value == pytest.approx(measured, rel=1e-4)
    assert report.errors["1"].value == pytest.approx(measured, rel=1e-4)


class Cache:
    """Keys of earlier calls, as in a language model, in the middle of a graph."""

    def __init__(self):
        self.keys = [torch.ones(1, 4, requires_grad=True) * 2]

    def update(self, x: torch.Tensor) -> torch.Tensor:
        self.keys.append(x)
        return torch.cat(self.keys)


class WithCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, cache, head=None):
        # The cache is also under another name, and so is one of the layers.
        assert len(cache["a"].keys) == 1
        assert cache["a"] is cache["b"] or "generator" in cache
        assert head is None or head is self.head
        return self.head(cache["a"].update(self.key(x)))


@pytest.mark.parametrize("has_generator", [False, True])
def test_structures_are_fresh_in_every_run_and_parts_of_the_model_stay_themselves(has_generator):
    model, cache = WithCache(), Cache()
    key = cache.keys[0]
    inputs = {"x": torch.randn(5, 4), "cache": {"a": cache, "b": cache}, "head": model.head}
    if has_generator:
        # An object that refuses to be copied.
        inputs["cache"]["generator"] = (value for value in ())
    report = lcw_ops.convert(model, "lcw", lambda name, _: name == "key", inputs=inputs, dry_run=True)
    assert len(cache.keys) == 1
    assert cache.keys[0] is key
    assert set(report.errors) == {"key"}
    assert report.output_change.value > 0


class GivesItsBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("h", torch.zeros(5, 3))

    def forward(self, x):
        return self.h.copy_(self.fc(x))


def test_an_output_that_is_a_buffer_is_measured():
    model, x = GivesItsBuffer(), torch.randn(5, 3)
    before = model.fc(x).detach()
    report = lcw_ops.convert(model, "lcw", inputs=x)
    expected = float((model.fc(x).detach() - before).norm() / before.norm())
    assert expected > 0.1
    assert report.output_change.value == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.h, torch.zeros(5, 3))


def test_a_model_whose_cache_grows_still_runs():
    model, x = GrowingCache(), torch.randn(8, 4)
    lcw_ops.convert(model, "lcw", inputs=x)
    assert (model.length, len(model.cache)) == (1, 1)
    assert torch.allclose(model(x), model.fc(x) + torch.arange(8.0).unsqueeze(1))


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_hooks_have_computed_is_restored_so_that_the_model_can_be_copied(dry_run):
    model = nn.Sequential(
        torch.nn.utils.weight_norm(nn.Linear(3, 3)), torch.nn.utils.weight_norm(nn.Conv1d(2, 2, 1), dim=1)
    )
    model.forward = lambda x: model[1](model[0](x))
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        model(x)
    weights = [layer.weight for layer in model]
    report = lcw_ops.convert(model, "weight_norm", lambda name, _: name == "0", inputs=x, dry_run=dry_run)
    assert report.step_time is not None
    assert model[1].weight is weights[1]
    assert not dry_run or model[0].weight is weights[0]
    del model.forward
    copy.deepcopy(model)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_that_fails_in_training_mode_is_converted_without_times(dry_run):
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    report = lcw_ops.convert(model, "weight_norm", inputs=torch.randn(1, 3), dry_run=dry_run)
    assert type(model[0]) is ours.WeightNormLinear or dry_run
    assert report.step_time is None
    (note,) = report.notes
    assert note.startswith("The forward and backward passes could not be timed: Expected more than 1 value")
    assert note in report.table()
    assert model.training
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert model[1].num_batches_tracked == 0


# ---- Holders and ties ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Holder:
    layer: nn.Module


class SlottedHolder:
    __slots__ = ("layer", "unset")

    def __init__(self, layer):
        self.layer = layer

    def call(self, x):
        return self.layer(x)


def method_of(layer: nn.Module):
    return SlottedHolder(layer).call


HOLDERS = {
    "partial": functools.partial,
    "partial's argument": lambda layer: functools.partial(map, layer),
    "partial's keyword": lambda layer: functools.partial(sorted, key=layer.forward),
    "dataclass": Holder,
    "slots": SlottedHolder,
    "method of a holder": method_of,
    "list of holders": lambda layer: [SlottedHolder(None), Holder(layer)],
    "closure": lambda layer: lambda x: layer(x),
    "default": lambda layer: lambda x, call=layer: call(x),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_layer_that_another_object_holds_is_left(name):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layer = model[0]
    model.held = HOLDERS[name](layer)
    report = lcw_ops.convert(model, "lcw")
    assert reasons(report) == {"0": "held holds it too, where a replacement would not arrive"}
    assert model[0] is layer


def test_objects_that_hold_a_parent_or_themselves_are_no_holders():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    model.parent, model.itself = Holder(model[0]), [model]
    model.circle = [model.itself]
    model.circle.append(model.circle)
    model.optimizers = [torch.optim.SGD(model.parameters())]
    model.call = lambda x: model[0](x)
    assert lcw_ops.convert(model, "lcw").left == []


@pytest.mark.parametrize("are_reversed", [False, True])
def test_parameters_that_overlap_in_memory_are_left(are_reversed):
    b, a, free = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(3, 4)
    a.weight = nn.Parameter(b.weight.data[4:])
    model = nn.ModuleDict({"a": a, "b": b, "free": free} if are_reversed else {"b": b, "a": a, "free": free})
    report = lcw_ops.convert(model, "lcw")
    names = "a.weight and b.weight" if are_reversed else "b.weight and a.weight"
    reason = f"a parameter of it is tied: {names} overlap in memory"
    assert reasons(report) == {"a": reason, "b": reason}
    assert [change.name for change in report.changed] == ["free"]


def test_parameters_beside_each_other_in_one_storage_are_not_tied():
    """Rows of one matrix, and columns, which lie between each other."""
    rows, columns = torch.randn(8, 3), torch.randn(3, 8)
    layers = [nn.Linear(3, 4, bias=False) for _ in range(2)] + [nn.Linear(4, 3, bias=False) for _ in range(2)]
    for layer, part in zip(layers, (rows[:4], rows[4:], columns[:, :4], columns[:, 4:]), strict=True):
        layer.weight = nn.Parameter(part)
    assert lcw_ops.convert(nn.Sequential(*layers), "lcw", dry_run=True).left == []
    layers[2].weight = nn.Parameter(columns[:, 1:5])
    assert set(reasons(lcw_ops.convert(nn.Sequential(*layers), "lcw", dry_run=True))) == {"2", "3"}


# ---- Folded modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shape"), [(-1, (4, 3)), (-3, (2, 3, 4, 5))])
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
