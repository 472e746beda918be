"""Which layers of a model can be replaced, and the weight that such a layer applies.

A replacement takes over a layer's weight and bias, and nothing else. So a layer qualifies only if its output depends on
these two alone: it runs torch's own forward pass, and its weight is a parameter or follows from torch's weight norm.
"""

import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lcw_ops import _torch
from lcw_ops._checks import FLOATING

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The parts of a plain layer that compute its output. A class or an instance that replaces one computes something else.
_COMPUTING = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")

# A subclass may define these without computing anything else. An annotation of ``weight`` is in ``__annotations__``. A
# class attribute of that name, a property for instance, would hide the parameter.
_HARMLESS = {
    "__init__",
    "__module__",
    "__doc__",
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__constants__",
    "__firstlineno__",
    "__qualname__",
    "__static_attributes__",
    "extra_repr",
    "reset_parameters",
}

_PRUNED = "it is pruned; make the pruning permanent first, with torch.nn.utils.prune.remove"


class WeightNormTensors(NamedTuple):
    """The two parameters of torch's weight norm: g, one length per unit, and v, in the weight's shape."""

    g: nn.Parameter
    v: nn.Parameter


def plain_type(layer: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that the layer is an instance of: nn.Linear or nn.Conv1d, 2d, 3d; None for another."""
    return next((plain for plain in PLAIN if isinstance(layer, plain)), None)


def refusal(layer: nn.Module) -> str | None:
    """The reason why a layer, plain or of this package, cannot be replaced; None if it can.

    The reason is a clause about the layer ("it is pruned").
    """
    if hasattr(type(layer), "_plain"):
        return _refusal_of_ours(layer)
    plain = plain_type(layer)
    if plain is None:
        return "its type is neither nn.Linear nor nn.Conv1d, nn.Conv2d or nn.Conv3d"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) or any(map(is_lazy, layer.parameters(recurse=False))):
        return "it is lazy and has no weight yet; run the model once"
    return _refusal_of_class(layer, plain) or _refusal_of_constraints(layer) or _refusal_of_tensors(layer)


def weight_norm_tensors(layer: nn.Module) -> WeightNormTensors | None:
    """g and v of a layer with torch's weight norm along dim 0, as a parametrization or as a hook; None for another."""
    if parametrize.is_parametrized(layer, "weight"):
        constraints: Any = layer.parametrizations["weight"]  # type: ignore[index]
        if len(constraints) == 1 and _is_weight_norm(constraints[0]) and constraints[0].dim == 0:
            return WeightNormTensors(constraints.original0, constraints.original1)
        return None
    hooks = [hook for _, hook in weight_norm_hooks(layer)]
    if len(hooks) == 1 and hooks[0].name == "weight" and hooks[0].dim == 0:
        tensors = [layer._parameters.get(name) for name in ("weight_g", "weight_v")]
        if None not in tensors:
            return WeightNormTensors(*tensors)  # type: ignore[arg-type]
    return None


def weight_norm_hooks(layer: nn.Module) -> list[tuple[int, WeightNorm]]:
    """The hooks by which ``torch.nn.utils.weight_norm`` computes a layer's tensors, with their keys."""
    return [(key, hook) for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, WeightNorm)]


def applied_weight(layer: nn.Module) -> Tensor:
    """The weight that the layer's next call applies, differentiable.

    The hook of torch's older weight norm renews the attribute ``weight`` in every call. After ``load_state_dict`` or an
    optimizer's step, the attribute is therefore stale until the next call, and it is computed from g and v here.
    """
    hooks = [hook for _, hook in weight_norm_hooks(layer) if hook.name == "weight"]
    weight: Tensor = hooks[0].compute_weight(layer) if hooks else layer.weight  # type: ignore[assignment]
    return weight


def base_of_ours(layer: nn.Module) -> type[nn.Module]:
    """The class of this package that the layer is an instance of; a user's subclass may be in front of it."""
    return next(base for base in type(layer).__mro__ if base.__module__.startswith("lcw_ops."))


def _refusal_of_ours(layer: nn.Module) -> str | None:
    kind: Any = base_of_ours(layer)
    if type(layer).forward is not kind.forward or "forward" in vars(layer):
        return "it has a forward of its own"
    expected = {
        name
        for base in kind.__mro__
        if base.__module__.startswith("lcw_ops.")
        for name in inspect.get_annotations(base)
    }
    if getattr(layer, "basis", None) is not None:
        expected -= {"weight_u" if layer.basis else "weight_v"}
    return (
        _refusal_of_class(layer, kind)
        or refusal_of_computed_tensors(layer)
        or refusal_of_more(layer, expected, "its class's tensors")
    )


def refusal_of_computed_tensors(layer: nn.Module) -> str | None:
    """Why a module of this package, whose tensors a parametrization or a hook computes, stays as it is."""
    if parametrize.is_parametrized(layer):
        constrained: Any = layer.parametrizations
        names = [type(constraint).__name__ for name in constrained for constraint in constrained[name]]
        return f"parametrizations compute its tensors {', '.join(constrained)} ({', '.join(names)})"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _pruning_methods()):
            return _PRUNED
        if isinstance(hook, (SpectralNorm, WeightNorm)):
            return f"a hook of {type(hook).__name__} computes its tensor {hook.name}"
    return None


def refusal_of_more(layer: nn.Module, expected: set[str], what: str) -> str | None:
    others = {*layer._parameters, *layer._buffers, *layer._modules} - expected - {"parametrizations"}
    return f"it holds more than {what}: {', '.join(sorted(others))}" if others else None


def _refusal_of_class(layer: nn.Module, plain: type[nn.Module]) -> str | None:
    kind: type = parametrize.type_before_parametrizations(layer)
    for name in _COMPUTING:
        if getattr(kind, name, None) is not getattr(plain, name, None):
            return f"its class {kind.__name__} has a {name} of its own"
        if name in vars(layer):
            return f"its {name} has been replaced"
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return "it has been compiled; convert the model first"
    own = {name for base in kind.__mro__[: kind.__mro__.index(plain)] for name in vars(base)} - _HARMLESS
    if own:
        return f"its class {kind.__name__} has members that a replacement lacks: {', '.join(sorted(own))}"
    return None


def _refusal_of_constraints(layer: nn.Module) -> str | None:
    if parametrize.is_parametrized(layer):
        constrained: Any = layer.parametrizations
        names = [type(constraint).__name__ for name in constrained for constraint in constrained[name]]
        if list(constrained) != ["weight"]:
            return f"parametrizations compute its tensors {', '.join(constrained)} ({', '.join(names)})"
        if len(names) != 1 or not _is_weight_norm(constrained["weight"][0]):
            return f"its weight has the parametrization {', '.join(names)}, which a replacement would drop"
        if constrained["weight"][0].dim != 0:
            return "its weight norm is not along dim 0"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            return "it has spectral norm, which a replacement would drop"
        if isinstance(hook, _pruning_methods()):
            return _PRUNED
        if isinstance(hook, WeightNorm) and (hook.name != "weight" or hook.dim != 0):
            return "its weight norm is not of its weight along dim 0"
    return None


def _refusal_of_tensors(layer: nn.Module) -> str | None:
    expected = {"weight", "bias"}
    normed = weight_norm_tensors(layer)
    if normed is not None:
        expected = {"weight_g", "weight_v", "bias"} if weight_norm_hooks(layer) else {"bias"}
    elif not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is not a parameter, and nothing known computes it"
    if "bias" not in layer._parameters:
        return "its bias is neither a parameter nor None"
    if reason := refusal_of_more(layer, expected, "a weight and a bias"):
        return reason
    tensors = [layer._parameters[name] for name in layer._parameters] if normed is None else [*normed, layer.bias]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (reason := _refusal_of_tensor(tensor)):
            return reason
    weight: Any = layer.weight if normed is None else normed.v
    shape = tuple(weight.shape)
    if shape != _shape_by_attributes(layer):
        return f"its weight has shape {shape}, but its sizes say {_shape_by_attributes(layer)}"
    if 0 in shape[1:]:
        return "a unit has no inputs"
    return None


def _refusal_of_tensor(tensor: Tensor) -> str | None:
    kind = type(tensor.data)
    if kind is not Tensor:
        return f"a parameter of it is a {kind.__name__}; convert the model before its parameters are"
    if tensor.dtype not in FLOATING:
        return f"its dtype is {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"a parameter of it is {str(tensor.layout).removeprefix('torch.')}"
    return None


def _shape_by_attributes(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def _pruning_methods() -> tuple[type, ...]:
    """The class of torch's pruning hooks. ``import torch`` does not import it, so without it there are no hooks."""
    prune = sys.modules.get("torch.nn.utils.prune")
    return () if prune is None else (prune.BasePruningMethod,)


def _is_weight_norm(constraint: object) -> bool:
    return isinstance(constraint, _torch.WeightNormParametrization)
