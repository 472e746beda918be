"""Modules of plain torch that ``fold`` puts where torch.nn has no layer for what ours computes."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lcw_ops import _torch, reference
from lcw_ops.reference.orthogonal_filter import state_dtype


class UnitScale(nn.Module):
    """Multiply every unit by its own number: the radii of a GmP layer, after its ReLU.

    Args:
        scale: a parameter (n,), one number per unit.
        dim: the units' dimension, counted from the end: -1 after a linear layer, -3 after a 2d convolution.
    """

    def __init__(self, scale: nn.Parameter, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        # Written with lists alone, because torch.jit.script knows no star.
        scale = self.scale if self.dim == -1 else self.scale.view([-1] + [1] * (-1 - self.dim))
        return scale.to(input.dtype) * input

    def extra_repr(self) -> str:
        return f"{len(self.scale)}, dim={self.dim}"


class _PlainOrthogonalFilter(nn.Module):
    """The recurrence h <- alpha O h + beta act(W h + b + u) as a loop over torch's own operators.

    As in the fused module, the state is in float32 at least, and the filter, alpha and beta keep their precision when
    the module is converted to 16 bits. An exported program holds the loop as one ``scan``.
    """

    filter: Tensor
    alpha: float | Tensor | None
    beta: float | Tensor | None
    bias: nn.Parameter | None
    activation: str

    def _take(self, source: Any, *names: str) -> None:
        """Take parameters, buffers, children and plain attributes of the fused module as they are."""
        for name in names:
            value = getattr(source, name)
            if name in source._buffers:
                self.register_buffer(name, value)
            elif name in source._parameters:
                self.register_parameter(name, value)
            else:
                setattr(self, name, value)

    def _keep_order(self, source: Any) -> None:
        """Let ``parameters()`` give the tensors in the fused module's order, by which optimizers store their state."""
        pairs: list[tuple[Any, Any]] = [(self._parameters, source._parameters), (self._buffers, source._buffers)]
        for own, others in pairs:
            for name in [name for name in others if name in own]:
                own[name] = own.pop(name)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in ("filter", "alpha", "beta")}
        exact = {name: tensor.detach() for name, tensor in kept.items() if isinstance(tensor, Tensor)}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                moved.data = before.to(dtype=torch.float32, device=moved.device)
        return self

    def _states(self, h0: Tensor, weight: Tensor, inputs: Tensor | None, return_states: bool) -> Tensor:
        tensors: list[Any] = [h0, weight, self.bias, inputs]
        is_autocast = not h0.is_meta and torch.is_autocast_enabled(h0.device.type)
        if is_autocast:
            # The state in 16 bits would lose steps of size beta.
            tensors = [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]
        h0, weight, bias, inputs = tensors
        arguments = (h0, weight, bias, self.filter, self.alpha, self.beta, inputs, self.activation, return_states)
        off = torch.autocast(h0.device.type, enabled=False) if is_autocast else contextlib.nullcontext()
        with off:
            if _torch.is_exporting() and not torch.jit.is_tracing():
                return reference.orthogonal_filter_scan(*arguments)
            return reference.orthogonal_filter(*arguments)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class PlainOrthogonalFilterMLP(_PlainOrthogonalFilter):
    """The function of :class:`lcw_ops.nn.OrthogonalFilterMLP` in plain torch. Its state dict is the same.

    Shapes:
        input (*, in_features) -> output (*, out_features).
    """

    input_layer: nn.Module
    output_layer: nn.Module
    weight: nn.Parameter
    width: int
    out_features: int

    def __init__(self, source: Any) -> None:
        super().__init__()
        self._take(source, "in_features", "width", "depth", "out_features", "activation", "input_layer", "weight")
        self._take(source, "bias", "output_layer", "filter", "alpha", "beta")
        self._keep_order(source)

    def forward(self, x: Tensor) -> Tensor:
        h0 = self.input_layer(x).reshape(-1, self.width)
        h = self._states(h0, self.weight, None, return_states=False)
        return self.output_layer(h).reshape(x.shape[:-1] + (self.out_features,))  # noqa: RUF005


class PlainOrthogonalFilterRNN(_PlainOrthogonalFilter):
    """The function of :class:`lcw_ops.nn.OrthogonalFilterRNN` in plain torch. Its state dict is the same.

    Shapes:
        input (T, B, input_size), with ``batch_first`` (B, T, input_size), or (T, input_size), or a ``PackedSequence``;
        hx (1, B, N) or (1, N), default zero -> output in the input's layout, h_n (1, B, N) or (1, N).
    """

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    hidden_size: int
    batch_first: bool

    def __init__(self, source: Any) -> None:
        super().__init__()
        self._take(source, "input_size", "hidden_size", "batch_first", "activation", "weight_ih", "weight_hh", "bias")
        self._take(source, "filter", "alpha", "beta")
        self._keep_order(source)

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        time_first = input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if self.batch_first else input
        batch = time_first.shape[1]
        h0 = input.new_zeros(batch, self.hidden_size) if hx is None else hx.reshape(batch, self.hidden_size)
        states = self._states(h0, self.weight_hh, nn.functional.linear(time_first, self.weight_ih), True)
        output, h_n = states[1:], states[-1:].clone()
        if input.dim() == 2:
            return output.squeeze(1), h_n.squeeze(1)
        return (output.transpose(0, 1) if self.batch_first else output), h_n

    def _run_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """One run for each stretch of time over which the batch stays the same."""
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        first = int(batch_sizes[0])
        state = data.new_zeros(first, self.hidden_size) if hx is None else hx.reshape(first, self.hidden_size)
        if hx is not None and sorted_indices is not None:
            state = state.index_select(0, sorted_indices)
        drive = nn.functional.linear(data, self.weight_ih)
        result_dtype = state_dtype(data.dtype) if torch.is_autocast_enabled(data.device.type) else data.dtype
        # The state stays in float32 between the stretches, as in one run over all steps.
        state, drive = state.to(state_dtype(data.dtype)), drive.to(state_dtype(data.dtype))
        weight = self.weight_hh.to(state.dtype)
        sizes, lengths = (counts.tolist() for counts in torch.unique_consecutive(batch_sizes, return_counts=True))
        stretches = drive.split([size * length for size, length in zip(sizes, lengths, strict=True)])
        outputs, ended = [], []
        for size, length, inputs in zip(sizes, lengths, stretches, strict=True):
            ended.append(state[size:])
            states = self._states(state[:size], weight, inputs.unflatten(0, (length, size)), True)
            outputs.append(states[1:].flatten(0, 1))
            state = states[-1]
        # The longest sequences come first and end last.
        h_n = torch.cat([state, *ended[::-1]]).to(result_dtype)
        if unsorted_indices is not None:
            h_n = h_n.index_select(0, unsorted_indices)
        output = PackedSequence(torch.cat(outputs).to(result_dtype), batch_sizes, sorted_indices, unsorted_indices)
        return output, h_n.unsqueeze(0)
