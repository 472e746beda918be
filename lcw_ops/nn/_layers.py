"""The parts that the constrained layers share: LCW, GmP and weight norm.

None of these layers is a subclass of its namesake in torch.nn: code that finds an ``nn.Linear`` writes into its
``weight``, as initialisers and quantizers do. Here ``weight`` is computed, from tensors that have names of their own.
"""

import os
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lcw_ops import _torch
from lcw_ops._checks import accumulation_dtype, check_dense, check_shape, describe
from lcw_ops._layer_kinds import plain_kind
from lcw_ops.nn._refusals import applied_weight, refusal

Layer = TypeVar("Layer", bound=nn.Module)

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# The constructor's arguments of a convolution, apart from the bias.
_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class ConstrainedLayer(nn.Module):
    """A layer whose ``weight`` is what it applies, computed from tensors of other names, which it trains.

    A subclass defines ``_weight`` and ``_set_weight``. Every reading of ``weight`` gives a new tensor,
    through which gradients flow to the trained tensors. An edit of that tensor in place changes no output.
    """

    # State dicts of version 1 had the trained tensors under the names "weight" and "scale".
    _version = 2

    # The class in torch.nn in whose place the layer stands.
    _plain: ClassVar[Any]

    # Keys of other layers' state dicts that `_translate` understands.
    _FOREIGN: ClassVar[tuple[str, ...]] = ("weight",)

    # torch.jit.trace compiles the other properties of a module.
    __jit_unused_properties__ = ("weight", "bias")

    @property
    def weight(self) -> Tensor:
        """The weight that is applied, in the shape of the plain layer's."""
        return self._weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._set_weight(value)

    def effective_weight(self) -> Tensor:
        """The same as ``weight``."""
        return self.weight

    def _weight(self) -> Tensor:
        raise NotImplementedError

    def _set_weight(self, weight: Tensor) -> None:
        """Set the trained tensors so that the layer applies this weight, or the nearest one that it can express."""
        raise NotImplementedError

    def _translate(self, foreign: dict[str, Any], missing: list[str]) -> dict[str, Tensor]:
        """The layer's own entries of a state dict, from another layer's (see ``_FOREIGN``).

        Entries that it uses are taken out of ``foreign``; names of those that it misses are appended to ``missing``.

        Raises TypeError or ValueError if the layer cannot express them.
        """
        raise NotImplementedError

    def _trained(self) -> list[str]:
        """The names in the layer's own state dict, apart from the bias."""
        return [name for name in (*self._parameters, *self._buffers) if name != "bias"]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter before it looked for a property.
        if name in ("weight", "bias") and isinstance(getattr(type(self), name, None), property):
            if _torch.is_swapping_tensors():
                came = f"is given {name}, which the layer computes"
                expected = f"the names of the tensors that it trains: {', '.join(dict(self.named_parameters()))}"
                raise TypeError(describe("functional_call", type(self).__name__, came, expected))
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _check_assigned(self, name: str, value: object, shape: tuple[int, ...]) -> Tensor:
        """The assigned value, without its history."""
        function = type(self).__name__
        if not isinstance(value, Tensor):
            raise TypeError(describe(function, name, f"is set to a {type(value).__name__}", "a tensor"))
        accumulation_dtype(function, **{name: value})
        check_dense(function, **{name: value})
        check_shape(function, name, value, tuple(value.shape) == shape, str(shape))
        return value.detach()

    def _store(self, **tensors: Tensor) -> None:
        """Copy the tensors into parameters and buffers, or assign them to torch's parametrizations of these."""
        for name in tensors:
            if name not in self._parameters and name not in self._buffers and not is_parametrized(self, name):
                came = f"is computed from {name}, which is computed itself (pruned, or set by a hook)"
                expected = "a layer that holds what it trains"
                raise ValueError(describe(type(self).__name__, "the tensor that is assigned", came, expected))
        for name, value in tensors.items():
            if is_parametrized(self, name):
                setattr(self, name, value)
            else:
                getattr(self, name).copy_(value)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # The hooks may rename keys, so they come before the translation.
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            for hook in hooks.values():
                hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            state_dict = self._in_own_names(state_dict, prefix, missing_keys, error_msgs)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._load_state_dict_pre_hooks = hooks

    @torch.no_grad()
    def _in_own_names(self, state_dict: dict, prefix: str, missing_keys: list[str], error_msgs: list[str]) -> dict:
        """The state dict of another layer in the names of this one. One of this layer as it is."""
        foreign = {name: state_dict[prefix + name] for name in self._FOREIGN if prefix + name in state_dict}
        if not foreign or any(prefix + name in state_dict for name in self._trained()):
            return state_dict
        left, missing = dict(foreign), list[str]()
        try:
            own = self._translate(left, missing)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
            # The layer's own tensors, so that the error is the only one.
            own, left = {name: getattr(self, name) for name in self._trained() if hasattr(self, name)}, {}
        missing_keys.extend(prefix + name for name in missing)
        used = {prefix + name for name in foreign.keys() - left.keys()}
        others = {key: value for key, value in state_dict.items() if key not in used}
        return others | {prefix + name: value for name, value in own.items() if value is not None}

    def __prepare_scriptable__(self) -> "ConstrainedLayer":
        expected = "torch.compile or torch.export, or a plain layer made by lcw_ops.fold"
        raise TypeError(describe("torch.jit.script", type(self).__name__, "calls a function in Python", expected))


class Convolution(ConstrainedLayer):
    """A constrained convolution with torch's arguments and torch's forward pass."""

    # The function of the torch layer that pads and convolves; see also _plain.
    _conv_forward: Callable[..., Tensor]

    kernel_size: tuple[int, ...]
    transposed = False

    def __init__(self, plain: Any) -> None:
        super().__init__()
        for name in (*_ARGUMENTS, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(plain, name))
        self._filter_shape = tuple(plain.weight.shape[1:])

    @property
    def output_padding(self) -> tuple[int, ...]:
        """(0, ...): only transposed convolutions have another value."""
        return (0,) * len(self.kernel_size)

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict:
        return {name: getattr(layer, name) for name in _ARGUMENTS}

    def _has_bias(self) -> bool:
        return self._parameters.get("bias") is not None

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in (*_ARGUMENTS, "output_padding")}
        shown = types.SimpleNamespace(**values, bias=True if self._has_bias() else None)
        return nn.modules.conv._ConvNd.extra_repr(cast(Any, shown))

    def __setstate__(self, state: dict) -> None:
        # Older versions kept these; they are computed now.
        for name in ("_arguments", "transposed", "output_padding"):
            state.pop(name, None)
        super().__setstate__(state)


def rename_parameters(state: dict, names: dict[str, str]) -> None:
    """Give the parameters in a pickled module's state the names of today, in the same order."""
    state["_parameters"] = {names.get(name, name): value for name, value in state["_parameters"].items()}


def empty_to_buffer(state: dict, name: str) -> None:
    """Make an empty parameter in a pickled module's state a buffer, which version 0.1.0 had as a parameter."""
    parameter = state["_parameters"].get(name)
    if parameter is not None and parameter.numel() == 0 and parameter.shape[1:].numel() == 0:
        del state["_parameters"][name]
        state["_buffers"] = {name: parameter.detach(), **state["_buffers"]}


def warn_caller(message: str) -> None:
    """A UserWarning at the first line that is neither here nor in torch: the one that assigns or loads."""
    here = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def sums_to_zero(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether each row (n, m), in float64, sums to zero up to the roundings of a constrained weight of this dtype.

    These are one rounding in each entry, and that of the mean, which is taken in float32. A mean that was many times
    larger than what it left makes an error of many units in the last place.
    """
    accumulated_in = torch.promote_types(dtype, torch.float32)
    tolerance = torch.finfo(dtype).eps + 64 * torch.finfo(accumulated_in).eps
    return not (rows.sum(1).abs() > tolerance * rows.abs().sum(1)).any()


def in_format_of(weight: Tensor, parameter: Tensor) -> Tensor:
    """The weight in the memory format of the parameter from which it was computed."""
    # A proxy of torch.fx has no layout yet, and an exported program cannot depend on one.
    if not isinstance(parameter, Tensor) or _torch.is_exporting():
        return weight
    memory_format = memory_format_of(parameter)
    return weight if memory_format is torch.contiguous_format else laid_out(weight, memory_format)


def laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor in this memory format, with the strides that torch's own conversion gives it."""
    if memory_format is torch.contiguous_format:
        return tensor.contiguous()
    if memory_format_of(tensor) is memory_format:
        return tensor
    # Not contiguous(memory_format=...): vmap has no rule for it, and it leaves the strides of filters of size 1.
    return tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """The layout that torch's convolutions read off the strides. Filters of size 1 are contiguous in both layouts."""
    if tensor.dim() not in CHANNELS_LAST or tensor.numel() == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if tensor.stride(dim) < least or (dim == 0 and least == tensor.stride(1)):
            return torch.contiguous_format
        least = tensor.stride(dim) * tensor.shape[dim]
    return CHANNELS_LAST[tensor.dim()]


def are_per_unit(rows: Tensor, *vectors: Tensor) -> bool:
    """Whether each vector has one number per row, in the rows' dtype. torch would broadcast or cast other vectors.

    True for the proxies of torch.fx, which have no shape yet.
    """
    return not isinstance(rows, Tensor) or all(
        vector.shape == rows.shape[:1] and vector.dtype == rows.dtype for vector in vectors
    )


def check_fan_in(module: nn.Module, fan_in: int) -> None:
    if fan_in < 1:
        expected = "at least 1, because a unit without inputs has no direction"
        raise ValueError(describe(type(module).__name__, "a unit", f"has {fan_in} inputs", expected))


@torch.enable_grad()
def applied_parameters(function: str, layer: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weight that a layer applies and its bias. Both keep requires_grad.

    The layer is a plain one of this kind, or one of ours that stands in for it. ValueError if its output does not
    follow from weight and bias alone.
    """
    if not issubclass(plain_kind(layer), kind):
        raise TypeError(describe(function, "layer", f"is a {type(layer).__name__}", f"a torch.nn.{kind.__name__}"))
    if getattr(layer, "activation", None) is not None and isinstance(layer, ConstrainedLayer):
        came = f"is a {type(layer).__name__} with an activation"
        raise ValueError(describe(function, "layer", came, "a layer without one, because the activation would be lost"))
    reason = refusal(layer)
    if reason is not None:
        raise ValueError(
            describe(function, "layer", f"cannot be replaced: {reason}", "a layer that applies its weight")
        )
    applied: Any = layer
    return applied_weight(layer), applied.bias


def make_empty(kind: type[Layer], *arguments, **options) -> Layer:
    """A layer whose parameters are uninitialised."""
    return cast(Layer, nn.utils.skip_init(kind, *arguments, **options))
