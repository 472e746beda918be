"""The constraints of LCW and GmP for any tensor of any module, in the manner of ``torch.nn.utils.parametrizations``.

A unit is a row of the tensor: w = u - mean(u) or w = B v for :func:`zero_sum`, w = r u(angles) for :func:`hypersphere`.
T. Kutsuna, "Linearly Constrained Weights", ECML PKDD 2019, arXiv 2403.13833; W. Chen, H. Ge, "Neural Characteristic
Activation Analysis and Geometric Parameterization for ReLU Networks", NeurIPS 2024, arXiv 2305.15912.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lcw_ops import _torch
from lcw_ops import functional as F
from lcw_ops._checks import FLOATING, accumulation_dtype, check_dense, check_shape, describe
from lcw_ops.nn._layers import CHANNELS_LAST, laid_out, memory_format_of, sums_to_zero, warn_caller
from lcw_ops.reference import hypersphere_angles, hypersphere_direction, lcw_coordinates, lcw_weight

__all__ = ["hypersphere", "zero_sum"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def zero_sum(module: nn.Module, name: str = "weight", basis: bool = False) -> nn.Module:
    """Parametrize a tensor of a module so that every unit's weights sum to zero (LCW).

    A constant added to all inputs of a unit then changes nothing. ``module.<name>`` becomes
    ``lcw_ops.functional.lcw_weight(original, basis)``, computed at every access, where ``original`` is the parameter
    ``module.parametrizations.<name>.original``. Registration projects: a trained weight loses the mean of each row, so
    the module's outputs may change. No warning says so.

    A unit is a row of dim 0 over all other dims, as in torch's weight norm with dim=0: an output of ``nn.Linear``, a
    filter of a convolution, one gate's unit in ``nn.LSTM.weight_hh_l0``, an output of the query, the key or the value
    in ``nn.MultiheadAttention.in_proj_weight``, one token of ``nn.Embedding``. In the ``weight`` of
    ``nn.ConvTranspose1d/2d/3d``, a unit is an output channel: all weights that lead to it from the inputs of its group.
    In the ``weight`` (inputs, outputs) of transformers' ``Conv1D``, a unit is a column. A unit of one input can only
    have the weight 0.

    Everything that ``torch.nn.utils.parametrize`` offers works as usual:

    - ``module.<name> = tensor`` sets ``original``. A tensor whose rows do not sum to zero is projected; the first time,
      a warning says so. An in-place edit of ``module.<name>``, such as those of ``torch.nn.init``, is lost, because it
      changes a temporary tensor. Assigning an ``nn.Parameter`` is refused by torch with a KeyError.
    - Within ``parametrize.cached()``, the tensor is computed once. ``nn.LSTM`` and its kind read it twice per call.
    - ``parametrize.remove_parametrizations(module, name)`` leaves the constrained tensor as a plain parameter, and with
      ``leave_parametrized=False`` it leaves ``original``. With ``basis``, that is not a weight but v, of another shape.
    - A module can be deep-copied, and the copies stand alone. It can be saved through its state_dict only, as every
      parametrized module. ``torch.func.functional_call`` takes the names of the originals.
    - The constraint may follow another parametrization: zero_sum after spectral norm gives rows that sum to zero and
      a spectral norm of at most 1. Another one may also follow it: rows that are scaled keep their zero sum.

    Two modules that share a parameter: the centred form constrains this module only, and trains the shared parameter
    itself. Since registration projects it in place, the other module's values change too. The basis form and
    :func:`hypersphere` train new parameters: the two modules share nothing any more, and an optimizer must be created
    afterwards.

    Args:
        module: any module. It is changed in place.
        name: the parameter or buffer, of at least 2 dimensions; float32, float64, bfloat16 or float16. Its
            ``requires_grad``, device and channels-last layout are kept.
        basis: False is the centred form, w = u - mean(u), where ``original`` has the tensor's shape. True is the
            paper's, w = B v with an orthonormal basis B of the zero-sum vectors, where ``original`` is (n, m - 1) for n
            units of m inputs.

    Returns:
        The module.

    Raises:
        TypeError: not a module; not a string; a tensor that is complex, not floating, sparse or nested.
        ValueError: the module has no such parameter or buffer; a tensor that is pruned, computed by a hook, or not
            initialised; fewer than 2 dimensions; a tensor that already has this constraint; with ``basis``, one that is
            parametrized at all, or units without inputs; an ``nn.Embedding`` or ``nn.EmbeddingBag`` with sparse
            gradients. On assignment, another shape.

    Source: T. Kutsuna, ECML PKDD 2019, arXiv 2403.13833; the centred form is ours.
    """
    tensor = _tensor_to_constrain("zero_sum", module, name)
    present = _parametrizations(module, name)
    if any(isinstance(constraint, (ZeroSum, ZeroSumBasis)) for constraint in present):
        came, remedy = "already has rows that sum to zero", "Leave out this call."
        raise ValueError(describe("zero_sum", name, came, "a tensor without this constraint", remedy))
    if not basis:
        return _register(module, name, ZeroSum("zero_sum", module, name, tensor))
    _check_first("zero_sum", name, present, "with basis=True", "Or use basis=False, which may come later.")
    constraint = ZeroSumBasis("zero_sum", module, name, tensor)
    _check_fan_in("zero_sum", name, constraint.fan_in, "at least one for basis=True")
    # The parameter changes its shape. Leave the old one to modules that share it, and to optimizers.
    if isinstance(tensor, nn.Parameter):
        unshared: Tensor = nn.Parameter(tensor.detach(), tensor.requires_grad)
    else:
        unshared = tensor.detach().requires_grad_(tensor.requires_grad)
    setattr(module, name, unshared)
    return _register(module, name, constraint)


def hypersphere(module: nn.Module, name: str = "weight") -> nn.Module:
    """Parametrize a tensor of a module by a radius and angles per unit (GmP): ``radius * direction(angles)``.

    A change of the angles turns a unit by at most the change's norm, whatever the radius. ``module.<name>`` is computed
    at every access from two parameters, ``module.parametrizations.<name>.original0`` and ``original1``: the radius
    (n, 1, ..), with as many dims as the tensor, and the angles (n, m - 1) of
    :func:`lcw_ops.functional.hypersphere_direction`, for n units of m inputs. See :func:`zero_sum` for the units of
    each kind of module, for what ``torch.nn.utils.parametrize`` offers, and for shared parameters.

    The tensor keeps its values up to rounding, at registration and on assignment. A zero row becomes radius 0 with the
    direction (1, 0, ..). Angles of 16 bits are coarse: at m = 512, the rows in bfloat16 are off by 4 %, and a warning
    says by how much they are. So register in float32, and use autocast.

    A unit of one input has no angles: ``original0`` is then the only parameter, and the parametrization's buffer
    ``sign`` (n,) holds the direction, +1 or -1, which is never trained.

    ``parametrize.remove_parametrizations(module, name)`` leaves the weight as a plain parameter. torch refuses
    ``leave_parametrized=False``, because there is more than one original tensor.

    :class:`lcw_ops.nn.GmPLinear` has the same weight and puts its location, the bias / radius, before the radius. It
    never writes the weight to memory for few samples, and is faster.

    Args:
        module: any module. It is changed in place.
        name: the parameter or buffer, of at least 2 dimensions; float32, float64, bfloat16 or float16. Its
            ``requires_grad``, device and channels-last layout are kept.

    Returns:
        The module.

    Raises:
        TypeError: not a module; not a string; a tensor that is complex, not floating, sparse or nested.
        ValueError: the module has no such parameter or buffer; a tensor that is pruned, computed by a hook, or not
            initialised; fewer than 2 dimensions; units without inputs; a tensor that is parametrized already; an
            ``nn.Embedding`` or ``nn.EmbeddingBag`` with sparse gradients; a row whose norm overflows the dtype. On
            assignment, another shape.

    Source: W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912; the inverse and the sign are ours.
    """
    tensor = _tensor_to_constrain("hypersphere", module, name)
    _check_first("hypersphere", name, _parametrizations(module, name), "because it trains radius and angles")
    constraint = Hypersphere("hypersphere", module, name, tensor)
    _check_fan_in("hypersphere", name, constraint.fan_in, "at least one, because it has no direction otherwise")
    return _register(module, name, constraint)


class _Constraint(nn.Module):
    """The parts that the constraints share: the units of a tensor as rows, its shape, its layout, and one warning.

    torch calls ``forward`` with the original tensors to compute the constrained one, and ``right_inverse`` with a
    tensor to compute the originals.
    """

    def __init__(self, function: str, module: nn.Module, name: str, tensor: Tensor) -> None:
        super().__init__()
        self.function = function
        self.tensor_name = name
        self.shape = tuple(tensor.shape)
        self.groups = _groups_of_transposed(module, name)
        self.memory_format = memory_format_of(tensor)
        # Whether torch has the originals: before that, a projection is what the user has asked for.
        self.is_registered = False
        self._has_warned = False

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of one unit."""
        if self.groups is None:
            return self.shape[1:]
        return (self.shape[0] // self.groups, *self.shape[2:])

    @property
    def fan_in(self) -> int:
        return math.prod(self.unit_shape)

    @property
    def units(self) -> int:
        return self.shape[0] if self.groups is None else self.groups * self.shape[1]

    def units_of(self, tensor: Tensor) -> Tensor:
        """One unit per entry of dim 0. A transposed convolution has (in, out / groups, *k): (out, in / groups, *k)."""
        if self.groups is None:
            return tensor
        return tensor.unflatten(0, (self.groups, self.shape[0] // self.groups)).transpose(1, 2).flatten(0, 1)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """(units, fan-in), contiguous and in float64."""
        return self.units_of(tensor).reshape(self.units, self.fan_in).double().contiguous()

    def tensor_of(self, units: Tensor) -> Tensor:
        """The inverse of ``units_of``, also for units that are flattened to rows. It is contiguous or channels-last."""
        tensor = units.reshape(self.units, *self.unit_shape)
        if self.groups is not None:
            tensor = tensor.unflatten(0, (self.groups, self.shape[1])).transpose(1, 2).flatten(0, 1)
        return laid_out(tensor, self.memory_format)

    def _apply(self, fn: Callable, recurse: bool = True):
        """Follow ``module.to(memory_format=...)``, which torch applies to tensors: originals may have another rank."""
        super()._apply(fn, recurse)
        if len(self.shape) in CHANNELS_LAST:
            sizes = (1, *(2,) * (len(self.shape) - 1))
            self.memory_format = memory_format_of(fn(torch.empty(sizes).contiguous(memory_format=self.memory_format)))
        return self

    def _check_assigned(self, value: Tensor) -> None:
        argument = f"the tensor assigned to {self.tensor_name}"
        accumulation_dtype(self.function, **{argument: value})
        check_dense(self.function, **{argument: value})
        if tuple(value.shape) != self.shape:
            check_shape(self.function, argument, value, False, f"{self.shape}")

    def _warn_once(self, came: str, expected: str, remedy: str) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warn_caller(describe(self.function, self.tensor_name, came, expected, remedy))


class ZeroSum(_Constraint):
    """``original - mean(original)``, by units. Its right inverse is the projection, and so the map itself."""

    def forward(self, original: Tensor) -> Tensor:
        return self.tensor_of(F.lcw_weight(self.units_of(original)))

    def right_inverse(self, value: Tensor) -> Tensor:
        self._check_assigned(value)
        _warn_unless_zero_sum(self, value)
        return self.tensor_of(lcw_weight(self.rows_of(value)).to(value.dtype))


class ZeroSumBasis(_Constraint):
    """``B @ original``, by units, where the columns of B are an orthonormal basis of the zero-sum vectors."""

    def forward(self, original: Tensor) -> Tensor:
        return self.tensor_of(F.lcw_weight(original, basis=True))

    def right_inverse(self, value: Tensor) -> Tensor:
        self._check_assigned(value)
        _warn_unless_zero_sum(self, value)
        return lcw_coordinates(self.rows_of(value)).to(value.dtype)

    def extra_repr(self) -> str:
        return "basis=True"


class Hypersphere(_Constraint):
    """``radius * direction(angles)``, by units; for a unit of one input, ``radius * sign``."""

    sign: Tensor | None

    def __init__(self, function: str, module: nn.Module, name: str, tensor: Tensor) -> None:
        super().__init__(function, module, name, tensor)
        units = self.units_of(tensor.detach())
        self.register_buffer("sign", torch.ones_like(units.flatten()) if self.fan_in == 1 else None)

    def forward(self, radius: Tensor, angles: Tensor | None = None) -> Tensor:
        # 16-bit tensors are computed in float32 and rounded once.
        dtype = torch.float64 if radius.dtype == torch.float64 else torch.float32
        if angles is None:
            assert self.sign is not None
            direction = _torch.cast(self.sign, dtype)[:, None]
        else:
            direction = F.hypersphere_direction(_torch.cast(angles, dtype))
        return self.tensor_of(_torch.cast(_torch.cast(radius.flatten(1), dtype) * direction, radius.dtype))

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        self._check_assigned(value)
        rows = self.rows_of(value)
        angles = hypersphere_angles(rows).to(value.dtype)
        direction = hypersphere_direction(angles.double())
        if self.sign is not None:
            direction = torch.where(rows < 0, -direction, direction)
        # <w, u> is ||w||. Unlike ||w||, it is the best radius for the rounded angles.
        radius = (rows * direction).sum(1, keepdim=True).to(value.dtype)
        if _torch.has_values(value):
            self._check_radius(rows, radius)
            self._warn_if_coarse(rows, radius.double() * direction, value.dtype)
        if self.sign is not None and (value.dtype, value.device) == (self.sign.dtype, self.sign.device):
            # torch refuses other dtypes after this call, and the sign must not have changed then.
            self.sign.copy_(direction.flatten())
        radius = radius.reshape(-1, *(1,) * (len(self.shape) - 1))
        return (radius,) if self.sign is not None else (radius, angles)

    def _check_radius(self, rows: Tensor, radius: Tensor) -> None:
        is_too_long = rows.isfinite().all(1) & ~radius.isfinite().flatten()
        if is_too_long.any():
            came = f"has rows whose norms overflow {radius.dtype}: {is_too_long.nonzero().flatten().tolist()}"
            expected, remedy = "rows of finite norms", "Scale them down."
            raise ValueError(describe(self.function, self.tensor_name, came, expected, remedy))

    def _warn_if_coarse(self, rows: Tensor, kept: Tensor, dtype: torch.dtype) -> None:
        """Warn where the angles' rounding, and not that of the tensor itself, decides how exact its values are."""
        if dtype.itemsize > 2:
            return
        change = ((kept - rows).norm() / rows.norm()).item()
        if change > torch.finfo(dtype).eps:
            came = f"is {dtype}, whose angles are coarse: its values have changed by {change:.2g} of their norm"
            self._warn_once(came, "float32", "Convert the module to float32, and use torch.autocast.")


def _warn_unless_zero_sum(constraint: _Constraint, value: Tensor) -> None:
    """Warn if the projection changes an assigned tensor by more than rounding does."""
    if not constraint.is_registered or not _torch.has_values(value):
        return
    rows = constraint.rows_of(value)
    if not sums_to_zero(rows, value.dtype):
        came = f"is assigned rows that sum to up to {rows.sum(1).abs().max().item():.3g}"
        remedy = "The mean of each row is subtracted."
        constraint._warn_once(came, "rows that sum to zero", remedy)


def _groups_of_transposed(module: nn.Module, name: str) -> int | None:
    """The groups of a tensor whose units are along dim 1, or None if they are along dim 0."""
    if name != "weight":
        return None
    if isinstance(module, _TRANSPOSED):
        return module.groups
    # The weight of GPT-2's layers is (inputs, outputs). If a module is one of these, its library has been imported.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return 1 if conv1d is not None and isinstance(module, conv1d) else None


def _parametrizations(module: nn.Module, name: str) -> list[nn.Module]:
    """The parametrizations that the tensor has already."""
    lists: Any = module.parametrizations if parametrize.is_parametrized(module, name) else {}
    return list(lists[name]) if lists else []


def _check_first(function: str, name: str, present: list[nn.Module], reason: str, remedy: str = "") -> None:
    if present:
        came = f"already has the parametrization {type(present[0]).__name__}"
        expected = f"a tensor without one, {reason}"
        remedy = f"Register {function} first, or remove the other one. {remedy}"
        raise ValueError(describe(function, name, came, expected, remedy))


def _check_fan_in(function: str, name: str, fan_in: int, expected: str) -> None:
    if fan_in == 0:
        raise ValueError(describe(function, f"a unit of {name}", "has no inputs", expected))


@torch.no_grad()
def _tensor_to_constrain(function: str, module: nn.Module, name: str) -> Tensor:
    """The module's tensor of this name, or an error that says why it cannot be constrained."""
    if not isinstance(module, nn.Module):
        raise TypeError(describe(function, "module", f"is a {type(module).__name__}", "a torch.nn.Module"))
    if not isinstance(name, str):
        raise TypeError(describe(function, "name", f"is a {type(name).__name__}", "a string"))
    owned: dict[str, Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    owned.update(module.named_buffers(recurse=False, remove_duplicate=False))
    pruned = name.removesuffix("_orig")
    if f"{pruned}_orig" in owned and f"{pruned}_mask" in owned and name in (pruned, f"{pruned}_orig"):
        came, expected = f"is pruned, so that a mask multiplies {pruned}_orig", "a tensor without a mask"
        remedy = f"Make it permanent first: torch.nn.utils.prune.remove(module, {pruned!r})."
        raise ValueError(describe(function, name, came, expected, remedy))
    is_parametrized = parametrize.is_parametrized(module, name)
    if name not in owned and not is_parametrized:
        expected = f"a parameter or a buffer of {type(module).__name__}: {', '.join(owned) or 'it has none'}"
        # A property may be costly, and may raise.
        if name in vars(module) or isinstance(getattr(type(module), name, None), property):
            came, remedy = "is computed from other tensors", "Name one of these, or remove what computes it."
        else:
            came, remedy = "is not there", ""
        raise ValueError(describe(function, name, came, expected, remedy))
    tensor = getattr(module, name) if is_parametrized else owned[name]
    _check_tensor(function, module, name, tensor)
    return tensor


def _check_tensor(function: str, module: nn.Module, name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        remedy = "Run a forward pass of the lazy module first."
        raise ValueError(describe(function, name, "is not initialised", "a tensor with a shape", remedy))
    if tensor.dtype not in FLOATING:
        is_complex = "Constrain its real and its imaginary part as two tensors."
        remedy = is_complex if tensor.is_complex() else "Constrain a layer before it is quantized."
        expected = "float64, float32, bfloat16 or float16"
        raise TypeError(describe(function, name, f"is {tensor.dtype}", expected, remedy))
    check_dense(function, **{name: tensor})
    remedy = "Its units have no inputs that a constraint could be about: name the layer's weight instead."
    check_shape(function, name, tensor, tensor.dim() >= 2, "at least 2 dimensions, one row per unit", remedy)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        remedy = "Set module.sparse = False: through the constraint, the gradient of every entry of a row is not zero."
        raise ValueError(describe(function, name, "has sparse gradients", "dense gradients", remedy))


def _register(module: nn.Module, name: str, constraint: _Constraint) -> nn.Module:
    if parametrize.is_parametrized(module):
        # It may be a copy, which has its class in common with others.
        _torch.give_own_class(module)
    parametrize.register_parametrization(module, name, constraint)
    constraint.is_registered = True
    _torch.give_own_class(module)
    _torch.refresh_recurrent_weights(module)
    return module
