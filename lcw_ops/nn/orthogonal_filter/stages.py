"""An OrthogonalFilterMLP cut into stages that follow each other, for pipelines over processes or devices.

A stage is a range of layers h_l = alpha O h_{l-1} + beta act(W_l h_{l-1} + b_l) with the scales of the whole net. Its
tensors are views of the whole's, so nothing is copied.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops._checks import describe
from lcw_ops.nn.orthogonal_filter.base import _OrthogonalFilter
from lcw_ops.nn.orthogonal_filter.memory import is_distributed, is_lost, mark_lost
from lcw_ops.reference.orthogonal_filter import state_dtype

_FUNCTION = "OrthogonalFilterMLP.stages"


class OrthogonalFilterStage(_OrthogonalFilter):
    """A range of the layers of an :class:`lcw_ops.nn.OrthogonalFilterMLP`, made by its method ``stages``.

    Shapes:
        input (*, width), or (*, in_features) in the first stage -> output (*, width), or (*, out_features) in the last.

    Between stages, the states of a 16-bit net are float32, as they are inside the recurrence.

    Attributes:
        start, stop: the stage's layers are start..stop - 1 of the whole net's.
        depth: their number.
        weight, bias: (depth, width, width) and (depth, width), parameters on the whole's memory.
        input_layer, output_layer: the whole's own modules; None in the stages that do not have them.
        filter, alpha, beta: the whole's, or this stage's part of them if there is one per layer.

    Raises:
        ValueError, TypeError: in a forward pass, an input of the wrong shape or dtype.
    """

    weight: nn.Parameter

    def __init__(self, whole: Any, start: int, stop: int) -> None:
        scales = {name: _part(getattr(whole, name), whole.depth, start, stop) for name in ("alpha", "beta")}
        super().__init__(
            whole.width,
            stop - start,
            "identity",
            scales["alpha"],
            scales["beta"],
            whole.activation,
            whole.segment,
            device=whole.filter.device,
            dtype=whole.filter.dtype if whole.filter.is_floating_point() else None,
            solver=whole.solver,
            tolerance=whole.tolerance,
            window=whole.window,
        )
        self.in_features, self.width, self.out_features = whole.in_features, whole.width, whole.out_features
        self.start, self.stop, self.depth = start, stop, stop - start
        self.input_layer = whole.input_layer if start == 0 else None
        self.output_layer = whole.output_layer if stop == whole.depth else None
        for name in ("weight", "bias"):
            self.register_parameter(name, _view(getattr(whole, name), start, stop))
        # The base class has copied the tensors that are buffers, and made a filter to be replaced.
        filter = whole.filter.detach()
        self.filter, self.filter_kind = filter[start:stop] if filter.dim() == 3 else filter, whole.filter_kind
        self._drawn_filter = whole._drawn_filter
        for name, scale in scales.items():
            if name in self._buffers:
                setattr(self, name, scale)
        for name, tensor in whole._kept_tensors().items():
            own = getattr(self, name)
            if own is not tensor and is_lost(tensor):
                mark_lost(own)

    def forward(self, x: Tensor) -> Tensor:
        state = x if self.input_layer is None else self._apply_input_layer(x)
        weight: Any = self.weight
        bias: Any = self.bias
        if weight.dtype in (torch.bfloat16, torch.float16):
            # The whole net rounds its state once, after the last layer. So must the stages together.
            dtype = state_dtype(weight.dtype)
            state = state.to(torch.promote_types(state.dtype, dtype))
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        h = F.orthogonal_filter(
            state.reshape(-1, state.shape[-1]),
            weight,
            bias,
            self.filter,
            self.alpha,
            self.beta,
            activation=self.activation,
            segment=self.segment,
            solver=self.solver,
            tolerance=self.tolerance,
            window=self.window,
        )
        if self.output_layer is None:
            # Schedules that split the backward pass detach this output in place, and torch refuses that for a view.
            return h if x.dim() == 2 else h.reshape(x.shape[:-1] + (self.width,)).clone()  # noqa: RUF005
        if self.weight.dtype in (torch.bfloat16, torch.float16) and not _is_autocast(h):
            h = h.to(self.weight.dtype)
        return self.output_layer(h).reshape(x.shape[:-1] + (self.out_features,))  # noqa: RUF005

    def __deepcopy__(self, memo) -> "OrthogonalFilterStage":
        # torch would copy all of the memory that a view belongs to: the whole net for each of its stages.
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None and id(tensor) not in memo and _is_part(tensor):
                memo[id(tensor)] = _copy(tensor)
        replica = memo[id(self)] = self.__new__(type(self))
        replica.__setstate__(copy.deepcopy(super().__getstate__(), memo))
        return replica

    def __getstate__(self) -> dict:
        # As for a copy: a pickle of a stage holds its own layers alone.
        state = super().__getstate__()
        for kind in ("_parameters", "_buffers"):
            state[kind] = {
                name: tensor if tensor is None or not _is_part(tensor) else _copy(tensor)
                for name, tensor in state[kind].items()
            }
        return state

    def extra_repr(self) -> str:
        return f"width={self.width}, layers {self.start}..{self.stop - 1}, {self._scales_repr()}"


def make_stages(whole: Any, n: int) -> list[nn.Module]:
    """The list that :meth:`lcw_ops.nn.OrthogonalFilterMLP.stages` returns; ``whole`` is the net."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(describe(_FUNCTION, "n", f"is {n!r}", "an int"))
    if not 1 <= n <= whole.depth:
        expected = f"1 to {whole.depth}, the number of layers, because every stage has at least one"
        raise ValueError(describe(_FUNCTION, "n", f"is {n}", expected))
    for name in ("weight", "bias", "alpha", "beta"):
        tensor = getattr(whole, name)
        if isinstance(tensor, Tensor) and (name not in whole._parameters and name not in whole._buffers):
            came = "is computed from other tensors (a parametrization or pruning)"
            raise ValueError(describe(_FUNCTION, name, came, "a parameter, whose memory the stages share"))
        if isinstance(tensor, Tensor) and is_distributed(tensor):
            remedy = "Cut the net first, and shard the stages."
            raise ValueError(describe(_FUNCTION, name, "is a DTensor", "a plain tensor", remedy))
    bounds = [whole.depth * stage // n for stage in range(n + 1)]
    return [OrthogonalFilterStage(whole, *bound).train(whole.training) for bound in pairwise(bounds)]


def _is_autocast(tensor: Tensor) -> bool:
    # Autocast does not know the meta device.
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _part(scale: Any, depth: int, start: int, stop: int) -> Any:
    """A stage's part of alpha or beta. A number, and a scale that all layers share, stay as they are."""
    if not isinstance(scale, Tensor):
        return scale
    if scale.shape == (depth,):
        return _view(scale, start, stop)
    # One parameter for all stages: its gradient is the sum of theirs.
    return scale if isinstance(scale, nn.Parameter) else scale.detach()


def _view(tensor: Tensor | None, start: int, stop: int) -> Any:
    """Entries start..stop - 1, on the same memory: a parameter of a parameter, otherwise a tensor. None of None."""
    if tensor is None:
        return None
    view = tensor.detach()[start:stop]
    return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view


def _is_part(tensor: Tensor) -> bool:
    """Whether the tensor's memory is a part of a larger piece. A meta tensor has none."""
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def _copy(tensor: Tensor) -> Tensor:
    """A copy with memory of its own and, for a parameter, a copy of its gradient."""
    copied = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return copied
    parameter = nn.Parameter(copied, tensor.requires_grad)
    parameter.grad = None if tensor.grad is None else tensor.grad.clone()
    return parameter
