"""New layers from old ones. Where both train a tensor of the same kind, the new layer takes the very parameter."""

from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import _torch
from lcw_ops import nn as ours
from lcw_ops.nn._refusals import applied_weight, plain_type, weight_norm_tensors
from lcw_ops.reference import normalize_scale

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


def namesake(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch.nn whose place a layer class of this package takes."""
    for group in (_LCW, _GMP, _WEIGHT_NORM):
        for own, plain in zip(group, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), strict=True):
            if issubclass(kind, own):
                return plain
    return None


def fits(new: type[nn.Module], old: type[nn.Module]) -> bool:
    """Whether the new class can take the place of layers of the old class."""
    plain = namesake(old) or next((p for p in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if issubclass(old, p)), None)
    return plain is not None and namesake(new) is plain


def build(old: nn.Module, target: Any) -> nn.Module | str:
    """The new layer, or the reason why the old one stays."""
    if not isinstance(target, type):
        made = target(old)
        if not isinstance(made, nn.Module):
            raise TypeError(f"convert: the function for {type(old).__name__} returned a {type(made).__name__}; "
                            "expected a module.")
        return made
    if issubclass(target, _GMP):
        return _build_gmp(old, target)
    if issubclass(target, _LCW):
        return _build_lcw(old, target)
    return _build_weight_norm(old, target)


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer applies, plain or one of this package's."""
    if plain_type(layer) is not None and not isinstance(layer, OURS):
        return applied_weight(layer)
    return layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight  # type: ignore


def has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks) or bool(_torch.gradient_hooks(parameter))


def successors(old: nn.Module, new: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Which of the new layer's parameters take the place of each parameter of the old one."""
    names = dict(new.named_parameters(recurse=False))
    by_id = {id(parameter): name for name, parameter in names.items()}
    staying = {parameter: [by_id[id(parameter)]] for parameter in old.parameters() if id(parameter) in by_id}
    bias = old._parameters.get("bias")
    others = [parameter for parameter in old.parameters() if parameter is not bias]
    of_bias = [name for name in ("bias", "location") if name in names]
    of_weight = [name for name in names if name not in of_bias]
    result: dict[nn.Parameter, list[str]] = {}
    if others:
        first, *rest = others
        taken = {name for parameter in rest for name in staying.get(parameter, [])}
        result[first] = [name for name in of_weight if name not in taken]
        result.update({parameter: staying.get(parameter, []) for parameter in rest})
    if bias is not None:
        result[bias] = of_bias
    return result


def _empty(old: Any, kind: type[nn.Module], weight: Tensor) -> Any:
    """A layer of the class in the old one's sizes, without values."""
    options = {"bias": old.bias is not None, "device": "meta", "dtype": weight.dtype}
    if isinstance(old, nn.Linear) or hasattr(old, "in_features"):
        return kind(old.in_features, old.out_features, **options)
    return kind(**{name: getattr(old, name) for name in _CONVOLUTION}, **options)


def _build_gmp(old: nn.Module, kind: Any) -> nn.Module | str:
    weight = plain_weight(old)
    if weight.dtype in (torch.bfloat16, torch.float16):
        return f"angles in {str(weight.dtype).removeprefix('torch.')} are too coarse; convert in float32 and use autocast"
    try:
        return (kind.from_linear if hasattr(kind, "from_linear") else kind.from_conv)(old)
    except ValueError as error:
        return f"GmP cannot express it: {error}"


def _build_lcw(old: Any, kind: Any) -> nn.Module:
    weight = plain_weight(old)
    made = _empty(old, kind, weight)
    trained = "weight_u" if "weight_u" in made._parameters else "weight"
    # A weight norm is given up: its product becomes the parameter.
    is_parameter = isinstance(old._parameters.get("weight"), nn.Parameter)
    made._parameters[trained] = old.weight if is_parameter else nn.Parameter(weight.detach().clone(), weight.requires_grad)
    made._parameters["bias"] = old._parameters.get("bias")
    return made


def _build_weight_norm(old: Any, kind: Any) -> nn.Module:
    normed = weight_norm_tensors(old)
    weight = plain_weight(old)
    made = _empty(old, kind, weight)
    v, g = ("weight_v", "weight_g") if "weight_v" in made._parameters else ("weight", "scale")
    if normed is not None:
        made._parameters[v] = normed.v
        made._parameters[g] = normed.g if g == "weight_g" else nn.Parameter(normed.g.detach().flatten())
    else:
        is_parameter = isinstance(old._parameters.get("weight"), nn.Parameter)
        parameter = old.weight if is_parameter else nn.Parameter(weight.detach().clone(), weight.requires_grad)
        made._parameters[v] = parameter
        lengths = _lengths(weight).view(made._parameters[g].shape)
        made._parameters[g] = nn.Parameter(lengths, weight.requires_grad)
    made._parameters["bias"] = old._parameters.get("bias")
    return made


@torch.no_grad()
def _lengths(weight: Tensor) -> Tensor:
    """||w|| of each unit, as <w, w / ||w||>: no entry is squared, so no length overflows or underflows."""
    rows = weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    return (rows * normalize_scale(rows, rows.new_ones(len(rows)))).sum(1).to(weight.dtype)


