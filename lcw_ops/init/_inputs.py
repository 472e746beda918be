"""The inputs of a layer's units: how large their inputs are, and samples of them.

A unit of a linear layer sees a row. A unit of a convolution, a filter, sees a patch, of the channels of its group. A
unit of a transposed convolution is an output channel. At every position of its output it sees, for every entry of its
filter, the input that this entry meets there, or nothing (0). With stride t, one tap of a kernel in t meets an input on
average, so that a unit has C_in / groups * prod(k / t) inputs per output, ignoring the border.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcw_ops._checks import check_shape
from lcw_ops._layer_kinds import is_linear
from lcw_ops.init.lps import MOST_SAMPLES

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def assumed_moment(layer: Any, inputs: int, second_moment: float, variance: float, zero_sum: bool) -> float:
    """The mean square that each of a unit's weights meets, for iid inputs a with E a^2 and Var a.

    E z^2 is the weights' and the bias's variance times (M * this + 1), where M is the number of free weights: one less
    than the unit's inputs if they sum to zero. There, a transposed convolution takes its mean over all M entries, those
    that meet no input included: with H inputs of M, E sum (a - abar)^2 = H E a^2 - (H Var a + H^2 (E a)^2) / M.
    """
    if not zero_sum:
        share = 1.0 / math.prod(layer.stride) if isinstance(layer, TRANSPOSED) else 1.0
        return second_moment * share
    if not isinstance(layer, TRANSPOSED) or inputs < 2:
        return variance
    # The number of taps of each dimension that meet an input, at each of the phases of the output.
    taps = [_taps(layer, dim).sum(1).double() for dim in range(len(layer.stride))]
    channels = layer.in_channels // layer.groups
    met = channels * math.prod(of_phase.mean().item() for of_phase in taps)
    met_squared = channels**2 * math.prod(of_phase.square().mean().item() for of_phase in taps)
    square_of_mean = second_moment - variance
    power = met * second_moment - (met * variance + met_squared * square_of_mean) / inputs
    return power / (inputs - 1)


def is_dead(layer: Any, x: Tensor) -> bool:
    """Whether a layer's input is that of a dead net: it is 0 or does not change, up to rounding.

    The values of the layers before have the size 1. Where all units of a ReLU layer are off, those that are anchored at
    the edge of the data are 0 there up to rounding, and where all inputs are equal, so are all anchored units. A scale
    that made rounding as large as data would be useless, and huge. An input that is 0 nearly everywhere is doubtful
    already if it has lost half of its digits.
    """
    if x.numel() == 0:
        return False
    largest, eps = x.abs().max().item(), torch.finfo(x.dtype).eps
    if largest <= 64 * eps or (largest <= math.sqrt(eps) and torch.count_nonzero(x).item() <= x.numel() / 4):
        return True
    rows = x.reshape(-1, x.shape[-1]) if is_linear(layer) else _batched(layer, x).transpose(0, 1).flatten(1).T
    return len(rows) > 1 and (rows - rows[0]).abs().max().item() <= 64 * eps * max(largest, 1.0)


def measured_power(layer: Any, x: Tensor, zero_sum: bool) -> Tensor:
    """(groups,): the mean of sum a^2 over all inputs of a unit; with zero_sum, of sum (a - abar)^2. In float64."""
    check_shape("lps_model_", "inputs", x, x.numel() > 0, "at least one sample in every layer")
    if is_linear(layer):
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        squares = (rows - rows.mean(1, keepdim=True)).square() if zero_sum else rows.square()
        return squares.sum(1).mean().reshape(1)
    x = _batched(layer, x).detach().double()
    entries = x.shape[1] // layer.groups * math.prod(layer.kernel_size)
    by_group = x.unflatten(1, (layer.groups, x.shape[1] // layer.groups))
    squares = _sums_over_kernel(layer, by_group.square().sum(2))
    if zero_sum:
        squares = squares - _sums_over_kernel(layer, by_group.sum(2)).square() / entries
    return squares.transpose(0, 1).flatten(1).mean(1).clamp(min=0)


def samples_of(layer: Any, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """At most MOST_SAMPLES random inputs of a unit of the layer, as rows (S, inputs); one matrix per group."""
    check_shape("lps_model_", "inputs", x, x.numel() > 0, "at least one sample in every layer")
    where = x.device if generator is None else generator.device
    if is_linear(layer):
        rows = x.reshape(-1, x.shape[-1])
        chosen_rows = torch.randperm(len(rows), generator=generator, device=where)[:MOST_SAMPLES]
        return (rows[chosen_rows.to(x.device)],)
    spatial = len(layer.kernel_size)
    x = _batched(layer, x)
    if isinstance(layer, TRANSPOSED):
        windows, stride = _spread(layer, x), (1,) * spatial
    else:
        windows, stride = _padded(layer, x), layer.stride
    for dim, (size, step, dilation) in enumerate(zip(layer.kernel_size, stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + dim, dilation * (size - 1) + 1, step)[..., ::dilation]
    positions = (windows.shape[0], *windows.shape[2 : 2 + spatial])
    chosen = [torch.randint(count, (MOST_SAMPLES,), generator=generator, device=where) for count in positions]
    patches = windows.movedim(1, spatial + 1)[tuple(index.to(x.device) for index in chosen)]
    if isinstance(layer, TRANSPOSED):
        # The first tap of a filter meets the last input of a window.
        patches = patches.flip(tuple(range(2, patches.dim())))
    return tuple(group.flatten(1) for group in patches.chunk(layer.groups, dim=1))


def without_missed(layer: Any, samples: Tensor, generator: torch.Generator | None) -> Tensor:
    """The samples (S, inputs) of a transposed convolution, with 0 for the taps that meet no input.

    Each sample gets a random phase of the output's position in the stride.
    """
    if not isinstance(layer, TRANSPOSED):
        return samples
    where = samples.device if generator is None else generator.device
    shaped = samples.view(len(samples), -1, *layer.kernel_size)
    for dim, stride in enumerate(layer.stride):
        phase = torch.randint(stride, (len(samples),), generator=generator, device=where).to(samples.device)
        met = _taps(layer, dim).to(samples.device)[phase]
        shape = [len(samples), 1, *(1,) * len(layer.stride)]
        shape[2 + dim] = layer.kernel_size[dim]
        shaped = shaped * met.view(shape)
    return shaped.flatten(1)


def _taps(layer: Any, dim: int) -> Tensor:
    """(stride, k) of booleans: which taps of a transposed convolution meet an input, at each phase of the output."""
    stride, size, dilation = layer.stride[dim], layer.kernel_size[dim], layer.dilation[dim]
    phase, tap = torch.arange(stride)[:, None], torch.arange(size)
    return (phase - tap * dilation) % stride == 0


def _batched(layer: Any, x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-len(layer.kernel_size) - 1 :])


def _padded(layer: Any, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode)


def _spread(layer: Any, x: Tensor) -> Tensor:
    """The input on which a transposed convolution is a convolution of stride 1 with the mirrored filter.

    Between the inputs there are stride - 1 zeros, and around them as many as make the output's size.
    """
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], layer.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    steps: Any = (..., *(slice(None, None, stride) for stride in layer.stride))
    spread[steps] = x
    around = []
    for size, dilation, padding, output_padding in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        before = dilation * (size - 1) - padding
        around.append((before, before + output_padding))
    return F.pad(spread, list(itertools.chain(*reversed(around))))


def _sums_over_kernel(layer: Any, x: Tensor) -> Tensor:
    """(N, groups, *positions): the sums of x (N, groups, *size) over the inputs of a unit, at each output position."""
    dims, groups = len(layer.kernel_size), x.shape[1]
    ones = x.new_ones(groups, 1, *layer.kernel_size)
    convolve: Any
    if isinstance(layer, TRANSPOSED):
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return convolve(
            x, ones, None, layer.stride, layer.padding, layer.output_padding, groups, dilation=layer.dilation
        )
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(_padded(layer, x), ones, None, layer.stride, 0, layer.dilation, groups)
