"""Layers with weights on the hypersphere, and the input mean normalization that deep nets of them need.

GmP: y = r act(u(theta).x + lambda), a unit as angles theta, radius r and location lambda. W. Chen, H. Ge, "Neural
Characteristic Activation Analysis and Geometric Parameterization for ReLU Networks", NeurIPS 2024, arXiv 2305.15912.
Weight normalization: w = s v / ||v||. T. Salimans, D. P. Kingma, NeurIPS 2016, arXiv 1602.07868.

None of them is a subclass of its namesake: who finds an ``nn.Linear`` takes its ``weight`` for what is applied.
"""

import math

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops import init
from lcw_ops._checks import FLOATING, accumulation_dtype, check_choice, check_non_negative, check_shape
from lcw_ops.nn._derived import DerivedWeight
from lcw_ops.reference import hypersphere_angles, hypersphere_direction, normalize_scale

# What a convolution is told, and what its forward pass reads.
_CONV_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class GmPLinear(nn.Module):
    """``radius * act(x @ u.T + location)``, u the unit rows that ``angles`` stand for; ``functional.gmp_linear``.

    The characteristic activation boundary of a unit, where it begins to fire, is the plane through -location * u. A
    step of the angles turns it by at most that step's length, whatever the radius.

    Advisable for ReLU nets of moderate fan-in under Adam, with the output layer plain, as in the authors' code; not for
    fan-ins of many thousands, nor near the poles (|u_k| near 1), where later angles lose their effect. Adam turns a
    unit by about lr sqrt(m / 2) a step: :func:`gmp_parameter_groups` scales the angles' rate. 16-bit angles are coarse
    (in bfloat16 steps of 1/64 between 2 and 4; a layer of fan-in 512 that is converted in it gives outputs 4 % off):
    keep float32 and use autocast.

    A unit of a single input (m = 1) has no angles. Its direction is +1 or -1, drawn with the other numbers as in the
    authors' code and never trained: the buffer sign (n,), which only such a layer has. So a ReLU layer of one input has
    units that fire to the right of their boundary and units that fire to the left.

    Input (..., m = in_features), output (..., n = out_features), of the parameters' dtype (under autocast: autocast's).

    Args:
        in_features: at least 1.
        out_features, device, dtype: ``nn.Linear``'s.
        activation: None or "relu"; the radius, of any sign, acts after it.
        bias: False keeps location at 0, as a buffer: every boundary passes through the origin.

    Parameters angles (n, m - 1), radius (n,), location (n,), as many numbers as a plain layer; they begin as
    :func:`lcw_ops.init.gmp_` fills them. In eval mode without gradients, on a CPU, directions are kept while the
    angles' content is the same.

    Raises:
        ValueError: in_features below 1, or an unknown activation; in a forward pass an input that does not fit.
        TypeError: in a forward pass, dtypes or devices that differ.
    """

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
        _make_gmp(self, out_features, in_features, activation, bias, device, dtype)

    @classmethod
    def from_linear(cls, layer: nn.Linear, activation: str | None = None) -> "GmPLinear":
        """The layer that gives what a trained plain one gives, or with "relu" what that and a ReLU after it give.

        w = r u, b = r lambda with r = ||w||: the same outputs up to rounding; every sign is kept. Without bias as the
        layer. A zero row with bias 0 becomes radius 0, angles 0, location 0; with "relu", so does one whose bias is
        negative, for it never fires.

        Device, dtype, training mode and what is frozen are the layer's; what is applied counts, so an
        :class:`~lcw_ops.nn.LCWLinear` or a parametrized layer may be given. Derived by us.

        Raises:
            TypeError: not an ``nn.Linear``.
            ValueError: a unit that GmP cannot express: a zero row whose output is a constant other than 0, or a
                weight that is not finite (or a location b / r that is not).
        """
        function = f"{cls.__name__}.from_linear"
        weight, bias = _applied_parameters(function, layer, nn.Linear)
        made = nn.utils.skip_init(
            cls,
            layer.in_features,
            layer.out_features,
            activation,
            device=weight.device,
            dtype=weight.dtype,
            bias=bias is not None,
        )
        return _fill_gmp(function, made.train(layer.training), weight, bias)

    def reset_parameters(self) -> None:
        _reset_gmp(self)

    def direction(self) -> Tensor:
        """u, (out_features, in_features): unit rows."""
        direction = F.hypersphere_direction(self.angles)
        return direction if self.sign is None else self.sign[:, None] * direction

    def effective_weight(self) -> Tensor:
        """radius * u, (out_features, in_features): the plain layer's weight, to the bias ``radius * location``.

        Without activation for every radius, with "relu" for those above 0; no plain unit is what one below 0 is.
        """
        return self.radius[:, None] * self.direction()

    def forward(self, input: Tensor) -> Tensor:
        if self.sign is not None:
            return self._forward_with_sign(input)
        direction = self._derived.kept(F.hypersphere_direction, self.training, self.angles)
        if direction is not None and _are_per_unit(direction, self.radius, self.location):
            try:
                output = nn.functional.linear(input, direction, self.location)
                return (output.relu_() if self.activation == "relu" else output).mul_(self.radius.to(output.dtype))
            except (RuntimeError, TypeError):
                # What does not fit is said below.
                pass
        return F.gmp_linear(input, self.angles, self.radius, self.location, self.activation)

    def _forward_with_sign(self, input: Tensor) -> Tensor:
        # What does not fit is said by the function, which knows no sign.
        if not _are_per_unit(self.sign, self.radius, self.location):
            F.gmp_linear(input, self.angles, self.radius, self.location, self.activation)
        try:
            output = nn.functional.linear(input, self.direction(), self.location)
        except (RuntimeError, TypeError):
            F.gmp_linear(input, self.angles, self.radius, self.location, self.activation)
            raise
        activated = output.relu() if self.activation == "relu" else output
        return self.radius.to(activated.dtype) * activated

    def extra_repr(self) -> str:
        bias = "" if isinstance(self.location, nn.Parameter) else ", bias=False"
        return f"in_features={self.in_features}, out_features={self.out_features}{bias}, activation={self.activation}"


class WeightNormLinear(nn.Module):
    """``nn.Linear`` whose weight is ``scale * weight / ||weight||`` by rows; see :func:`functional.weight_norm_linear`.

    Source: T. Salimans, D. P. Kingma, 2016; it begins as ``nn.Linear`` does, with scale = ||weight||. A zero row is a
    unit of weight zero without gradients.

    Input (..., m = in_features), output (..., n = out_features), of the parameters' dtype (under autocast: autocast's).

    Args:
        in_features: at least 1.
        out_features, bias, device, dtype: ``nn.Linear``'s.

    Parameters weight (n, m), scale (n,) of any sign, bias (n,) or None. In eval mode without gradients, on a CPU, the
    normalised weight is kept while the content of weight and scale is the same.

    Raises:
        ValueError: in_features below 1; in a forward pass an input that does not fit.
        TypeError: in a forward pass, dtypes or devices that differ.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        _make_weight_norm(self, (out_features, in_features), bias, device, dtype)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "WeightNormLinear":
        """The layer that gives what a trained plain one gives, up to rounding: its weight, and scale = ||weight||.

        Device, dtype, training mode and what is frozen are the layer's; what is applied counts, so an
        :class:`~lcw_ops.nn.LCWLinear` or a parametrized layer may be given. Raises TypeError for other than an
        ``nn.Linear``.
        """
        weight, bias = _applied_parameters(f"{cls.__name__}.from_linear", layer, nn.Linear)
        made = nn.utils.skip_init(
            cls, layer.in_features, layer.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        return _fill_weight_norm(made.train(layer.training), weight, bias)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        _reset_scale(self)

    def effective_weight(self) -> Tensor:
        """(out_features, in_features), rows of length |scale|."""
        return F.normalize_scale(self.weight, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._derived.kept(F.normalize_scale, self.training, self.weight, self.scale)
        if weight is not None and (self.bias is None or _are_per_unit(weight, self.bias)):
            try:
                return nn.functional.linear(input, weight, self.bias)
            except (RuntimeError, TypeError):
                # What does not fit is said below.
                pass
        return F.weight_norm_linear(input, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)


class _Conv(nn.Module):
    """A convolution with torch's arguments and torch's forward pass, but not its weight."""

    # The rank's own: torch's layer, and of that the function that pads and convolves.
    _plain: type[nn.Module]

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        for name in _CONV_ATTRIBUTES:
            setattr(self, name, getattr(plain, name))
        self._filter_shape = tuple(plain.weight.shape[1:])
        self._arguments = plain.extra_repr()

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict:
        return {name: getattr(layer, name) for name in _CONV_ATTRIBUTES if not name.startswith("_")}

    def extra_repr(self) -> str:
        return self._arguments


class _GmPConv(_Conv):
    """What the three ranks share."""

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
        _make_gmp(self, out_channels, math.prod(self._filter_shape), activation, bias, device, dtype)

    @classmethod
    def from_conv(cls, layer: nn.Module, activation: str | None = None) -> "_GmPConv":
        """The layer that gives what a trained plain one gives, or with "relu" what that and a ReLU after it give.

        A unit is a filter; all else, and what is raised, as in :meth:`GmPLinear.from_linear`.
        """
        function = f"{cls.__name__}.from_conv"
        weight, bias = _applied_parameters(function, layer, cls._plain)
        made = nn.utils.skip_init(
            cls,
            **cls._arguments_of(layer),
            bias=bias is not None,
            activation=activation,
            device=weight.device,
            dtype=weight.dtype,
        )
        return _fill_gmp(function, made.train(layer.training), weight, bias)

    def reset_parameters(self) -> None:
        _reset_gmp(self)

    def direction(self) -> Tensor:
        """u, (out_channels, in_channels / groups, *kernel_size): filters of length 1."""
        filters = self._filters(self.angles)
        return filters if self.sign is None else self.sign.view_as(filters) * filters

    def effective_weight(self) -> Tensor:
        """radius * u, (out_channels, in_channels / groups, *kernel_size): as :meth:`GmPLinear.effective_weight`."""
        return self._scaled(self.direction())

    def _filters(self, angles: Tensor) -> Tensor:
        return F.hypersphere_direction(angles).view(-1, *self._filter_shape)

    def _scaled(self, filters: Tensor) -> Tensor:
        return self.radius.view(-1, *(1,) * len(self._filter_shape)) * filters

    def forward(self, input: Tensor) -> Tensor:
        if not _are_per_unit(self.angles, self.radius, self.location):
            name, units = type(self).__name__, self.angles.shape[:1]
            accumulation_dtype(name, angles=self.angles, radius=self.radius, location=self.location)
            for argument, values in (("radius", self.radius), ("location", self.location)):
                check_shape(name, argument, values, values.shape == units, f"({units[0]},), one value per filter")
        if self.sign is None:
            filters = self._derived.get(self.angles, self._filters, self.training)
        else:
            filters = self.direction()
        if self.activation is None:
            # Filters are smaller than what they give.
            return self._conv_forward(input, self._scaled(filters), self.radius * self.location)
        activated = self._conv_forward(input, filters, self.location).relu_()
        return self.radius.to(activated.dtype).view(-1, *(1,) * len(self.kernel_size)) * activated

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class GmPConv1d(_GmPConv):
    """``nn.Conv1d`` with filters on the hypersphere. Its arguments, and ``activation``; see :class:`GmPConv2d`."""

    _plain = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward


class GmPConv2d(_GmPConv):
    """``radius * act(conv(x, u) + location)``: ``nn.Conv2d`` whose units, the filters, are on the hypersphere.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. What :class:`GmPLinear` says of dtypes, of
    inference and of when it is advisable holds here too, with m = C_in / groups * kH * kW. For deep nets put an
    :class:`InputMeanNorm` before it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype:
            ``nn.Conv2d``'s.
        bias: as ``nn.Conv2d``'s. False keeps location at 0, as a buffer: every filter's boundary passes through the
            origin, the functions are those of ``nn.Conv2d(bias=False)``, and the state_dict has the same keys.
        activation: None or "relu"; the radius acts after it.

    Parameters angles (C_out, m - 1), radius (C_out,), location (C_out,), filled by :func:`lcw_ops.init.gmp_`; buffer
    sign (C_out,) where m = 1.

    Raises:
        ValueError: an unknown activation, filters without an element, and what ``nn.Conv2d`` raises.
    """

    _plain = nn.Conv2d
    _conv_forward = nn.Conv2d._conv_forward


class GmPConv3d(_GmPConv):
    """``nn.Conv3d`` with filters on the hypersphere. Its arguments, and ``activation``; see :class:`GmPConv2d`."""

    _plain = nn.Conv3d
    _conv_forward = nn.Conv3d._conv_forward


class _WeightNormConv(_Conv):
    """What the three ranks share."""

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
    ) -> None:
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(self._plain(*arguments, device="meta", dtype=dtype))
        _make_weight_norm(self, (out_channels, *self._filter_shape), bias, device, dtype)

    @classmethod
    def from_conv(cls, layer: nn.Module) -> "_WeightNormConv":
        """The layer that gives what a trained plain one gives; all as in :meth:`WeightNormLinear.from_linear`."""
        weight, bias = _applied_parameters(f"{cls.__name__}.from_conv", layer, cls._plain)
        made = nn.utils.skip_init(
            cls, **cls._arguments_of(layer), bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        return _fill_weight_norm(made.train(layer.training), weight, bias)

    def reset_parameters(self) -> None:
        self._plain.reset_parameters(self)
        _reset_scale(self)

    def effective_weight(self) -> Tensor:
        """(out_channels, in_channels / groups, *kernel_size), filters of length |scale|."""
        return self._filters(self.weight, self.scale)

    @staticmethod
    def _filters(weight: Tensor, scale: Tensor) -> Tensor:
        return F.normalize_scale(weight.flatten(1), scale).view(weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        filters = self._derived.kept(self._filters, self.training, self.weight, self.scale)
        return self._conv_forward(input, self.effective_weight() if filters is None else filters, self.bias)


class WeightNormConv1d(_WeightNormConv):
    """``nn.Conv1d`` with weight normalization by filters. Its arguments; see :class:`WeightNormConv2d`."""

    _plain = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward


class WeightNormConv2d(_WeightNormConv):
    """``nn.Conv2d`` whose filters are ``scale * weight / ||weight||``, the norm over all of a filter.

    Input (N, C_in, H, W) or (C_in, H, W), output as ``nn.Conv2d``'s. What :class:`WeightNormLinear` says of the
    beginning, of zero rows and of inference holds here too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            ``nn.Conv2d``'s.

    Parameters weight and bias in ``nn.Conv2d``'s shapes, scale (C_out,).

    Raises:
        ValueError: filters without an element, and what ``nn.Conv2d`` raises.
    """

    _plain = nn.Conv2d
    _conv_forward = nn.Conv2d._conv_forward


class WeightNormConv3d(_WeightNormConv):
    """``nn.Conv3d`` with weight normalization by filters. Its arguments; see :class:`WeightNormConv2d`."""

    _plain = nn.Conv3d
    _conv_forward = nn.Conv3d._conv_forward


class InputMeanNorm(nn.Module):
    """Subtracts every channel's mean, over the batch and all positions: ``y = x - E x``. No scale, nothing to learn.

    For deep GmP nets, before a GmP layer (after the previous ReLU, before pooling). In training the mean is the
    batch's, and gradients flow through it; in eval mode it is the running mean. Source: as :class:`GmPLinear`, its
    authors' code (decay 0.99 of the running mean). Each process of a distributed run takes its own batch's mean.

    Input (N, C, *) of any rank from 2 on; output of its shape, dtype and memory format. An empty batch comes back empty
    and moves no statistics. Of a batch with one value per channel nothing is left but zeros.

    Args:
        num_features: C.
        momentum: share of the new mean in the running one, 0 to 1; None is the average of all batches, as
            ``nn.BatchNorm2d``'s.
        device, dtype: of the running mean; it is kept in float32 at least, for 16 bits would not notice such steps.

    Buffers running_mean (C,) and num_batches_tracked (), as ``nn.BatchNorm2d``'s. 16-bit inputs are averaged and
    shifted in float32 and rounded once.

    Raises:
        ValueError: a momentum outside [0, 1]; an input of another shape.
        TypeError: an input that is not floating, or float64 where the running mean is float32, or the reverse.
    """

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if momentum is not None:
            check_non_negative("InputMeanNorm", "momentum", momentum)
            if momentum > 1:
                raise ValueError(f"InputMeanNorm: momentum is {momentum}; expected 0 to 1, or None for an average.")
        self.num_features = num_features
        self.momentum = momentum
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.int64))

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        if self.training and input.numel() > 0:
            positions = [dim for dim in range(input.dim()) if dim != 1]
            mean = input.mean(positions, keepdim=True, dtype=self.running_mean.dtype)
            self._track(mean.detach().flatten())
        else:
            mean = self.running_mean.view(-1, *(1,) * (input.dim() - 2))
        return (input - mean).to(input.dtype)

    def _track(self, mean: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            # On the device: reading the count would wait for it.
            share = self.num_batches_tracked.to(mean.dtype).reciprocal()
        self.running_mean.add_((mean - self.running_mean) * share)

    def _check(self, input: Tensor) -> None:
        right = input.dim() >= 2 and input.shape[1] == self.num_features
        check_shape("InputMeanNorm", "input", input, right, f"(N, {self.num_features}, *), channels in dim 1")
        kept = self.running_mean.dtype
        if input.dtype not in FLOATING or torch.promote_types(input.dtype, torch.float32) != kept:
            expected = "float32, bfloat16 or float16" if kept == torch.float32 else kept
            raise TypeError(
                f"InputMeanNorm: input is {input.dtype}; expected {expected}, for running_mean is {kept}. "
                f"Convert one of the two."
            )

    def _apply(self, fn, recurse=True):
        running_mean = self.running_mean
        super()._apply(fn, recurse)
        if self.running_mean.dtype in (torch.bfloat16, torch.float16):
            self.running_mean = running_mean.to(dtype=torch.float32, device=self.running_mean.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"


def gmp_parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for ``torch.optim``'s optimizers: angles of a GmP layer of fan-in m get the rate lr / sqrt(m), no decay.

    Adam moves every angle by about its rate, which turns a unit by sqrt(m / 2) times that: with these groups by about
    the same at every fan-in. Derived here, as is the decay: that of the plain layer, w = r u and b = r lambda, is the
    radius' alone. Locations are not decayed (that would draw every boundary to the origin), angles never (0 is a pole).

    Args:
        model: its GmP layers are found by type, wherever they are.
        lr: the rate of all but angles. Schedulers that multiply rates (most) keep the ratios; those that are given
            absolute ones, such as OneCycleLR's max_lr, need a list: ``[group["lr"] for group in groups]``.
        weight_decay: of all but angles and locations.

    Returns:
        In this order, without empty ones: all other parameters with the radii; locations; angles, one group per fan-in,
        ascending. Each in the order of ``model.parameters()``: shared ones once, frozen ones too, as an optimizer takes
        them. The order depends on the model alone, so that an optimizer's state_dict can be loaded again.

    Raises:
        TypeError or ValueError: lr or weight_decay is not a finite number >= 0.
    """
    check_non_negative("gmp_parameter_groups", "lr", lr)
    check_non_negative("gmp_parameter_groups", "weight_decay", weight_decay)
    fan_ins, locations = {}, set()
    for module in model.modules():
        if isinstance(module, (GmPLinear, _GmPConv)):
            fan_in = module.angles.shape[1] + 1
            fan_ins.update(dict.fromkeys(_parameters_of(module, "angles"), fan_in))
            locations.update(_parameters_of(module, "location"))
    # Keys in the order of the groups; no fan-in is below 1.
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


def _parameters_of(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter of this name, or those that a parametrization makes it of; none of a buffer."""
    if nn.utils.parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())
    value = getattr(module, name)
    return [value] if isinstance(value, nn.Parameter) else []


def _are_per_unit(rows: Tensor, *vectors: Tensor) -> bool:
    """Whether each is one number per row, of the rows' kind: torch's functions would broadcast and cast others."""
    return all(vector.shape == rows.shape[:1] and vector.dtype == rows.dtype for vector in vectors)


def _check_fan_in(module: nn.Module, fan_in: int) -> None:
    if fan_in < 1:
        raise ValueError(
            f"{type(module).__name__}: a unit has {fan_in} inputs; expected at least 1, for without one it has no "
            f"direction."
        )


def _make_gmp(module: nn.Module, units: int, fan_in: int, activation: str | None, bias: bool, device, dtype) -> None:
    _check_fan_in(module, fan_in)
    check_choice(type(module).__name__, "activation", activation, (None, "relu"))
    module.activation = activation
    module.angles = nn.Parameter(torch.empty(units, fan_in - 1, device=device, dtype=dtype))
    module.radius = nn.Parameter(torch.empty(units, device=device, dtype=dtype))
    location = torch.empty(units, device=device, dtype=dtype)
    if bias:
        module.location = nn.Parameter(location)
    else:
        module.register_buffer("location", location)
    module.register_buffer("sign", torch.empty(units, device=device, dtype=dtype) if fan_in == 1 else None)
    module._derived = DerivedWeight()
    module.reset_parameters()


@torch.no_grad()
def _reset_gmp(module: nn.Module) -> None:
    init.gmp_(module.angles, module.radius, module.location)
    if module.sign is not None:
        # The sign of a uniform weight, which does not depend on its length: that is the radius.
        module.sign.bernoulli_().mul_(2).sub_(1)


def _make_weight_norm(module: nn.Module, shape: tuple[int, ...], bias: bool, device, dtype) -> None:
    _check_fan_in(module, math.prod(shape[1:]))
    module.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    module.scale = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
    module.register_parameter("bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None)
    module._derived = DerivedWeight()
    module.reset_parameters()


@torch.no_grad()
def _reset_scale(module: nn.Module) -> None:
    rows = module.weight.flatten(1).to(torch.promote_types(module.weight.dtype, torch.float32))
    # <w, w / ||w||>: no square of a row's entries, so no length over- or underflows.
    module.scale.copy_((rows * normalize_scale(rows, rows.new_ones(len(rows)))).sum(1))


@torch.enable_grad()
def _applied_parameters(function: str, layer: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weight that a plain layer applies, whatever it is made of, and its bias; they say what is trained."""
    if not isinstance(layer, kind):
        raise TypeError(f"{function}: layer is a {type(layer).__name__}; expected a torch.nn.{kind.__name__}.")
    is_constrained = hasattr(layer, "effective_weight")
    return layer.effective_weight() if is_constrained else layer.weight, layer.bias


@torch.no_grad()
def _fill_gmp(function: str, module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """angles, sign, radius and location such that radius * u is the weight and radius * location the bias."""
    rows = weight.flatten(1).double()
    module.angles.copy_(hypersphere_angles(rows))
    direction = hypersphere_direction(module.angles.double())
    if module.sign is not None:
        # A weight of 0 looks to the right.
        direction = torch.where(rows < 0, -direction, direction)
        module.sign.copy_(direction.squeeze(1))
    # <w, u> is ||w||.
    module.radius.copy_((rows * direction).sum(1))
    radius = module.radius.double()
    plain_bias = torch.zeros_like(radius) if bias is None else bias.double()
    module.location.copy_((plain_bias / radius).masked_fill(radius == 0, 0.0))
    # A layer on the meta device has nothing to check.
    if not weight.is_meta:
        is_relu = module.activation == "relu"
        is_finite = radius.isfinite() & module.location.isfinite()
        is_constant = (radius == 0) & ((plain_bias.relu() if is_relu else plain_bias) != 0)
        _check_units(function, is_finite, "have a weight, or a bias over the weight's length, that is not finite")
        _check_units(function, ~is_constant, "are constants, of weight 0 and another bias")
    for parameter in (module.angles, module.radius):
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        module.location.requires_grad_(bias.requires_grad)
    return module


def _check_units(function: str, right: Tensor, what: str) -> None:
    if not right.all():
        raise ValueError(
            f"{function}: units {(~right).nonzero().flatten().tolist()} of layer {what}; expected units that "
            f"radius * act(u.x + location) can be. Leave this layer plain, or change these units."
        )


@torch.no_grad()
def _fill_weight_norm(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight.copy_(weight)
    _reset_scale(module)
    for parameter in (module.weight, module.scale):
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        module.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return module
