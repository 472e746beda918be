"""``convert`` and ``fold`` at the edges of what they reach: what else holds a layer, and what else a layer holds."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import lcw_ops
from lcw_ops import nn as ours
from lcw_ops.conversion import PlainOrthogonalFilterMLP, building, exchange, folding
from lcw_ops.nn._refusals import base_of_ours, refusal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm. is deprecated:FutureWarning")


def reasons(report: lcw_ops.conversion.Report) -> dict[str, str]:
    return {left.name: left.reason for left in report.left}


# ---- Classes ---------------------------------------------------------------------------------------------------------


class Annotated(nn.Linear):
    weight: Tensor
    bias: Tensor | None


class DoubledWeight(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return 2 * self._parameters["weight"]


class WithoutBias(nn.Linear):
    bias = None


def test_an_annotation_of_the_weight_is_harmless_and_a_class_attribute_is_not():
    assert refusal(Annotated(4, 4)) is None
    model = nn.Sequential(Annotated(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    # Their constructors would not get past torch's own check.
    model[1].__class__, model[2].__class__ = DoubledWeight, WithoutBias
    report = lcw_ops.convert(model, "weight_norm")
    assert [changed.name for changed in report.changed] == ["0"]
    assert "members that a replacement lacks: weight" in reasons(report)["1"]
    assert "members that a replacement lacks: bias" in reasons(report)["2"]


class Longer(ours.LCWLinear):
    def length(self) -> Tensor:
        return self.weight.norm()


def with_buffer(layer: nn.Module) -> nn.Module:
    layer.register_buffer("mask", torch.ones(3))
    return layer


def with_parameter(layer: nn.Module) -> nn.Module:
    layer.extra = nn.Parameter(torch.ones(3))
    return layer


def with_child(layer: nn.Module) -> nn.Module:
    layer.adapter = nn.Linear(3, 3)
    return layer


def tanh_of(layer: nn.Module, name: str) -> nn.Module:
    return parametrize.register_parametrization(layer, name, nn.Tanh(), unsafe=True)


def lcw_with_both() -> nn.Module:
    layer = ours.LCWLinear(3, 3)
    layer.register_parameter("weight_v", nn.Parameter(torch.ones(3, 2)))
    return layer


def recurrence() -> nn.Module:
    return ours.OrthogonalFilterMLP(3, 4, 2, 3, "identity")


OF_OURS = {
    "a buffer": (lambda: with_buffer(ours.LCWLinear(3, 3)), "more than its class's tensors: mask"),
    "a parameter": (lambda: with_parameter(ours.GmPLinear(3, 3)), "more than its class's tensors: extra"),
    "a child": (lambda: with_child(ours.WeightNormLinear(3, 3)), "more than its class's tensors: adapter"),
    "the other form's tensor": (lcw_with_both, "more than its class's tensors: weight_v"),
    "weight norm, hook": (
        lambda: nn.utils.weight_norm(ours.LCWLinear(3, 3), "weight_u"),
        "a hook of WeightNorm computes its tensor weight_u",
    ),
    "spectral norm, hook": (
        lambda: spectral_norm(ours.LCWLinear(3, 3), "weight_u"),
        "a hook of SpectralNorm computes its tensor weight_u",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(ours.LCWLinear(3, 3), "weight_u"),
        "parametrizations compute its tensors weight_u",
    ),
    "a parametrized bias": (lambda: tanh_of(ours.WeightNormLinear(3, 3), "bias"), "compute its tensors bias (Tanh)"),
    "pruned": (lambda: prune.l1_unstructured(ours.GmPLinear(3, 3), "angles", amount=1), "it is pruned"),
    "pruned bias": (lambda: prune.l1_unstructured(ours.LCWLinear(3, 3), "bias", amount=1), "it is pruned"),
    "a method": (lambda: Longer(3, 3), "members that a replacement lacks: length"),
    "a recurrence with a buffer": (lambda: with_buffer(recurrence()), "more than its class's tensors: mask"),
    "a pruned recurrence": (lambda: prune.l1_unstructured(recurrence(), "bias", amount=1), "it is pruned"),
}


@pytest.mark.parametrize("name", OF_OURS)
def test_our_layers_that_hold_or_do_more_are_left(name):
    make, reason = OF_OURS[name]
    layer = make()
    model, x = nn.Sequential(layer, nn.Linear(3, 3)), torch.randn(5, 3)
    report = lcw_ops.fold(model, inplace=True)
    assert reason in reasons(report)["0"]
    assert not [changed for changed in report.changed if changed.name == "0"]
    assert model[0] is layer
    assert torch.isfinite(model(x)).all()
    if isinstance(layer, building.OURS):
        target = ours.WeightNormLinear if isinstance(layer, ours.LCWLinear) else ours.LCWLinear
        report = lcw_ops.convert(model, {base_of_ours(layer): target})
        assert reason in reasons(report)["0"]
        assert model[0] is layer


@pytest.mark.parametrize("kind", building.OURS)
def test_our_layers_as_they_are_made_are_not_refused(kind):
    sizes = (2, 2) if kind._plain is nn.Linear else (2, 2, 1)
    assert refusal(kind(*sizes)) is None
    assert refusal(kind(*sizes, bias=False)) is None
    if "LCW" in kind.__name__:
        assert refusal(kind(*sizes, basis=True)) is None
    # In layers of one input, empty tensors and signs are buffers.
    one = (1, 2) if kind._plain is nn.Linear else (1, 2, 1)
    assert refusal(kind(*one)) is None
    assert type(lcw_ops.fold(kind(*one)).model) is kind._plain


# ---- Attributes of a layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lcw", "gmp", "weight_norm"])
def test_a_tensor_that_the_user_set_as_an_attribute_stays(kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    importance = torch.ones(3)
    model[0].importance = importance
    lcw_ops.convert(model, kind, filter=lambda name, layer: True)
    assert isinstance(model[0], building.OURS)
    assert model[0].importance is importance
    copied = lcw_ops.fold(model).model
    assert type(copied[0]) is nn.Linear
    assert torch.equal(copied[0].importance, importance)
    lcw_ops.fold(model, inplace=True)
    assert model[0].importance is importance


def test_the_tensor_of_a_weight_norm_hook_does_not_stay():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    model[0].importance = torch.ones(3)
    lcw_ops.convert(model, "weight_norm")
    assert "weight" not in vars(model[0])
    assert torch.equal(model[0].importance, torch.ones(3))


# ---- Places of a layer -----------------------------------------------------------------------------------------------


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last, self.free = (ours.LCWLinear(3, 3) for _ in range(3))
        self.penalised, self.deep = ours.WeightNormLinear(3, 3), recurrence()
        self.listed, self.call_last = [self.fc], self.last.forward
        self.penalty, self.nets = [self.penalised.weight_g], {"deep": self.deep}


@pytest.mark.parametrize("inplace", [True, False])
def test_fold_leaves_what_a_plain_attribute_holds(inplace):
    model = Holding()
    report = lcw_ops.fold(model, inplace=inplace)
    assert [changed.name for changed in report.changed] == ["free"]
    holders = {"fc": "listed", "last": "call_last", "penalised": "penalty", "deep": "nets"}
    assert reasons(report) == {
        name: f"{holder} holds it too, where a replacement would not arrive" for name, holder in holders.items()
    }
    assert report.model.listed[0] is report.model.fc
    assert report.model.call_last.__self__ is report.model.last


def test_a_list_of_biases_keeps_no_layer_from_being_folded():
    """LCW and weight norm pass on the very bias."""
    model = nn.Sequential(ours.LCWLinear(3, 3))
    model.biases = [model[0].bias]
    lcw_ops.fold(model, inplace=True)
    assert type(model[0]) is nn.Linear
    assert model[0].bias is model.biases[0]


@pytest.mark.parametrize("where", ["root", "Sequential", "ModuleDict"])
def test_the_layers_inside_a_recurrence_are_folded_too(where):
    deep = ours.OrthogonalFilterMLP(4, 8, 3, 2, "identity")
    lcw_ops.convert(deep, "lcw")
    assert isinstance(deep.input_layer, ours.LCWLinear)
    deep.input_layer.register_forward_hook(lambda layer, args, output: None)
    old_layers = (deep.input_layer, deep.output_layer)
    model = {"root": deep, "Sequential": nn.Sequential(deep), "ModuleDict": nn.ModuleDict({"a": deep})}[where]
    x = torch.randn(5, 4)
    expected = deep(x)
    inputs = None if where == "ModuleDict" else x
    report = lcw_ops.fold(model, inputs=inputs)
    assert [changed.after for changed in report.changed] == ["PlainOrthogonalFilterMLP", "Linear", "Linear"]
    assert len(report.errors) == (0 if inputs is None else 3)
    assert not [module for module in report.model.modules() if type(module).__module__.startswith("lcw_ops.nn")]
    folded = next(module for module in report.model.modules() if isinstance(module, PlainOrthogonalFilterMLP))
    assert (type(folded.input_layer), type(folded.output_layer)) == (nn.Linear, nn.Linear)
    assert len(folded.input_layer._forward_hooks) == 1
    torch.testing.assert_close(folded(x), expected)
    assert not lcw_ops.fold(report.model).changed
    assert (deep.input_layer, deep.output_layer) == old_layers
    in_place = lcw_ops.fold(model, inputs=inputs, inplace=True).model
    assert not [module for module in in_place.modules() if isinstance(module, building.OURS)]
    # The module that was replaced still has its own layers.
    assert (deep.input_layer, deep.output_layer) == old_layers


def test_a_layer_shared_with_a_recurrence_is_folded_in_both_places():
    deep = recurrence()
    shared = deep.input_layer = ours.LCWLinear(3, 4)
    folded = lcw_ops.fold(nn.ModuleList([shared, deep])).model
    assert type(folded[0]) is nn.Linear
    assert folded[1].input_layer is folded[0]


# ---- Ties ------------------------------------------------------------------------------------------------------------


def test_fold_says_what_it_unties():
    model = nn.ModuleList([nn.Embedding(5, 3), ours.LCWLinear(3, 5), ours.LCWLinear(3, 5), ours.WeightNormLinear(3, 5)])
    model[1].weight_u = model[2].weight_u = model[0].weight
    model[3].bias = model[1].bias
    report = lcw_ops.fold(model)
    notes = {changed.name: changed.note for changed in report.changed}
    untied = "weight_u was tied to 0.weight, and the result is not"
    assert notes == {"1": untied, "2": untied, "3": ""}
    assert report.model[1].weight is report.model[2].weight
    assert report.model[1].weight is not report.model[0].weight
    assert report.model[3].bias is report.model[1].bias
    assert untied in report.table()


def test_fold_says_that_locations_are_untied():
    model = nn.ModuleList([ours.GmPLinear(3, 5), ours.GmPLinear(3, 5)])
    model[0].location = model[1].location
    notes = [changed.note for changed in lcw_ops.fold(model).changed]
    assert notes[0] == "location was tied to 1.location, and the result is not"


# ---- Subclasses of ours ----------------------------------------------------------------------------------------------


class Sized(ours.LCWLinear):
    """Another constructor, and an attribute of its own."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__(*sizes)
        self.sizes = sizes


def test_a_subclass_with_another_constructor_folds():
    model = nn.Sequential(Sized((4, 3)))
    x = torch.randn(5, 4)
    folded = lcw_ops.fold(model, inputs=x).model
    assert type(folded[0]) is nn.Linear
    assert folded[0].sizes == (4, 3)
    torch.testing.assert_close(folded(x), model(x))


# ---- A failure midway ------------------------------------------------------------------------------------------------


def parametrized_model() -> nn.ModuleList:
    utils = ours.utils.parametrizations
    model = nn.ModuleList([nn.LSTM(3, 4), nn.ConvTranspose1d(4, 6, 3), nn.Linear(3, 4), ours.LCWLinear(3, 3)])
    utils.zero_sum(model[0], "weight_hh_l0")
    utils.hypersphere(model[0], "weight_ih_l0")
    utils.zero_sum(model[1], "weight")
    utils.hypersphere(model[2], "weight")
    return model


@pytest.mark.parametrize("where", ["placing", "removing", "writing"])
def test_fold_in_place_that_fails_midway_leaves_the_model_as_it_was(where, monkeypatch):
    model = parametrized_model()
    parameters = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    x, y = torch.randn(5, 2, 3), torch.randn(2, 4, 7)
    outputs = [model[0](x)[0], model[1](y), model[2](x), model[3](x)]

    def failing(*arguments, **options):
        raise OSError("midway")

    if where == "placing":
        monkeypatch.setattr(exchange, "place", failing)
    elif where == "removing":
        real_remove = parametrize.remove_parametrizations

        def remove_some(module, name, **options):
            real_remove(module, name, **options)
            if module is model[2]:
                raise OSError("midway")

        monkeypatch.setattr(parametrize, "remove_parametrizations", remove_some)
    else:
        real_refresh = folding._torch.refresh_recurrent_weights

        def refresh_some(module):
            monkeypatch.setattr(folding._torch, "refresh_recurrent_weights", real_refresh)
            raise OSError("midway")

        monkeypatch.setattr(folding._torch, "refresh_recurrent_weights", refresh_some)
    with pytest.raises(OSError, match="midway"):
        lcw_ops.fold(model, inplace=True)
    monkeypatch.undo()
    assert list(model.modules()) == modules
    assert [type(module) for module in modules] == classes
    assert list(dict(model.named_parameters())) == list(parameters)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.data_ptr() == addresses[name]
        assert torch.equal(parameter, values[name])
    again = [model[0](x)[0], model[1](y), model[2](x), model[3](x)]
    assert all(torch.equal(now, before) for now, before in zip(again, outputs, strict=True))
    # Gradients reach what is trained, and a second attempt succeeds.
    sum(output.square().sum() for output in again).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    report = lcw_ops.fold(model, inplace=True)
    assert len(report.changed) == 5
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    torch.testing.assert_close(model[1](y), outputs[1])
    torch.testing.assert_close(model[0](x)[0], outputs[0])


# ---- Targets ---------------------------------------------------------------------------------------------------------


def test_a_class_with_another_constructor_is_no_target():
    model = nn.Sequential(nn.Linear(3, 3))
    layer = model[0]
    with pytest.raises(TypeError, match=r"convert: layers names the class Sized, whose constructor Sized\(sizes"):
        lcw_ops.convert(model, {nn.Linear: Sized})
    assert model[0] is layer


@pytest.mark.parametrize("function", [lambda old: old, lambda old: nn.Sequential(old, nn.ReLU())])
@pytest.mark.parametrize("inputs", [None, torch.ones(2, 3)])
def test_a_function_whose_result_contains_the_old_layer_is_refused(function, inputs):
    model = nn.Sequential(nn.Linear(3, 3))
    layer = model[0]
    layer.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match="convert: layers has a function for Linear whose result is the old layer"):
        lcw_ops.convert(model, {nn.Linear: function}, inputs=inputs)
    assert model[0] is layer
    assert len(layer._forward_hooks) == 1


def test_a_function_that_returns_one_module_twice_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers, one = list(model), ours.LCWLinear(3, 3)
    with pytest.raises(ValueError, match="returns one module for several layers"):
        lcw_ops.convert(model, {nn.Linear: lambda old: one})
    assert list(model) == layers


# ---- Optimizers ------------------------------------------------------------------------------------------------------


def lcw_in_sequence(old: nn.Module) -> nn.Module:
    return nn.Sequential(ours.LCWLinear.from_linear(old), nn.Dropout(0.0), nn.LayerNorm(old.out_features))


@pytest.mark.parametrize("bias", [True, False])
def test_an_optimizer_gets_the_parameters_of_children(bias):
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1)
    lcw_ops.convert(model, {nn.Linear: lcw_in_sequence}, optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(8, 3)).sin().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad.any())


def test_the_biases_of_children_go_to_the_group_of_the_bias():
    model = nn.Sequential(nn.Linear(3, 4))
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
    lcw_ops.convert(model, {nn.Linear: lcw_in_sequence}, optimizer=optimizer)
    decayed, others = (set(group["params"]) for group in optimizer.param_groups)
    assert decayed == {model[0][0].weight_u, model[0][2].weight}
    assert others == {model[0][0].bias, model[0][2].bias}


def test_a_parameter_that_several_new_layers_share_is_held_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared = nn.Parameter(torch.zeros(3, 3))

    def make(old: nn.Module) -> nn.Module:
        new = ours.LCWLinear.from_linear(old)
        new.weight_u = shared
        return new

    lcw_ops.convert(model, {nn.Linear: make}, optimizer=optimizer)
    held = optimizer.param_groups[0]["params"]
    assert len(held) == len(set(held)) == 3
    assert set(held) == set(model.parameters())
