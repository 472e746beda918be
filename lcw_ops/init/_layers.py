"""How a drawn weight gets into a layer: directly, through a parametrization, or through one of our constraints.

A layer takes a drawn weight only if it applies this weight afterwards. Spectral norm, for example, divides it.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lcw_ops._checks import describe
from lcw_ops._layer_kinds import CONVOLUTIONS, is_conv, is_linear, plain_kind
from lcw_ops._memory import sharing
from lcw_ops.init._inputs import TRANSPOSED

KINDS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


class CannotTake(Exception):
    """A layer cannot take a drawn tensor, for this reason."""


def find_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The linear and convolution layers, plain ones and ours, with their names, in the order of model.modules()."""
    return {
        layer: name
        for name, layer in model.named_modules()
        if is_linear(layer) or is_conv(layer) or isinstance(layer, TRANSPOSED)
    }


def foreign_parameters(layers: Iterable[nn.Module], others: Iterable[nn.Module]) -> set[int]:
    """The ids of the layers' parameters that share memory with parameters of other modules, or are the same."""
    own = [parameter for layer in layers for parameter in layer.parameters()]
    theirs = [parameter for module in others for parameter in module._parameters.values() if parameter is not None]
    ids = {id(parameter) for parameter in theirs}
    shared = sharing([*own, *theirs])
    return {id(one) for one in own if any(id(other) in ids for other in shared[id(one)])}


def has_foreign_weight(layer: nn.Module, foreign: set[int]) -> bool:
    """Whether a parameter other than the bias is one of these."""
    bias = layer._parameters.get("bias")
    return any(id(parameter) in foreign for parameter in layer.parameters() if parameter is not bias)


def is_uninitialised(layer: nn.Module) -> bool:
    """Whether it is a lazy module that has not been called yet."""
    tensors: Any = (*layer._parameters.values(), *layer._buffers.values())
    return any(is_lazy(tensor) for tensor in tensors)


def refusals(names: dict[str, str]) -> ValueError:
    """The error for layers, by name, with the reason for each of them."""
    came = "has layers that cannot take a drawn weight: "
    came += ", ".join(f"{name or 'the model itself'} ({reason})" for name, reason in names.items())
    remedy = "Fill the model first, and constrain or prune it afterwards."
    return ValueError(describe("lps_model_", "model", came, "layers that can apply any weight", remedy))


def reason_against(layer: nn.Module) -> str | None:
    """Why no drawn weight or bias can be given to this layer, or None if it may be possible."""
    for name in ("weight", "bias"):
        reason = _reason_against(layer, name)
        if reason:
            return reason
    if hasattr(type(layer), "_plain") or is_uninitialised(layer):
        return None
    forward = _torch_class(layer).forward
    if type(layer).forward is forward and "forward" not in vars(layer):
        return None
    return _reason_against_forward(layer)


def has_bias(layer: Any) -> bool:
    """Whether the layer adds a bias. One of ours with a ReLU and negative radii has one, and refuses to give it."""
    try:
        return layer.bias is not None
    except ValueError:
        return True


def prepare(layer: nn.Module) -> bool:
    """Overwrite the tensors that a property computes the weight from. Returns whether the rows then sum to zero.

    The numbers are arbitrary ones from 0.5 to 1.5. If all rows of the computed weight have the sum zero, the constraint
    is the reason. Nor can the earlier numbers, which may be uninitialised, spoil the drawn ones.
    """
    for name in ("weight", "bias"):
        hook = _weight_norm(layer, name)
        if hook is not None:
            # The attribute may be stale, even in another dtype: the hook computes it only before a forward pass.
            setattr(layer, name, hook.compute_weight(layer))
    if not _is_property(layer, "weight"):
        return False
    generator = torch.Generator().manual_seed(0)
    for tensor in _trained_tensors(layer, "weight"):
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        tensor.copy_(noise)
    weight: Any = layer.weight
    rows = rows_of(layer, weight).double()
    # Each entry of a constrained row was rounded, and so were the sums for its mean, which are in float32 at least.
    accumulated = torch.promote_types(weight.dtype, torch.float32)
    tolerance = torch.finfo(weight.dtype).eps + 64 * torch.finfo(accumulated).eps
    return not weight.is_meta and bool((rows.sum(1).abs() <= tolerance * rows.abs().sum(1)).all())


def assign(layer: Any, name: str, value: Tensor) -> None:
    """Make the layer's weight or bias this tensor, of its shape, dtype and device.

    Raises CannotTake if the layer applies another one afterwards.
    """
    own = layer._parameters.get(name)
    if own is not None:
        own.copy_(value)
        return
    try:
        if _is_property(layer, name):
            # A parametrization may keep the tensor itself.
            setattr(layer, name, value.clone())
        else:
            hook = _weight_norm(layer, name)
            getattr(layer, f"{name}_v").copy_(value)
            getattr(layer, f"{name}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
            setattr(layer, name, hook.compute_weight(layer))
        applied = getattr(layer, name)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CannotTake(f"its {name} cannot be set: {error}") from error
    if applied.shape != value.shape:
        raise CannotTake(f"its {name} becomes a tensor of shape {tuple(applied.shape)}")
    if not value.is_meta and not _is_near(rows_of(layer, applied), rows_of(layer, value)):
        raise CannotTake(f"its {name} becomes another one than the one that it is set to")


def rows_of(layer: Any, tensor: Tensor) -> Tensor:
    """(units, inputs of a unit) of a weight, or (units, 1) of a bias."""
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    if not isinstance(layer, TRANSPOSED):
        return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    groups, inputs, outputs = layer.groups, tensor.shape[0] // layer.groups, tensor.shape[1]
    by_group = tensor.reshape(groups, inputs, outputs, *tensor.shape[2:]).transpose(1, 2)
    return by_group.reshape(groups * outputs, inputs * math.prod(tensor.shape[2:]))


def weight_of(layer: Any, rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`rows_of`, in the shape and dtype of the other weight, and on its device."""
    if isinstance(layer, TRANSPOSED):
        groups, inputs, outputs = layer.groups, like.shape[0] // layer.groups, like.shape[1]
        rows = rows.reshape(groups, outputs, inputs, *like.shape[2:]).transpose(1, 2)
    return rows.reshape(like.shape).to(like)


class Snapshot:
    """All tensors of some layers of a model, and its lazy modules, and a way back to them."""

    def __init__(self, model: nn.Module, layers: dict[nn.Module, str]) -> None:
        modules = [module for layer in layers for module in layer.modules()]
        self._buffers = [(module, dict(module._buffers)) for module in modules]
        self._computed = [
            (layer, name, vars(layer)[name]) for layer in layers for name in ("weight", "bias") if name in vars(layer)
        ]
        tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
        self._values = [
            (tensor, tensor.detach().clone()) for tensor in tensors if tensor is not None and not is_lazy(tensor)
        ]
        self._lazy = [_LazySnapshot(module) for module in model.modules() if is_uninitialised(module)]

    @torch.no_grad()
    def restore(self) -> None:
        for module, buffers in self._buffers:
            module._buffers.update(buffers)
        for layer, name, tensor in self._computed:
            setattr(layer, name, tensor)
        for tensor, value in self._values:
            tensor.copy_(value)
        for snapshot in self._lazy:
            snapshot.restore()


class _LazySnapshot:
    """A lazy module. Its first call makes tensors of what are none yet, removes hooks, and changes its class."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._attributes = dict(vars(module))
        # The handles of hooks refer to these dictionaries, so they are restored in place.
        self._dictionaries = [(value, dict(value)) for value in self._attributes.values() if isinstance(value, dict)]
        tensors: Any = (*module._parameters.values(), *module._buffers.values())
        self._tensors: list[Any] = [(tensor, type(tensor)) for tensor in tensors if is_lazy(tensor)]

    def restore(self) -> None:
        self._module.__class__ = self._class
        vars(self._module).clear()
        vars(self._module).update(self._attributes)
        for dictionary, content in self._dictionaries:
            dictionary.clear()
            dictionary.update(content)
        for tensor, kind in self._tensors:
            if not is_lazy(tensor):
                tensor.data = tensor.data.new_empty(0)
                tensor.__class__ = kind


def _reason_against(layer: nn.Module, name: str) -> str | None:
    if name in layer._parameters:
        return None
    if parametrize.is_parametrized(layer, name):
        constraints: Any = layer.parametrizations[name]  # type: ignore[index]
        for constraint in constraints:
            if not hasattr(constraint, "right_inverse"):
                return f"its {name} has the parametrization {type(constraint).__name__}, which has no right_inverse"
        return None
    # The tensors of torch.nn.utils.prune, which is not imported here because ``import torch`` does not need it.
    if f"{name}_orig" in layer._parameters and f"{name}_mask" in layer._buffers:
        return f"its {name} is pruned"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return f"spectral norm divides its {name}"
    if _is_property(layer, name) or _weight_norm(layer, name) is not None:
        return None
    return f"its {name} is not a parameter"


def _reason_against_forward(layer: nn.Module) -> str | None:
    """Whether a layer of the user's own class applies its weight and bias, tried out on a copy with other weights."""
    forward = _torch_class(layer).forward
    try:
        other: Any = copy.deepcopy(layer).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in other.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        weight = other.weight
        if is_linear(layer):
            shape: tuple[int, ...] = (2, other.in_features)
        else:
            margins = getattr(other, "_reversed_padding_repeated_twice", [0])
            sizes = zip(other.kernel_size, other.dilation, strict=True)
            spatial = [dilation * (size - 1) + 2 + max(margins) for size, dilation in sizes]
            shape = (2, other.in_channels, *spatial)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)
        expected = forward(other, x)
        output = other.forward(x)
        same_shape = isinstance(output, Tensor) and output.shape == expected.shape
        if same_shape and (weight.is_meta or _is_near(output.reshape(1, -1), expected.reshape(1, -1))):
            return None
    except Exception as error:
        # The forward pass is the user's, and may fail in any way.
        return f"it has a forward pass of its own, which fails on a tensor alone: {error}"
    return "it has a forward pass of its own, which does not apply its weight and bias"


def _torch_class(layer: nn.Module) -> Any:
    """The class of torch.nn that defines what the layer should compute."""
    return next(kind for kind in plain_kind(layer).__mro__ if kind in KINDS)


def _is_property(layer: nn.Module, name: str) -> bool:
    """Whether the tensor is computed at every reading: torch parametrizes in this way, and so do our layers."""
    return isinstance(getattr(type(layer), name, None), property)


def _trained_tensors(layer: nn.Module, name: str) -> list[Tensor]:
    """The tensors that setting the property determines."""
    if parametrize.is_parametrized(layer, name):
        owner: Any = layer.parametrizations[name]  # type: ignore[index]
        tensors = {**owner._parameters, **owner._buffers}
    else:
        tensors = {own: tensor for own, tensor in layer._parameters.items() if own != "bias"}
    return [tensor for tensor in tensors.values() if tensor is not None and tensor.is_floating_point()]


def _weight_norm(layer: nn.Module, name: str) -> Any:
    """The hook by which torch's older weight norm computes this tensor, or None."""
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, WeightNorm) and hook.name == name), None)


def _is_near(rows: Tensor, expected: Tensor) -> bool:
    """Whether rows differ only by the rounding of a constraint.

    A norm of m entries and the division by it are wrong by a few units in the last place. Angles are the worst case:
    each of m is rounded, and up to pi, which turns a row by up to sqrt(m) pi / 2 of them. A tensor that a constraint
    cannot express is far off. At 16 bits and thousands of inputs the bound would exceed a quarter, our limit.
    """
    tolerance = min(0.25, (8 + 4 * math.sqrt(rows.shape[1])) * torch.finfo(rows.dtype).eps)
    error, length = (rows.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
    return bool((error <= tolerance * length).all())
