"""``fold``: the way back. Every layer of this package becomes what it computes, in layers of torch.nn."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lcw_ops import _torch
from lcw_ops import functional as F
from lcw_ops import nn as ours
from lcw_ops._checks import describe
from lcw_ops._layer_kinds import is_linear, plain_kind
from lcw_ops.conversion import building, exchange, measure
from lcw_ops.conversion.exchange import Exchange
from lcw_ops.conversion.measure import Inputs
from lcw_ops.conversion.plain import PlainOrthogonalFilterMLP, PlainOrthogonalFilterRNN, UnitScale
from lcw_ops.conversion.report import Changed, Left, Report
from lcw_ops.conversion.sites import Site, find_sites, held_elsewhere, owners_of_parameters
from lcw_ops.nn._refusals import base_of_ours, refusal, refusal_of_computed_tensors, refusal_of_more
from lcw_ops.reference import hypersphere_direction, lcw_weight, normalize_scale

_RECURRENCES: dict[type, Any] = {
    ours.OrthogonalFilterMLP: PlainOrthogonalFilterMLP,
    ours.OrthogonalFilterRNN: PlainOrthogonalFilterRNN,
}
_FOLDED = (PlainOrthogonalFilterMLP, PlainOrthogonalFilterRNN, UnitScale)


def fold(model: nn.Module, inputs: Any = None, inplace: bool = False, dry_run: bool = False) -> Report:
    """Replace every layer of this package by a plain layer of torch.nn that computes the same.

    The result needs none of our ops: it can be saved with its plain keys, exported, quantized, or converted again. The
    weight is computed in float64 and rounded once. A GmP layer with ReLU becomes ``Sequential(Linear, ReLU)``. If one
    of its radii is negative, no plain layer computes it, and a module of plain torch multiplies by the radii after the
    ReLU. :class:`~lcw_ops.nn.OrthogonalFilterMLP` and ``RNN`` become modules of plain torch. The parametrizations
    ``zero_sum`` and ``hypersphere`` are removed; those of torch stay.

    Args:
        model: any module. Without layers of ours, the result has nothing changed.
        inputs: as in :func:`lcw_ops.convert`: the report then has each layer's difference.
        inplace: change the model itself. The default is a deep copy, because one folds in the middle of training.
        dry_run: change nothing, and report what would be done.

    Returns:
        A :class:`~lcw_ops.conversion.Report`. Its ``model`` is the folded model, a new root if the root itself is such
        a layer. ``left`` has what stays although this package defines it.

    Raises:
        TypeError: model or inputs of another type.

    Source: derived by us.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(describe("fold", "model", f"is a {type(model).__name__}", "a torch.nn.Module"))
    given = None if inputs is None else Inputs("fold", inputs)
    if not inplace and not dry_run:
        model = exchange.copy_of(model)
    report = Report(model, dry_run=dry_run)
    exchanges, parametrized = [], []
    tied: dict[tuple, nn.Parameter] = {}
    all_sites = find_sites(model)
    elsewhere, owners = held_elsewhere(all_sites), owners_of_parameters(all_sites)
    sites = all_sites.values()
    constraints = {inside for site in sites for inside in _inside_parametrizations(site.module)}
    for site in sites:
        if parametrize.is_parametrized(site.module):
            parametrized += _parametrizations_to_remove(site, report)
        plain, note = _plain_of(site, tied)
        holder = None if plain is None else _holder(site.module, plain, elsewhere)
        if holder is not None:
            plain, note = None, f"{holder} holds it too, where a replacement would not arrive"
        if plain is not None:
            exchanges.append(Exchange(site, plain, note))
        elif note and site.module not in constraints:
            report.left.append(Left(site.name, _name_of(site.module), note))
    _note_untied(exchanges, owners)
    _follow_children(exchanges)
    for one in exchanges:
        # A subclass may have a constructor that takes other arguments.
        exchange.prepare(one, _attributes_of(base_of_ours(one.old)))
    report.changed += [Changed(one.name, _name_of(one.old), _description(one.new), one.note) for one in exchanges]
    report.changed += [
        Changed(site.name, f"{_name_of(site.module)}, {name} parametrized", _name_of(site.module))
        for site, name in parametrized
    ]
    if given is not None and exchanges:
        report.errors, output = measure.layer_changes(model, given, exchanges, {})
        report.output_change = measure.output_change(given, output, model, exchanges, {})
    if not dry_run:
        exchange.commit(exchanges, *[_remover(site.module, name) for site, name in parametrized])
        report.model = measure.new_root(model, exchanges)
    return report


def _plain_of(site: Site, tied: dict[tuple, nn.Parameter]) -> tuple[nn.Module | None, str]:
    """The plain module and a note about it. None if the module stays: the note is then the reason, if it needs one."""
    layer = site.module
    if isinstance(layer, building.OURS):
        reason = refusal(layer)
        return _plain_layer(site, tied) if reason is None else (None, reason)
    kind = parametrize.type_before_parametrizations(layer)
    if isinstance(layer, (ours.OrthogonalFilterMLP, ours.OrthogonalFilterRNN)):
        has_own = kind not in _RECURRENCES or "forward" in vars(layer)
        if has_own or parametrize.is_parametrized(layer):
            return None, "its class or its tensors are not the module's own"
        reason = refusal_of_computed_tensors(layer) or refusal_of_more(layer, _tensors_of(kind), "its class's tensors")
        if reason is not None:
            return None, reason
        return _RECURRENCES[kind](layer), "a loop in plain torch"
    if kind.__module__.partition(".")[0] != "lcw_ops" or isinstance(layer, _FOLDED):
        return None, ""
    if isinstance(layer, ours.InputMeanNorm):
        return None, "it uses no op of ours, and no layer of torch.nn subtracts a batch's mean in training"
    return None, "torch.nn has no layer for it"


def _holder(old: nn.Module, new: nn.Module, elsewhere: dict[int, str]) -> str | None:
    """The plain attribute that also holds the layer, or a parameter of it that the new layer has not."""
    staying = {id(parameter) for parameter in new.parameters()}
    leaving = [id(parameter) for parameter in old.parameters(recurse=False) if id(parameter) not in staying]
    return next((elsewhere[key] for key in (id(old), *leaving) if key in elsewhere), None)


def _note_untied(exchanges: list[Exchange], owners: dict[int, list[str]]) -> None:
    """Say which parameters were one with a parameter that goes, where the result is no longer one with them."""
    # Layers that shared what they train share their weight again.
    together: dict[nn.Parameter | None, set[str]] = {}
    for one in exchanges:
        names = {one.parameter_name(own) for own in one.old._parameters}
        together.setdefault(_weight_of(one.new), set()).update(names)
    together[None] = set()
    for one in exchanges:
        staying = {id(parameter) for parameter in one.new.parameters()}
        tied_again = together[_weight_of(one.new)]
        for own, parameter in one.old._parameters.items():
            if parameter is None or id(parameter) in staying:
                continue
            others = [name for name in owners[id(parameter)] if name not in tied_again]
            if others and others != [one.parameter_name(own)]:
                untied = f"{own} was tied to {' and '.join(others)}, and the result is not"
                one.note = f"{one.note}; {untied}" if one.note else untied


def _weight_of(plain: nn.Module) -> nn.Parameter | None:
    layer = plain[0] if isinstance(plain, nn.Sequential) else plain
    return layer._parameters.get("weight")


def _follow_children(exchanges: list[Exchange]) -> None:
    """A new module that takes over the old one's children is where these are to be replaced."""
    new_parents = {one.old: one.new for one in exchanges if any(True for _ in one.old.children())}
    for one in exchanges:
        one.site.places[:] = [(new_parents.get(parent, parent), key) for parent, key in one.site.places]


# ---- Layers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _plain_layer(site: Site, tied: dict[tuple, nn.Parameter]) -> tuple[nn.Module, str]:
    layer: Any = site.module
    weight, bias, scale = _exact(layer)
    kind = plain_kind(layer)
    if kind is nn.Linear and any(isinstance(parent, nn.MultiheadAttention) for parent, _ in site.places):
        # torch's own class there tells quantizers that the layer's owner reads its weight and does not call it.
        kind = nn.modules.linear.NonDynamicallyQuantizableLinear
    trained = building.trained_tensors(layer)
    like = trained[0]
    own_bias = None if building.is_gmp(layer) else layer.bias
    plain = building.empty(layer, kind, like.dtype, bias is not None or own_bias is not None)
    rounded = weight.to(like.dtype).view(plain.weight.shape)
    if like.shape == rounded.shape:
        # In the memory format of the trained tensor.
        rounded = torch.empty_like(like).copy_(rounded)
    key = (type(layer), scale is None, *map(id, trained))
    requires_grad = any(tensor.requires_grad for tensor in trained)
    # Layers that share what they train go on sharing their weight.
    plain._parameters["weight"] = tied.setdefault(key, nn.Parameter(rounded, requires_grad))
    if own_bias is not None:
        is_parameter = isinstance(own_bias, nn.Parameter)
        plain._parameters["bias"] = own_bias if is_parameter else nn.Parameter(own_bias.detach().clone())
    elif bias is not None:
        plain._parameters["bias"] = nn.Parameter(bias.to(like.dtype), layer.location.requires_grad)
    if getattr(layer, "activation", None) is None:
        return plain, ""
    if scale is None:
        return nn.Sequential(plain, nn.ReLU()), ""
    radius = nn.Parameter(scale.to(like.dtype), layer.radius.requires_grad)
    after = UnitScale(radius, -1 if is_linear(layer) else -1 - len(layer.kernel_size))
    return nn.Sequential(plain, nn.ReLU(), after), "a radius is negative: it is applied after the ReLU"


def _exact(layer: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight (n, m), the bias that is not a parameter of the layer, and radii to apply later; in float64."""
    trained = [tensor.detach().double() for tensor in building.trained_tensors(layer)]
    if building.is_lcw(layer):
        return lcw_weight(trained[0], layer.basis).flatten(1), None, None
    if building.is_weight_norm(layer):
        v, g = trained
        # The reference fails on a rank that holds no column of a DTensor.
        weight = F.normalize_scale if _torch.has_dtensor(v) else normalize_scale
        return weight(v.flatten(1), g.flatten()), None, None
    angles, radius = trained
    direction = hypersphere_direction(angles)
    if layer.sign is not None:
        direction = layer.sign.double()[:, None] * direction
    location = layer.location.detach().double()
    has_bias = isinstance(layer.location, nn.Parameter) or "location" not in layer._buffers
    if layer.activation is not None and not bool((radius >= 0).all()):
        return direction, location if has_bias else None, radius
    return radius[:, None] * direction, radius * location if has_bias else None, None


# ---- Parametrizations ------------------------------------------------------------------------------------------------


def _parametrizations_to_remove(site: Site, report: Report) -> list[tuple[Site, str]]:
    """The tensors of the module that only parametrizations of this package compute."""
    found = []
    for name, constraints in site.module.parametrizations.items():  # type: ignore[union-attr, operator]
        are_ours = [type(constraint).__module__.partition(".")[0] == "lcw_ops" for constraint in constraints]
        if all(are_ours):
            found.append((site, name))
        elif any(are_ours):
            reason = f"{name} has a parametrization of torch beside ours, and they cannot be removed one by one"
            report.left.append(Left(site.name, _name_of(site.module), reason))
    return found


def _inside_parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, parametrize.ParametrizationList):
        yield from module.modules()


def _remover(module: Any, name: str) -> Callable[[], Callable[[], None]]:
    @torch.no_grad()
    def remove() -> Callable[[], None]:
        exact = _exact_parametrized(module.parametrizations[name])
        undo = _restorer(module, name)
        try:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            getattr(module, name).copy_(exact)
            _torch.refresh_recurrent_weights(module)
        except BaseException:
            undo()
            raise
        return undo

    return remove


def _restorer(module: Any, name: str) -> Callable[[], None]:
    """The function that gives a module the parametrization back which torch takes from it and from its class."""
    kind = type(module)
    computed = vars(kind)[name]
    registered = [(values, dict(values)) for values in (module._parameters, module._buffers, module._modules)]
    constraints = module.parametrizations._modules
    registered.append((constraints, dict(constraints)))
    # torch lets the tensor that was trained point to the memory of the computed one.
    trained = module.parametrizations[name]
    tensors = [tensor for tensor in (*trained._parameters.values(), *trained._buffers.values()) if tensor is not None]
    memory = [(tensor, tensor.detach()) for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, before in memory:
            if tensor.data_ptr() != before.data_ptr():
                tensor.set_(before)
        for values, before in registered:
            values.clear()
            values.update(before)
        module.__class__ = kind
        setattr(kind, name, computed)
        _torch.refresh_recurrent_weights(module)

    return restore


def _exact_parametrized(constraints: Any) -> Tensor:
    """The parametrized tensor, computed in float64."""
    if constraints.is_tensor:
        value = constraints[0](constraints.original.double())
    else:
        value = constraints[0](*(getattr(constraints, f"original{i}").double() for i in range(constraints.ntensors)))
    for constraint in list(constraints)[1:]:
        value = constraint(value)
    return value


# ---- Names -----------------------------------------------------------------------------------------------------------


def _name_of(layer: nn.Module) -> str:
    return parametrize.type_before_parametrizations(layer).__name__


def _description(layer: nn.Module) -> str:
    if isinstance(layer, nn.Sequential):
        return f"Sequential({', '.join(_name_of(child) for child in layer)})"
    return _name_of(layer)


def _attributes_of(kind: Any) -> frozenset[str]:
    """The attributes that a layer of this class has by itself; a user may have set others."""
    return frozenset(vars(_smallest(kind)))


def _tensors_of(kind: Any) -> set[str]:
    """The parameters, buffers and children that a recurrence of this class has by itself."""
    made = _smallest(kind)
    return {*made._parameters, *made._buffers, *made._modules, "alpha", "beta"}


@functools.lru_cache(maxsize=64)
def _smallest(kind: Any) -> nn.Module:
    if issubclass(kind, ours.OrthogonalFilterMLP):
        return kind(1, 1, 1, 1, "identity", device="meta")
    if issubclass(kind, ours.OrthogonalFilterRNN):
        return kind(1, 1, length=1, filter="identity", device="meta")
    return kind(2, 2, device="meta") if kind._plain is nn.Linear else kind(2, 2, 1, device="meta")
