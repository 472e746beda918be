"""Layers with weights on the hypersphere (GmP).

y = r act(<u, x> + lambda): a unit has a radius r, a location lambda, and angles that give its direction u. W. Chen, H.
Ge, "Neural Characteristic Activation Analysis and Geometric Parameterization for ReLU Networks", NeurIPS 2024, arXiv
2305.15912.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcw_ops import _torch, init
from lcw_ops import functional as F
from lcw_ops._checks import accumulation_dtype, check_choice, check_non_negative, check_shape, describe
from lcw_ops.nn._derived import DerivedWeight
from lcw_ops.nn._layers import (
    ConstrainedLayer,
    Convolution,
    applied_parameters,
    are_per_unit,
    check_fan_in,
    empty_to_buffer,
    make_empty,
)
from lcw_ops.nn.input_mean_norm import InputMeanNorm
from lcw_ops.nn.weight_norm import WeightNormConv1d, WeightNormConv2d, WeightNormConv3d, WeightNormLinear
from lcw_ops.reference import hypersphere_direction


class _GmP(ConstrainedLayer):
    """The code shared by all GmP layers."""

    _FOREIGN = ("weight", "bias")

    angles: Tensor
    radius: nn.Parameter
    location: Tensor
    sign: Tensor | None
    activation: str | None
    _derived: DerivedWeight

    def _make_parameters(self, units: int, fan_in: int, activation: str | None, bias: bool, device, dtype) -> None:
        check_fan_in(self, fan_in)
        check_choice(type(self).__name__, "activation", activation, (None, "relu"))
        self.activation = activation
        angles = torch.empty(units, fan_in - 1, device=device, dtype=dtype)
        if fan_in == 1:
            # FSDP2 and some optimizers fail on an empty parameter.
            self.register_buffer("angles", angles)
        else:
            self.angles = nn.Parameter(angles)
        self.radius = nn.Parameter(torch.empty(units, device=device, dtype=dtype))
        location = torch.empty(units, device=device, dtype=dtype)
        if bias:
            self.location = nn.Parameter(location)
        else:
            self.register_buffer("location", location)
        self.register_buffer("sign", torch.empty(units, device=device, dtype=dtype) if fan_in == 1 else None)
        self._derived = DerivedWeight()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.gmp_(self.angles, self.radius, self.location)
        if self.sign is not None:
            # The sign of a uniformly drawn weight is independent of its absolute value, the radius.
            self.sign.bernoulli_().mul_(2).sub_(1)

    def direction(self) -> Tensor:
        """u, in the shape of ``weight``: rows or filters of length 1."""
        return self._signed(self._filters(self.angles))

    def effective_weight(self) -> Tensor:
        """radius * u, the same as ``weight``, but it can be read of a ReLU layer with negative radii too."""
        return self._scaled(self.direction())

    def _filters(self, angles: Tensor) -> Tensor:
        return F.hypersphere_direction(angles).view(self._weight_shape())

    def _signed(self, filters: Tensor) -> Tensor:
        return filters if self.sign is None else self.sign.view_as(filters) * filters

    def _scaled(self, filters: Tensor) -> Tensor:
        return self.radius.view(-1, *(1,) * (len(self._weight_shape()) - 1)) * filters

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _has_bias(self) -> bool:
        # A pruned or parametrized location is neither a parameter nor a buffer.
        return "location" not in self._buffers

    def _weight(self) -> Tensor:
        self._check_radius("weight")
        kept = self._derived.kept(self._filters, self.training, self.angles)
        return self._scaled(self.direction() if kept is None else self._signed(kept))

    @property
    def bias(self) -> Tensor | None:
        """The bias that is applied, radius * location, or None. Raises as ``weight`` does."""
        if not self._has_bias():
            return None
        self._check_radius("bias")
        return self.radius * self.location

    @bias.setter
    @torch.no_grad()
    def bias(self, value: Tensor | None) -> None:
        if value is None:
            if self._has_bias():
                zeros = torch.zeros_like(self.location)
                del self.location
                self.register_buffer("location", zeros)
            return
        value = self._check_assigned("bias", value, tuple(self.radius.shape))
        location = _location(f"{type(self).__name__}.bias", self, self.radius, value)
        if self._has_bias():
            self._store(location=location)
        else:
            del self.location
            self.location = nn.Parameter(location)

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        weight = self._check_assigned("weight", weight, self._weight_shape())
        bias = self.radius.double() * self.location.double() if self._has_bias() else None
        self._store(**_present(_coordinates(f"{type(self).__name__}.weight", self, weight, bias)))

    def _translate(self, foreign: dict[str, Any], missing: list[str]) -> dict[str, Tensor]:
        function = f"{type(self).__name__}.load_state_dict"
        bias = None
        if self._has_bias() and "bias" in foreign:
            bias = self._check_assigned("bias", foreign.pop("bias"), tuple(self.radius.shape))
        if "weight" not in foreign:
            return {} if bias is None else {"location": _location(function, self, self.radius, bias)}
        weight = self._check_assigned("weight", foreign.pop("weight"), self._weight_shape())
        if bias is None and self._has_bias():
            missing.append("bias")
            bias = self.radius.double() * self.location.double()
        return _coordinates(function, self, weight, bias)._asdict()

    def _check_radius(self, name: str) -> None:
        # A proxy of torch.fx has no numbers.
        if self.activation is None or not isinstance(self.radius, Tensor):
            return
        if not (_torch.is_traced() or _torch.has_values(self.radius)):
            return
        came = "does not exist: a unit has a negative radius after a ReLU"
        expected = "radii of at least 0"
        message = describe(type(self).__name__, name, came, expected, "Use effective_weight(), radius and location.")
        _torch.check_when_run((self.radius >= 0).all() | self.radius.isnan().any(), message)

    def __setstate__(self, state: dict) -> None:
        empty_to_buffer(state, "angles")
        super().__setstate__(state)


class GmPLinear(_GmP):
    """``radius * act(x @ u.T + location)`` with unit rows u from ``angles``; see :func:`lcw_ops.functional.gmp_linear`.

    The characteristic activation boundary of a unit, where it begins to fire, is the plane through -location * u. A
    change of the angles turns the boundary by at most the change's norm, whatever the radius.

    The layer suits ReLU nets of moderate fan-in m that are trained by Adam and have a plain output layer, as in the
    authors' code. It does not suit fan-ins of many thousands, nor units near a pole (some |u_k| near 1), where the
    angles after the k-th lose their effect. Adam turns a unit by about lr sqrt(m / 2) per step;
    :func:`gmp_parameter_groups` compensates for m. 16-bit angles are coarse, so keep float32 and use autocast. (Between
    2 and 4, the steps of bfloat16 are 1/64: if a layer of fan-in 512 is converted to it, the outputs are 4 % off.)

    A unit of one input (m = 1) has no angles; the buffer ``angles`` is empty. Its direction is +1 or -1, drawn at
    initialisation as in the authors' code and never trained. Only such a layer has the buffer ``sign`` (n,), which
    holds these directions. A ReLU layer of one input therefore has units that fire to the right of their boundary and
    units that fire to the left.

    Input (..., m = in_features) and output (..., n = out_features) have the parameters' dtype, or autocast's.

    Args:
        in_features: at least 1.
        out_features, device, dtype: as in ``nn.Linear``.
        activation: None or "relu"; the radius, of any sign, multiplies its result.
        bias: False keeps location at 0, as a buffer: every boundary passes through the origin.

    The parameters angles (n, m - 1), radius (n,) and location (n,) have together as many entries as a plain layer's.
    :func:`lcw_ops.init.gmp_` fills them. In eval mode without gradients, on a CPU, directions are cached until the
    angles change.

    ``weight`` (n, m) is radius * u and ``bias`` (n,) is radius * location. Both are computed at every reading, and
    gradients flow through them. They describe the layer before its activation; a ReLU layer with a negative radius has
    none, and reading raises ValueError. ``layer.weight = tensor`` sets angles and radius and keeps the bias;
    ``layer.bias = tensor`` sets the location. An edit of either in place changes nothing. State dicts of ``nn.Linear``
    and of version 0.1.0 load.

    Raises:
        ValueError: in_features below 1, or an unknown activation; in a forward pass, an input of the wrong shape.
        TypeError: in a forward pass, dtypes or devices that differ.

    Source: W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912, and the authors' code.
    """

    _plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._make_parameters(out_features, in_features, activation, bias, device, dtype)

    @classmethod
    def from_linear(cls, layer: nn.Module, activation: str | None = None) -> "GmPLinear":
        """A layer with the outputs of a trained layer or, with "relu", of that layer followed by a ReLU.

        A row w and its bias b become r = ||w||, u = w / r and lambda = b / r: the outputs are the same up to rounding,
        signs included. A zero row with bias 0 becomes radius 0, angles 0, location 0. With "relu", so does a zero row
        with a negative bias, because it never fires.

        Args:
            layer: its device, dtype and training mode are kept, its frozen parameters stay frozen, and if it has no
                bias, the new layer has none. The weight that it applies is converted, so it may have torch's weight
                norm, or be one of ours.
            activation: None or "relu".

        Raises:
            TypeError: not a linear layer.
            ValueError: the layer applies an activation, which would be lost; its output does not follow from its
                weight and bias alone, because of a ``forward`` of its own, another constraint, or pruning; or GmP
                cannot express a unit: it has a zero row and a constant nonzero output, or its weight or its location
                b / r is not finite.

        Source: derived by us.
        """
        function = f"{cls.__name__}.from_linear"
        weight, bias = applied_parameters(function, layer, nn.Linear)
        made = make_empty(
            cls,
            weight.shape[1],
            weight.shape[0],
            activation,
            device=weight.device,
            dtype=weight.dtype,
            bias=bias is not None,
        )
        return _fill_gmp(function, made.train(layer.training), weight, bias)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        if self.sign is not None:
            return self._forward_with_sign(input, self.sign)
        # nn.Module finds a parameter in microseconds, and a parametrization computes it, so read each of them once.
        angles, radius, location = self.angles, self.radius, self.location
        direction = self._derived.kept(F.hypersphere_direction, self.training, angles)
        if direction is not None and are_per_unit(direction, radius, location):
            try:
                output = nn.functional.linear(input, direction, location)
                return (output.relu_() if self.activation == "relu" else output).mul_(radius.to(output.dtype))
            except (RuntimeError, TypeError):
                # F.gmp_linear below raises the error for the argument that does not fit.
                pass
        return F.gmp_linear(input, angles, radius, location, self.activation)

    def _forward_with_sign(self, input: Tensor, sign: Tensor) -> Tensor:
        # F.gmp_linear takes no sign. It is called only to raise the error for the argument that does not fit.
        if not are_per_unit(sign, self.radius, self.location):
            F.gmp_linear(input, self.angles, self.radius, self.location, self.activation)
        try:
            output = nn.functional.linear(input, self.direction(), self.location)
        except (RuntimeError, TypeError):
            F.gmp_linear(input, self.angles, self.radius, self.location, self.activation)
            raise
        activated = output.relu() if self.activation == "relu" else output
        return self.radius.to(activated.dtype) * activated

    def extra_repr(self) -> str:
        bias = "" if self._has_bias() else ", bias=False"
        return f"in_features={self.in_features}, out_features={self.out_features}{bias}, activation={self.activation}"


class _GmPConv(_GmP, Convolution):
    """The code shared by the 1d, 2d and 3d layers."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(self._plain(*arguments, device="meta", dtype=dtype))
        self._make_parameters(out_channels, math.prod(self._filter_shape), activation, bias, device, dtype)

    @classmethod
    def from_conv(cls, layer: nn.Module, activation: str | None = None) -> "_GmPConv":
        """A layer with the outputs of a trained layer or, with "relu", of that layer followed by a ReLU.

        A unit is a filter. Everything else is as in :meth:`GmPLinear.from_linear`.
        """
        function = f"{cls.__name__}.from_conv"
        weight, bias = applied_parameters(function, layer, cls._plain)
        made = make_empty(
            cls,
            **cls._arguments_of(layer),
            bias=bias is not None,
            activation=activation,
            device=weight.device,
            dtype=weight.dtype,
        )
        return _fill_gmp(function, made.train(layer.training), weight, bias)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, *self._filter_shape)

    def forward(self, input: Tensor) -> Tensor:
        if not are_per_unit(self.angles, self.radius, self.location):
            name, units = type(self).__name__, self.angles.shape[:1]
            accumulation_dtype(name, angles=self.angles, radius=self.radius, location=self.location)
            for argument, values in (("radius", self.radius), ("location", self.location)):
                check_shape(name, argument, values, values.shape == units, f"({units[0]},), one value per filter")
        filters = self._signed(self._derived.get(self.angles, self._filters, self.training))
        if self.activation is None:
            # Scale the filters, because they have fewer entries than the output.
            return self._conv_forward(input, self._scaled(filters), self.radius * self.location)
        activated = self._conv_forward(input, filters, self.location).relu_()
        return self.radius.to(activated.dtype).view(-1, *(1,) * len(self.kernel_size)) * activated

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class GmPConv1d(_GmPConv):
    """``nn.Conv1d`` with filters on the hypersphere. It takes ``activation`` as well; see :class:`GmPConv2d`."""

    _plain = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward


class GmPConv2d(_GmPConv):
    """``radius * act(conv(x, u) + location)``: ``nn.Conv2d`` whose units, the filters, are on the hypersphere.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. The notes of :class:`GmPLinear` on dtypes, on
    inference and on suitable networks hold here too, with m = C_in / groups * kH * kW. In a deep net, put an
    :class:`InputMeanNorm` before this layer.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype:
            as in ``nn.Conv2d``.
        bias: as in ``nn.Conv2d``. False keeps location at 0, as a buffer: every filter's boundary passes through the
            origin, and the layer can express what ``nn.Conv2d(bias=False)`` can. The state_dict keeps the key location.
        activation: None or "relu"; the radius multiplies its result.

    :func:`lcw_ops.init.gmp_` fills the parameters angles (C_out, m - 1), radius (C_out,) and location (C_out,). For
    m = 1, there is also a buffer sign (C_out,).

    Raises:
        ValueError: an unknown activation, empty filters, and the errors of ``nn.Conv2d``.

    Source: as :class:`GmPLinear`.
    """

    _plain = nn.Conv2d
    _conv_forward = nn.Conv2d._conv_forward


class GmPConv3d(_GmPConv):
    """``nn.Conv3d`` with filters on the hypersphere. It takes ``activation`` as well; see :class:`GmPConv2d`."""

    _plain = nn.Conv3d
    _conv_forward = nn.Conv3d._conv_forward


def gmp_parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for ``torch.optim``: the angles of a GmP layer of fan-in m get the rate lr / sqrt(m).

    Adam moves every angle by about its rate, which turns a unit by sqrt(m / 2) times the rate. With these groups, the
    turn is about the same at every fan-in. Decay of the radius r is enough to decay the plain layer's weight r u and
    bias r lambda. Locations are not decayed, because decay would draw every boundary to the origin. Angles are not
    decayed, because the angle 0 is a pole.

    Args:
        model: the model. Its GmP layers are found by type, wherever they are.
        lr: the rate for everything but angles. Most schedulers multiply rates and keep the ratios. A scheduler that
            takes absolute rates, such as OneCycleLR with max_lr, needs a list: ``[group["lr"] for group in groups]``.
        weight_decay: the decay of everything but angles and locations.

    Returns:
        The groups in this order, without empty ones: radii and all other parameters; locations; angles, one group per
        fan-in, ascending. A group has its parameters in the order of ``model.parameters()``, a shared one only once,
        and frozen ones too, which optimizers accept. The order depends on the model alone, so an optimizer's state_dict
        can be loaded again.

    Raises:
        TypeError or ValueError: lr or weight_decay is not a finite number >= 0.

    Source: derived here.
    """
    check_non_negative("gmp_parameter_groups", "lr", lr)
    check_non_negative("gmp_parameter_groups", "weight_decay", weight_decay)
    fan_ins: dict[nn.Parameter, int] = {}
    locations: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, _GmP):
            fan_in = module.angles.shape[1] + 1
            fan_ins.update(dict.fromkeys(_parameters_of(module, "angles"), fan_in))
            locations.update(_parameters_of(module, "location"))
    # A group's key is its fan-in, which is at least 1, or one of these. Sorted keys give the order of the groups.
    others, location = -1, 0
    members: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        key = fan_ins.get(parameter, location if parameter in locations else others)
        members.setdefault(key, []).append(parameter)
    return [
        {
            "params": members[key],
            "lr": lr / math.sqrt(max(key, 1)),
            "weight_decay": weight_decay if key == others else 0.0,
        }
        for key in sorted(members)
    ]


def _parameters_of(module: Any, name: str) -> list[nn.Parameter]:
    """The parameter of this name, or those from which a parametrization computes it. Empty for a buffer."""
    if nn.utils.parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())
    value = getattr(module, name)
    return [value] if isinstance(value, nn.Parameter) else []


class _Coordinates(NamedTuple):
    """Tensors of a GmP layer, in float64 or already in the layer's dtype."""

    angles: Tensor
    radius: Tensor
    location: Tensor
    sign: Tensor | None


def _coordinates(function: str, module: Any, weight: Tensor, bias: Tensor | None) -> _Coordinates:
    """The tensors for which radius * u is the weight and radius * location the bias; of a bias None, location 0."""
    dtype = module.angles.dtype
    rows = weight.flatten(1).double()
    angles = F.hypersphere_angles(rows).to(dtype)
    direction = hypersphere_direction(angles.double())
    sign = None
    if module.sign is not None:
        # A weight of 0 gets direction +1.
        direction = torch.where(rows < 0, -direction, direction)
        sign = direction.squeeze(1).to(dtype)
    # <w, u> is ||w||.
    radius = (rows * direction).sum(1).to(dtype)
    return _Coordinates(angles, radius, _location(function, module, radius, bias), sign)


def _location(function: str, module: Any, radius: Tensor, bias: Tensor | None) -> Tensor:
    """bias / radius, in the radius's dtype; 0 for a unit that is always 0."""
    wide = radius.double()
    plain_bias = torch.zeros_like(wide) if bias is None else bias.double()
    is_zero = torch.eq(wide, 0)
    location = (plain_bias / wide).masked_fill(is_zero, 0.0).to(radius.dtype)
    # A layer on the meta device has no numbers to check.
    if not _torch.is_traced() and _torch.has_values(radius):
        is_relu = module.activation == "relu"
        is_finite = wide.isfinite() & location.isfinite()
        is_constant = is_zero & torch.ne(plain_bias.relu() if is_relu else plain_bias, 0)
        _check_units(function, is_finite, "have a weight or a location (bias / weight's norm) that is not finite")
        _check_units(function, ~is_constant, "are constant: their weight is 0 and their bias is not")
    return location


def _present(coordinates: _Coordinates) -> dict[str, Tensor]:
    return {name: value for name, value in coordinates._asdict().items() if value is not None}


@torch.no_grad()
def _fill_gmp(function: str, module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    module._store(**_present(_coordinates(function, module, weight, bias)))
    module.radius.requires_grad_(weight.requires_grad)
    if module.sign is None:
        module.angles.requires_grad_(weight.requires_grad)
    if bias is not None:
        module.location.requires_grad_(bias.requires_grad)
    return module


def _check_units(function: str, right: Tensor, came: str) -> None:
    if not right.all():
        argument = f"units {(~right).nonzero().flatten().tolist()} of layer"
        expected = "units that radius * act(<u, x> + location) can express"
        raise ValueError(describe(function, argument, came, expected, "Leave this layer plain, or change these units."))


# These classes were once defined here, and pickles from then name this module. New pickles name it too, so that code
# from before the move can load them, and so that an allow-list of torch.load(weights_only=True), which compares names,
# needs one name for each class.
for _moved in (InputMeanNorm, WeightNormLinear, WeightNormConv1d, WeightNormConv2d, WeightNormConv3d):
    _moved.__module__ = __name__
