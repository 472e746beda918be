"""Which dimension of a module's output holds the units, and the figures that depend on it.

The units' dimension follows the module that produced the tensor: channels of a convolution are dimension 1, features of
a linear layer the last one. A module that passes units on (an activation, Identity, a block) has those of its input.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lcw_ops import _torch
from lcw_ops._layer_kinds import is_conv, is_linear, plain_kind
from lcw_ops.nn import InputMeanNorm
from lcw_ops.profile.activations import MODULES, Flat

_UNITS_LAST = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_UNITS_SECOND = (_torch.BatchNormalization, nn.GroupNorm, InputMeanNorm)

# Instance norms take a single sample without a batch too; its dimensions.
_SINGLE_SAMPLE = ((nn.InstanceNorm1d, 2), (nn.InstanceNorm2d, 3), (nn.InstanceNorm3d, 4))

NO_LINEAR_LAYER = "it is not a linear layer"

# The number of tensors whose units are remembered: a branch of a block may be read that many modules later.
_REMEMBERED = 64


class Units(NamedTuple):
    """The shape of a tensor, the dimension of its units, and the step in memory from one unit to the next."""

    shape: torch.Size
    dim: int
    stride: int

    @classmethod
    def of(cls, tensor: Tensor, dim: int) -> "Units":
        return cls(tensor.shape, dim, tensor.stride(dim))

    @property
    def count(self) -> int:
        return self.shape[self.dim]

    def of_view(self, view: Tensor) -> "Units":
        """The same units in a view, whose dimensions may be permuted."""
        if view.dim() == len(self.shape) and self._is_at(view, self.dim):
            return self
        places = [dim for dim in range(view.dim()) if self._is_at(view, dim)]
        return Units.of(view, places[0]) if len(places) == 1 else self

    def _is_at(self, view: Tensor, dim: int) -> bool:
        return view.shape[dim] == self.count and view.stride(dim) == self.stride


class UnitAxes:
    """Finds the units' dimension of outputs in the order in which modules are called."""

    def __init__(self) -> None:
        # By storage: views and in-place results have their tensor's units. The reference keeps the key unique.
        self._known: OrderedDict[int, tuple[object, Units]] = OrderedDict()
        self._latest: tuple[Tensor, Units] | None = None

    def dimension(
        self, module: nn.Module | None, kind: "ModuleKind | None", input: Tensor | None, output: Tensor
    ) -> int:
        """The units' dimension of ``output``, which ``module`` (None: a function) has just computed from ``input``."""
        rule = None if kind is None else kind.unit_dim
        dim = self._inherited(input, output) if rule is None else rule(module, output)
        reference = _torch.storage_reference(output)
        if reference is not None:
            known = self._known
            self._latest = output, Units.of(output, dim)
            known[reference.cdata] = reference, self._latest[1]
            known.move_to_end(reference.cdata)
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        return dim

    def forget_latest(self) -> None:
        """Let the latest output go."""
        self._latest = None

    def _inherited(self, input: Tensor | None, output: Tensor) -> int:
        latest = self._latest
        if latest is not None and latest[0] is input and _has(output, latest[1]):
            # The usual case: an activation function after a layer.
            return latest[1].dim
        reference = None if input is None else _torch.storage_reference(input)
        known = None if reference is None else self._known.get(reference.cdata)
        of_input = None if known is None else known[1].of_view(input)
        if of_input is not None and _has(output, of_input):
            return of_input.dim
        sources = [units for _, units in reversed(self._known.values())]
        if of_input is not None:
            sources = [of_input, *sources]
        elif input is not None and (dim := _resembling(input, sources)) is not None:
            # A plain function such as torch.cat has made the input.
            sources = [Units.of(input, dim), *sources]
            if _has(output, sources[0]):
                return dim
        if (dim := _resembling(output, sources)) is not None:
            return dim
        # The same place first: in square images the number of units alone does not tell the dimension.
        for units in sources:
            if _has(output, units):
                return units.dim
        for units in sources:
            places = [dim for dim in range(1, output.dim()) if output.shape[dim] == units.count]
            if len(places) == 1:
                return places[0]
        return 1 if output.dim() > 3 else output.dim() - 1


def _has(output: Tensor, units: Units) -> bool:
    """Whether the output has as many dimensions, and as many units at the same place."""
    return output.dim() == len(units.shape) and output.shape[units.dim] == units.count


def _resembling(tensor: Tensor, sources: list[Units]) -> int | None:
    """The units' dimension of a source of the same shape, or of one that differs only in the number of its units."""

    def others(shape: torch.Size, dim: int) -> tuple[int, ...]:
        return shape[:dim] + shape[dim + 1 :]

    for units in sources:
        if tensor.shape == units.shape:
            return units.dim
    for units in sources:
        if tensor.dim() == len(units.shape) and others(tensor.shape, units.dim) == others(units.shape, units.dim):
            return units.dim
    return None


class ModuleKind(NamedTuple):
    """Facts about a module's class. They are asked once per class, because that takes as long as a small op.

    Attributes:
        unit_dim: the units' dimension of (module, output) if the class decides it, else None.
        no_angle: why there is no shift angle; None for linear layers that apply their ``weight``.
        activation: the activation function of a module of torch, see ``activations.MODULES``; None for others.
    """

    unit_dim: Callable[[Any, Tensor], int] | None
    no_angle: str | None
    activation: Callable[[Any], tuple[bool, Flat]] | None

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleKind":
        return cls(_unit_dim(module), _no_angle(module), MODULES.get(type(module)))


def _unit_dim(module: nn.Module) -> Callable[[Any, Tensor], int] | None:
    if is_linear(module) or isinstance(module, _UNITS_LAST):
        return lambda module, output: output.dim() - 1
    if is_conv(module) or isinstance(module, _torch.Convolution):
        # Before the positions: an input without a batch has one dimension fewer.
        return lambda module, output: output.dim() - 1 - len(module.kernel_size)
    if isinstance(module, _UNITS_SECOND):
        return lambda module, output: 0 if _is_single_sample(module, output) else 1
    return None


def _is_single_sample(module: nn.Module, output: Tensor) -> bool:
    return any(isinstance(module, kind) and output.dim() == dims for kind, dims in _SINGLE_SAMPLE)


def _no_angle(module: nn.Module) -> str | None:
    if not is_linear(module):
        return NO_LINEAR_LAYER
    # A subclass may compute with another weight than the stored one.
    kind = type(module).__bases__[0] if is_parametrized(module) else plain_kind(module)
    return None if kind is nn.Linear else "its class may apply another weight than the stored one"


def no_mean_input(input: Tensor | None) -> str | None:
    """Why the input of a linear layer has no mean over samples; None if it has one."""
    if input is None or input.dim() < 2:
        return "its input has no samples to average over"
    return None if input.is_floating_point() else "its input is not real"


def root_mean_square(values: Tensor) -> Tensor:
    """The rms over the last dimension, in float64."""
    return values.double().square().mean(-1).sqrt()


def mean_input_angle(projection: Tensor, weight: Tensor, mean_input: Tensor) -> Tensor:
    """By how many degrees the angle of a weight vector to the mean input differs from 90: rms over units.

    NaN if the mean input is zero. This difference shifts the activation: T. Kutsuna, "Linearly Constrained Weights",
    ECML PKDD 2019, arXiv 2403.13833. ``projection`` (..., N) = ``weight`` (..., N, K) times ``mean_input`` (..., K).
    """
    cosine = projection / (weight.norm(dim=-1) * mean_input.norm(dim=-1, keepdim=True))
    return root_mean_square(torch.rad2deg(torch.asin(cosine.double().clamp(-1, 1))))
