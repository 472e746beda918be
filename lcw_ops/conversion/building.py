"""New layers from old ones. Where both train a tensor of the same kind, the new layer takes the very parameter."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import _torch
from lcw_ops import nn as ours
from lcw_ops._checks import describe
from lcw_ops._layer_kinds import is_linear
from lcw_ops.nn._refusals import applied_weight, weight_norm_tensors
from lcw_ops.nn.hypersphere import _coordinates as coordinates
from lcw_ops.nn.weight_norm import _lengths as lengths

_LCW = (ours.LCWLinear, ours.LCWConv1d, ours.LCWConv2d, ours.LCWConv3d)
_GMP = (ours.GmPLinear, ours.GmPConv1d, ours.GmPConv2d, ours.GmPConv3d)
_WEIGHT_NORM = (ours.WeightNormLinear, ours.WeightNormConv1d, ours.WeightNormConv2d, ours.WeightNormConv3d)
OURS = (*_LCW, *_GMP, *_WEIGHT_NORM)

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def is_lcw(layer: nn.Module) -> bool:
    return isinstance(layer, _LCW)


def is_gmp(layer: nn.Module) -> bool:
    return isinstance(layer, _GMP)


def is_weight_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _WEIGHT_NORM)


def trained_tensors(layer: Any) -> list[Tensor]:
    """The tensors from which a layer of this package computes its weight."""
    if is_lcw(layer):
        return [layer.weight_v if layer.basis else layer.weight_u]
    return [layer.angles, layer.radius] if is_gmp(layer) else [layer.weight_v, layer.weight_g]


def fits(new: type[nn.Module], old: type[nn.Module]) -> bool:
    """Whether the new class, one of ours, can take the place of layers of the old class."""
    return issubclass(getattr(old, "_plain", old), new._plain)  # type: ignore[attr-defined]


def build(pairs: list[tuple[nn.Module, Any]]) -> list[nn.Module | str]:
    """For each old layer and what it is to become, the new layer, or the reason why the old one stays."""
    results: dict[int, nn.Module | str] = {}
    together: dict[tuple, list[int]] = {}
    for index, (old, target) in enumerate(pairs):
        if not isinstance(target, type):
            results[index] = _call(target, old)
        elif issubclass(target, _GMP):
            weight = applied_weight(old)
            key = (weight.shape[1:].numel(), weight.dtype, weight.device)
            together.setdefault(key, []).append(index)
        elif issubclass(target, _LCW):
            results[index] = _build_lcw(old, target)
        else:
            results[index] = _build_weight_norm(old, target)
    _check_distinct(results)
    for indices in together.values():
        results.update(zip(indices, _build_gmp([pairs[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(pairs))]


def _call(function: Callable, old: nn.Module) -> nn.Module:
    made = function(old)
    if not isinstance(made, nn.Module):
        came = f"has a function for {type(old).__name__} that returns a {type(made).__name__}"
        raise TypeError(describe("convert", "layers", came, "a function that returns the new layer"))
    if any(module is old for module in made.modules()):
        came = f"has a function for {type(old).__name__} whose result is the old layer or contains it"
        raise ValueError(describe("convert", "layers", came, "a function that returns a new layer"))
    return made


def _check_distinct(results: dict[int, nn.Module | str]) -> None:
    made = [result for result in results.values() if isinstance(result, nn.Module)]
    if len(set(made)) < len(made):
        came = "has a function that returns one module for several layers"
        raise ValueError(describe("convert", "layers", came, "a function that returns a new module at every call"))


def has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks) or bool(_torch.gradient_hooks(parameter))


def successors(old: nn.Module, new: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Which of the new layer's parameters take the place of each parameter of the old one, by name.

    A child of the new layer is named where its parameters belong: under the old weight, and again under the old bias.
    """
    names = dict(new.named_parameters(recurse=False))
    by_id = {id(parameter): name for name, parameter in names.items()}
    staying = {parameter: [by_id[id(parameter)]] for parameter in old.parameters() if id(parameter) in by_id}
    bias = old._parameters.get("bias")
    others = [parameter for parameter in old.parameters() if parameter is not bias]
    of_bias: list[str] = [name for name in ("bias", "location") if name in names]
    children = [name for name, child in new.named_children() if any(True for _ in child.parameters())]
    of_weight = [name for name in names if name not in of_bias] + children
    if bias is None:
        of_weight += of_bias
    result: dict[nn.Parameter, list[str]] = {}
    if others:
        first, *rest = others
        taken = {name for parameter in rest for name in staying.get(parameter, [])}
        result[first] = [name for name in of_weight if name not in taken]
        result.update({parameter: staying.get(parameter, []) for parameter in rest})
    if bias is not None:
        result[bias] = [*of_bias, *children] if others else [*of_weight, *of_bias]
    return result


def empty(old: Any, kind: Any, dtype: torch.dtype, has_bias: bool) -> Any:
    """A layer of the class in the old one's sizes, on the meta device: its tensors are still to be given."""
    if is_linear(old):
        arguments: tuple = (("in_features", old.in_features), ("out_features", old.out_features))
    else:
        arguments = tuple((name, getattr(old, name)) for name in _CONVOLUTION)
    template = _template(kind, arguments, dtype, has_bias)
    made = kind.__new__(kind)
    for name, value in vars(template).items():
        vars(made)[name] = value.copy() if isinstance(value, (dict, set)) else copy.deepcopy(value)
    return made


@functools.lru_cache(maxsize=64)
def _template(kind: Any, arguments: tuple, dtype: torch.dtype, has_bias: bool) -> nn.Module:
    """Layers of one size are made once: a constructor draws initial values, also on the meta device."""
    try:
        return kind(**dict(arguments), bias=has_bias, device="meta", dtype=dtype)
    except TypeError as error:
        came = f"names the class {kind.__name__}, whose constructor {kind.__name__}{inspect.signature(kind)} fails"
        expected = (
            "a class with the constructor of the layer in lcw_ops.nn, or a function from the old layer to the new"
        )
        raise TypeError(describe("convert", "layers", f"{came} ({error})", expected)) from error


# Rows are turned into angles together, up to this many numbers at a time.
_ROWS_AT_ONCE = 2**22


def _build_gmp(pairs: list[tuple[nn.Module, Any]]) -> list[nn.Module | str]:
    """GmP layers of one fan-in, dtype and device. Thousands of small layers are computed in a few calls."""
    results: list[nn.Module | str] = []
    start = 0
    while start < len(pairs):
        stop, numbers = start, 0
        while stop < len(pairs) and (stop == start or numbers < _ROWS_AT_ONCE):
            numbers += applied_weight(pairs[stop][0]).numel()
            stop += 1
        results += _build_some_gmp(pairs[start:stop])
        start = stop
    return results


@torch.no_grad()
def _build_some_gmp(pairs: list[tuple[Any, Any]]) -> list[nn.Module | str]:
    weights = [applied_weight(old) for old, _ in pairs]
    dtype = weights[0].dtype
    if dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        reason = f"angles in {name} are too coarse to keep its function; convert in float32, and use autocast"
        return [reason] * len(pairs)
    made = [empty(old, kind, dtype, old.bias is not None) for old, kind in pairs]
    rows = torch.cat([weight.flatten(1) for weight in weights])
    biases = [old.bias for old, _ in pairs]
    filled = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    try:
        together = coordinates("convert", made[0], rows, torch.cat(filled))
    except ValueError as error:
        if len(pairs) == 1:
            return [f"GmP cannot express it: {error}"]
        return [result for pair in pairs for result in _build_some_gmp([pair])]
    units = [len(weight) for weight in weights]
    per_layer = {name: value.split(units) for name, value in together._asdict().items() if value is not None}
    for index, ((old, _), new) in enumerate(zip(pairs, made, strict=True)):
        for name, values in per_layer.items():
            value = values[index].clone()
            if name in new._buffers:
                new._buffers[name] = value
            else:
                source = old.bias if name == "location" else weights[index]
                new._parameters[name] = nn.Parameter(value, source.requires_grad)
    return list(made)


def _build_lcw(old: Any, kind: Any) -> nn.Module:
    weight = _trained_weight(old)
    made = empty(old, kind, weight.dtype, old.bias is not None)
    made.weight_u = weight
    _give_bias(made, old)
    return made


def _build_weight_norm(old: Any, kind: Any) -> nn.Module:
    normed = weight_norm_tensors(old)
    v = _trained_weight(old) if normed is None else normed.v
    made = empty(old, kind, v.dtype, old.bias is not None)
    made.weight_v = v
    made.weight_g = nn.Parameter(lengths(v), v.requires_grad) if normed is None else normed.g
    _give_bias(made, old)
    return made


def _trained_weight(old: Any) -> nn.Parameter:
    """The weight of a plain layer itself. For another layer, what it applies."""
    weight = old._parameters.get("weight")
    if weight is None:
        applied = applied_weight(old)
        weight = nn.Parameter(applied.detach().clone(), applied.requires_grad)
    return weight


def _give_bias(made: nn.Module, old: Any) -> None:
    bias = old.bias
    if bias is None or isinstance(bias, nn.Parameter):
        made._parameters["bias"] = bias
    else:
        # A GmP layer computes it.
        made._parameters["bias"] = nn.Parameter(bias.detach().clone(), bias.requires_grad)
