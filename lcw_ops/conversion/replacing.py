"""``convert``: replace the layers of a model. First everything is planned and built, then all places change at once."""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lcw_ops import _torch
from lcw_ops import nn as ours
from lcw_ops._checks import check_choice, describe
from lcw_ops.conversion import building, exchange, measure
from lcw_ops.conversion.exchange import Exchange
from lcw_ops.conversion.measure import Inputs
from lcw_ops.conversion.optimizers import Remapping
from lcw_ops.conversion.report import Changed, Left, Report
from lcw_ops.conversion.sites import Site, find_sites, held_elsewhere, ties
from lcw_ops.nn._refusals import PLAIN, applied_weight, refusal, weight_norm_tensors

_LAYERS: dict[str, dict[type[nn.Module], Any]] = {
    "lcw": dict(zip(PLAIN, (ours.LCWLinear, ours.LCWConv1d, ours.LCWConv2d, ours.LCWConv3d), strict=True)),
    "gmp": dict(zip(PLAIN, (ours.GmPLinear, ours.GmPConv1d, ours.GmPConv2d, ours.GmPConv3d), strict=True)),
    "weight_norm": dict(
        zip(
            PLAIN,
            (ours.WeightNormLinear, ours.WeightNormConv1d, ours.WeightNormConv2d, ours.WeightNormConv3d),
            strict=True,
        )
    ),
}

# Where torch or another library holds weights in something that looks like a layer to be replaced, and is not.
_NO_LAYERS = {
    "transformers.pytorch_utils.Conv1D": "it is not an nn.Linear: its weight is stored transposed, inputs x units",
    "torch.nn.modules.activation.MultiheadAttention": "its input projections are parameters, not layers",
}


def convert(
    model: nn.Module,
    layers: str | Mapping[type[nn.Module], Any],
    filter: Callable[[str, nn.Module], bool] | None = None,
    inputs: Any = None,
    copy: bool = False,
    dry_run: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Report:
    """Replace the linear layers and convolutions of a model by layers of this package.

    GmP and weight-norm layers keep the function that the model computes, up to rounding. LCW layers project the weight,
    so the function changes. With ``inputs``, a layer's bias takes up the mean of what its projection removes:
    b + mean(w) E[sum x] for a unit with weight w and bias b, and for a convolution with the sum over each window. The
    report gives every change.

    A layer with torch's weight norm (a parametrization or a hook, along dim 0) that becomes a weight-norm layer passes
    on its very parameters g and v, so training goes on along the same path.

    Everything else about a layer stays: where it is shared, its hooks and their handles, training flag, device, dtype,
    memory format, ``requires_grad`` and attributes. The parameters stay the same objects where the new layer trains
    tensors of the same kind: the bias of LCW and weight norm, the weight as LCW's centred ``weight_u`` and as weight
    norm's ``weight_v``. A layer that cannot be replaced stays, and ``report.left`` has the reason.

    Convert before the model is compiled, sharded or wrapped in DistributedDataParallel, and before its optimizer is
    made; or give the optimizer.

    Args:
        model: any module. It is changed in place, unless ``copy`` is given or the model itself is one of the layers.
            If anything fails, it is left as it was.
        layers: "lcw", "gmp" or "weight_norm" for every ``nn.Linear`` and ``nn.Conv1d``, 2d, 3d. Or a mapping from types
            to a layer class of :mod:`lcw_ops.nn`, or to a function that takes the old layer and returns the new one,
            for instance ``{torch.nn.Linear: functools.partial(nn.LCWLinear.from_linear, basis=True)}``. "gmp" leaves
            the output layer plain unless ``filter`` accepts it: with inputs, the layer that is called last, otherwise
            the layer that is registered last.
        filter: called with name and module of every layer of such a type. Those for which it is false stay.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of the model. The model is run
            on copies of it in eval mode, without gradients, several times. If layers with torch's weight norm are
            replaced, forward and backward passes are timed too. They run with gradients in the mode that the model is
            in, which is training mode as a rule. Hooks of the model run too.
        copy: convert a deep copy, ``report.model``.
        dry_run: change nothing, and report what would be done.
        optimizer: the optimizer that trains the model. Its groups get the new parameters in place of the old ones.
            State is kept for parameters that stay, and starts anew for others.

    Returns:
        A :class:`~lcw_ops.conversion.Report`. Its ``model`` is the model to go on with.

    Raises:
        ValueError: no layer has one of the types, or ``filter`` accepts none; an unknown name; the model is wrapped in
            DistributedDataParallel; inputs that are not finite, where LCW's biases take up their mean; an optimizer
            that holds no parameter of the model, that has state over all parameters together (LBFGS), or that is given
            together with ``copy``.
        TypeError: an argument of another type.

    Source: derived by us.
    """
    targets = _targets(layers)
    given = None if inputs is None else Inputs("convert", inputs)
    _check_model(model, filter, copy, optimizer)
    if copy and not dry_run:
        model = exchange.copy_of(model)
    sites = find_sites(model)
    report = Report(model, dry_run=dry_run)
    matches, chosen = _choose(sites, targets, filter, report)
    called = None
    if given is not None:
        _check_values(model)
        called = measure.called_layers(model, given, matches)
    if layers == "gmp":
        chosen = _without_output_layer(called or matches, called is not None, chosen, filter, report)
    exchanges = _build(chosen, called, report)
    remapping = None
    if optimizer is not None:
        remapping = Remapping("convert", optimizer, model, _successors(exchanges))
        _note_lost_states(remapping, report)
    corrections: dict[nn.Module, Tensor] = {}
    if given is not None:
        corrections = _correct_biases(model, given, exchanges)
    for one in exchanges:
        exchange.prepare(one)
    report.changed = [Changed(one.name, _name_of(one.old), _name_of(one.new), _note(one)) for one in exchanges]
    if given is not None:
        _measure(model, given, exchanges, corrections, report)
    if not dry_run:
        exchange.commit(exchanges, *([] if remapping is None else [remapping.apply]))
        report.model = measure.new_root(model, exchanges)
    return report


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _targets(layers: object) -> Mapping[type[nn.Module], Any]:
    if isinstance(layers, str):
        check_choice("convert", "layers", layers, _LAYERS)
        return _LAYERS[layers]
    if not isinstance(layers, Mapping) or not layers:
        expected = f"one of {', '.join(map(repr, _LAYERS))}, or a mapping of types"
        came = "is empty" if isinstance(layers, Mapping) else f"is a {type(layers).__name__}"
        raise TypeError(describe("convert", "layers", came, expected))
    for old, new in layers.items():
        if not (isinstance(old, type) and issubclass(old, nn.Module)):
            raise TypeError(describe("convert", "layers", f"has the key {old!r}", "a class of modules"))
        if isinstance(new, type):
            if not issubclass(new, building.OURS) or not building.fits(new, old):
                expected = "a layer of lcw_ops.nn of the same kind, or a function from the old layer to the new one"
                came = f"maps {old.__name__} to the class {new.__name__}"
                raise TypeError(describe("convert", "layers", came, expected))
        elif not callable(new):
            expected = "a layer of lcw_ops.nn, or a function from the old layer to the new one"
            raise TypeError(describe("convert", "layers", f"maps {old.__name__} to {new!r}", expected))
    return layers


def _check_model(model: object, filter: object, copy: bool, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(describe("convert", "model", f"is a {type(model).__name__}", "a torch.nn.Module"))
    if filter is not None and not callable(filter):
        expected = "a function of a layer's name and the layer, or None"
        raise TypeError(describe("convert", "filter", f"is a {type(filter).__name__}", expected))
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        came, remedy = "is wrapped in DistributedDataParallel", "Convert it first, and wrap it afterwards."
        raise ValueError(describe("convert", "model", came, "the model itself", remedy))
    if copy and optimizer is not None:
        came, remedy = "is given together with copy=True", "Make one for the parameters of report.model."
        raise ValueError(describe("convert", "optimizer", came, "None, because the copy has other parameters", remedy))


def _check_values(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta or is_lazy(parameter):
            came = f"are given, but {name} is " + ("not initialised" if is_lazy(parameter) else "on the meta device")
            remedy = "Run the model once before." if is_lazy(parameter) else ""
            raise ValueError(describe("convert", "inputs", came, "None for a model without values", remedy))


# ---- Which layers ----------------------------------------------------------------------------------------------------


def _choose(
    sites: dict[int, Site], targets: Mapping[type[nn.Module], Any], filter, report: Report
) -> tuple[list[nn.Module], list[tuple[Site, Any]]]:
    """All layers of the types, and those to replace, each with the new class; the report gets those that stay."""
    tied, elsewhere = ties(sites), held_elsewhere(sites)
    inside_constraints = _parametrizations(sites)
    matches, chosen, accepted = [], [], 0
    for key, site in sites.items():
        layer = site.module
        kind = next((base for base in type(layer).__mro__ if base in targets), None)
        if kind is None or _is_already(layer, targets[kind]):
            if key not in inside_constraints and (reason := _reason_of_other(layer)):
                report.left.append(Left(site.name, _name_of(layer), reason))
            continue
        matches.append(layer)
        if filter is not None and not filter(site.name, layer):
            report.left.append(Left(site.name, _name_of(layer), "the filter leaves it out"))
            continue
        accepted += 1
        reason = refusal(layer) or _activation(layer) or _tie(layer, tied)
        holder = next((elsewhere[i] for i in (key, *map(id, layer.parameters())) if i in elsewhere), None)
        if reason is None and holder is not None:
            reason = f"{holder} holds it too, where a replacement would not arrive"
        if reason is not None:
            report.left.append(Left(site.name, _name_of(layer), reason))
        else:
            chosen.append((site, targets[kind]))
    if not accepted:
        _raise_no_match(sites, targets, len(matches))
    return matches, chosen


def _is_already(layer: nn.Module, target: Any) -> bool:
    return isinstance(target, type) and isinstance(layer, target)


def _raise_no_match(sites: dict[int, Site], targets: Mapping[type[nn.Module], Any], matches: int) -> None:
    if matches:
        came = f"accepts none of the {matches} layers of these types"
        raise ValueError(describe("convert", "filter", came, "a filter that accepts at least one"))
    asked = [kind.__name__ for kind in targets]
    present = Counter(_name_of(site.module) for site in sites.values())

    def closeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio() for other in asked)

    closest = sorted(present, key=closeness, reverse=True)[:5]
    came = f"has no {' or '.join(asked)}"
    expected = "at least one layer of such a type"
    remedy = f"The closest types in it are {', '.join(f'{name} ({present[name]})' for name in closest)}."
    raise ValueError(describe("convert", "model", came, expected, remedy))


def _activation(layer: nn.Module) -> str | None:
    """Only our own layers have one, and only a function that the user gives could keep it."""
    has_one = isinstance(layer, building.OURS) and getattr(layer, "activation", None) is not None
    return "it applies an activation, which would be lost" if has_one else None


def _tie(layer: nn.Module, tied: dict[int, str]) -> str | None:
    tie = next((tied[id(parameter)] for parameter in layer.parameters() if id(parameter) in tied), None)
    return f"a parameter of it is tied: {tie}" if tie else None


def _parametrizations(sites: dict[int, Site]) -> set[int]:
    """Everything inside a module's ``parametrizations``, which belongs to that module."""
    lists = [
        site.module for site in sites.values() if isinstance(site.module, nn.utils.parametrize.ParametrizationList)
    ]
    return {id(inside) for constraints in lists for inside in constraints.modules()}


def _reason_of_other(layer: nn.Module) -> str | None:
    """Why a module that holds a weight, in no layer of the types asked for, stays; None for all other modules."""
    kind = nn.utils.parametrize.type_before_parametrizations(layer)
    if kind.__module__.partition(".")[0] == "lcw_ops":
        return None
    # A hook or pruning leaves the weight as a plain attribute.
    tensors = [*layer._parameters.values(), vars(layer).get("weight")]
    holds_weight = any(isinstance(tensor, Tensor) and (is_lazy(tensor) or tensor.dim() >= 2) for tensor in tensors)
    if not holds_weight and not nn.utils.parametrize.is_parametrized(layer):
        return None
    if isinstance(layer, nn.RNNBase):
        return "its weights are parameters, not layers"
    if isinstance(layer, _torch.ConvTranspose):
        return "the units of a transposed convolution are along dim 1 of its weight"
    return _NO_LAYERS.get(f"{kind.__module__}.{kind.__qualname__}", "its type is not one of those to replace")


def _without_output_layer(
    layers: list[nn.Module], were_called: bool, chosen: list[tuple[Site, Any]], filter, report: Report
) -> list[tuple[Site, Any]]:
    """``layers`` are all of the types, in the order of their calls or registration, also those that stay anyway."""
    how = "it is called last on the inputs" if were_called else "it is registered last"
    site = next((site for site, _ in chosen if site.module is layers[-1]), None)
    if site is None:
        return chosen
    if filter is not None:
        report.notes.append(f"{site.name or 'The model'} counts as the output layer ({how}); the filter accepts it.")
        return chosen
    reason = f"it is the output layer ({how}), which suits GmP best if plain; a filter that accepts it converts it"
    report.left.append(Left(site.name, _name_of(site.module), reason))
    return [(other, target) for other, target in chosen if other is not site]


# ---- New layers ------------------------------------------------------------------------------------------------------


def _build(chosen: list[tuple[Site, Any]], called: list[nn.Module] | None, report: Report) -> list[Exchange]:
    exchanges = []
    was_called = None if called is None else set(called)
    built = building.build([(site.module, target) for site, target in chosen])
    for (site, _), made in zip(chosen, built, strict=True):
        if isinstance(made, nn.Module):
            reason = _reason_after_building(site, made, was_called)
            if reason is None:
                exchanges.append(Exchange(site, made))
                continue
        else:
            reason = made
        report.left.append(Left(site.name, _name_of(site.module), reason))
    return exchanges


def _reason_after_building(site: Site, new: nn.Module, called: set[nn.Module] | None) -> str | None:
    if getattr(new, "activation", None) is not None:
        reader = next((parent for parent, _ in site.places if isinstance(parent, nn.MultiheadAttention)), None)
        if reader is not None or (called is not None and site.module not in called):
            return "its owner reads its weight and does not call it, and a plain weight cannot express the activation"
    staying = {id(parameter) for parameter in new.parameters()}
    for parameter in site.module.parameters():
        if id(parameter) not in staying and building.has_hooks(parameter):
            return "a hook is registered on a parameter of it that would go"
    return None


@torch.no_grad()
def _correct_biases(model: nn.Module, inputs: Inputs, exchanges: list[Exchange]) -> dict[nn.Module, Tensor]:
    """Let the bias of each LCW layer take up mean(w) E[sum x]; the result has what was added, in float64."""
    projected = [one for one in exchanges if building.is_lcw(one.new)]
    sums = measure.mean_sums(model, inputs, [one.old for one in projected])
    corrections = {}
    for one in projected:
        bias = one.new._parameters.get("bias")
        if one.old not in sums:
            one.note = "no input reached it, so its bias is as it was"
        elif bias is None:
            one.note = "without a bias to take up the mean"
        else:
            means = applied_weight(one.old).flatten(1).double().mean(1)
            groups = sums[one.old]
            correction = means * groups.repeat_interleave(len(means) // len(groups)).to(means)
            if not correction.isfinite().all():
                came = f"reach {one.name or 'the model'} with a mean that is not finite, or its weight is not finite"
                raise ValueError(describe("convert", "inputs", came, "finite numbers, because biases take up the mean"))
            corrections[one.old] = correction
            corrected = (bias.double() + correction).to(bias.dtype)
            one.bias = bias, corrected
            one.new._parameters["bias"] = nn.Parameter(corrected, bias.requires_grad)
    return corrections


def _successors(exchanges: list[Exchange]) -> dict[int, list[tuple[str, nn.Parameter]]]:
    return {
        id(parameter): [(one.parameter_name(name), getattr(one.new, name)) for name in names]
        for one in exchanges
        for parameter, names in building.successors(one.old, one.new).items()
    }


def _note_lost_states(remapping: Remapping, report: Report) -> None:
    lost = remapping.lost_states()
    if lost:
        report.notes.append(f"The optimizer's state of {lost} parameters starts anew.")


# ---- Report ----------------------------------------------------------------------------------------------------------


def _measure(
    model: nn.Module, inputs: Inputs, exchanges: list[Exchange], corrections: Mapping[nn.Module, Tensor], report: Report
) -> None:
    if not exchanges:
        return
    report.errors, output = measure.layer_changes(model, inputs, exchanges, corrections)
    report.output_change = measure.output_change(inputs, output, model, exchanges, corrections)
    if any(weight_norm_tensors(one.old) is not None for one in exchanges):
        try:
            report.step_time = measure.step_times(model, inputs, exchanges)
        except Exception as error:
            # The passes run in the model's own mode, in which it may fail on inputs that suit eval mode.
            report.notes.append(f"The forward and backward passes could not be timed: {error}")
    finite = all(math.isfinite(change.value) for change in report.errors.values())
    if not finite:
        report.notes.append("Some changes are not finite: the outputs on these inputs are 0 or not finite.")


def _note(one: Exchange) -> str:
    notes = [one.note] if one.note else []
    if len(one.site.places) > 1:
        notes.append(f"shared by {len(one.site.places)} places")
    if weight_norm_tensors(one.old) is not None and building.is_weight_norm(one.new):
        notes.append("the same g and v")
    return "; ".join(notes)


def _name_of(layer: nn.Module) -> str:
    return nn.utils.parametrize.type_before_parametrizations(layer).__name__
