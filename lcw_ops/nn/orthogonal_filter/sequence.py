"""Converts the RNN's sequences (padded, packed or without a batch) into states and back."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lcw_ops import _torch
from lcw_ops import functional as F
from lcw_ops._checks import check_devices, check_shape, describe
from lcw_ops.nn.orthogonal_filter.base import dtype_message, goes_with
from lcw_ops.reference.orthogonal_filter import state_dtype

_RNN = "OrthogonalFilterRNN"


# These functions branch on the input's sizes. By ``__torch_function__``, torch.fx records each of them as one call.
def _start_sequence(input: Tensor, hx: Tensor | None, weight_ih: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The first state h_0 (B, N) and U x_t (T, B, N), the part of the pre-activations that the inputs contribute.

    B is the batch, N the number of units, T the number of steps, and U is ``weight_ih``.
    """
    arguments = (input, hx, weight_ih, batch_first)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(_start_sequence, *arguments)
    _torch.unrecorded(_check_sequence, input, hx, weight_ih, batch_first)
    if input.dim() == 2:
        input = input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    return _first_state(hx, input, input.shape[1], weight_ih), nn.functional.linear(input, weight_ih)


def _finish_sequence(states: Tensor, input: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """(output, h_n) in the input's layout."""
    arguments = (states, input, batch_first)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(_finish_sequence, *arguments)
    # Clone h_n: a view would keep the memory of all states alive, and an edit of it would change the output.
    output, h_n = states[1:], states[-1:].clone()
    if input.dim() == 2:
        return output.squeeze(1), h_n.squeeze(1)
    return (output.transpose(0, 1) if batch_first else output), h_n


def run_packed(packed, hx, weight_ih, weight_hh, bias, filter, alpha, beta, **options):
    """(output, h_n) of a packed sequence: one run for each stretch of time over which the batch stays the same.

    Padding is not computed, so it cannot overflow. ``batch_first`` does not apply to packed sequences.
    """
    if _torch.is_exporting():
        came = "is a PackedSequence, and the lengths of a PackedSequence would become constants"
        raise ValueError(describe(_RNN, "input", came, "a tensor while exporting", "Export with padded input."))
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    _check_packed(data, batch_sizes, hx, weight_ih)
    state = _first_state(hx, data, int(batch_sizes[0]), weight_hh)
    if hx is not None and sorted_indices is not None:
        state = state.index_select(0, sorted_indices)
    # The state stays in float32 between the stretches, as in one run over all steps.
    dtype = state_dtype(weight_hh.dtype)
    autocast = not data.is_meta and torch.is_autocast_enabled(data.device.type)
    result_dtype = dtype if autocast else weight_hh.dtype
    state, drive = state.to(dtype), nn.functional.linear(data, weight_ih).to(dtype)
    shared = weight_hh.to(dtype), None if bias is None else bias.to(dtype), filter, alpha, beta
    sizes, lengths = (counts.tolist() for counts in torch.unique_consecutive(batch_sizes, return_counts=True))
    stretches = drive.split([size * length for size, length in zip(sizes, lengths, strict=True)])
    outputs, ended = [], []
    for size, length, inputs in zip(sizes, lengths, stretches, strict=True):
        ended.append(state[size:])
        inputs = inputs.unflatten(0, (length, size))
        states = F.orthogonal_filter(state[:size], *shared, inputs=inputs, return_states=True, **options)
        outputs.append(states[1:].flatten(0, 1))
        state = states[-1]
    # The longest sequences come first and end last.
    h_n = torch.cat([state, *ended[::-1]]).to(result_dtype)
    if unsorted_indices is not None:
        h_n = h_n.index_select(0, unsorted_indices)
    output = PackedSequence(torch.cat(outputs).to(result_dtype), batch_sizes, sorted_indices, unsorted_indices)
    return output, h_n.unsqueeze(0)


def _first_state(hx: Tensor | None, like: Tensor, batch: int, weight_hh: Tensor) -> Tensor:
    """The first state (B, N), zeros by default. hx is (1, B, N), or (1, N) with a batch of one."""
    width = weight_hh.shape[0]
    return like.new_zeros(batch, width) if hx is None else hx.reshape(batch, width)


def _check_sequence(input: Tensor, hx: Tensor | None, weight_ih: Tensor, batch_first: bool) -> None:
    _check_tensors(input, hx, weight_ih)
    features = weight_ih.shape[1]
    # Format a message only for a wrong shape: torch.compile recompiles for every size in a formatted string.
    if input.dim() not in (2, 3) or input.shape[-1] != features:
        expected = f"{'(B, T' if batch_first else '(T, B'}, {features}) or (T, {features})"
        check_shape(_RNN, "input", input, False, expected)
    time = 1 if batch_first and input.dim() == 3 else 0
    _check_state(hx, weight_ih, *([input.shape[1 - time]] if input.dim() == 3 else []))
    check_shape(_RNN, "input", input, input.shape[time] != 0, "a sequence length larger than 0")


def _check_packed(data: Tensor, batch_sizes: Tensor, hx: Tensor | None, weight_ih: Tensor) -> None:
    _check_tensors(data, hx, weight_ih)
    features = weight_ih.shape[1]
    if data.dim() != 2 or data.shape[1] != features:
        check_shape(_RNN, "the packed input's data", data, False, f"(*, {features})")
    sizes = batch_sizes.tolist()
    if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != len(data):
        came = f"has batch_sizes that rise from one step to the next, or do not add up to its {len(data)} rows"
        remedy = "Make it with torch.nn.utils.rnn.pack_padded_sequence."
        raise ValueError(describe(_RNN, "the packed input", came, "non-increasing sizes that cover all rows", remedy))
    _check_state(hx, weight_ih, sizes[0])


def _check_state(hx: Tensor | None, weight_ih: Tensor, *batch: int) -> None:
    width = weight_ih.shape[0]
    if hx is not None and hx.shape != (1, *batch, width):
        expected = f"{(1, *batch, width)}" + ("" if batch else " for an input without a batch")
        check_shape(_RNN, "hx", hx, False, expected)


def _check_tensors(input: Tensor, hx: Tensor | None, weight: Tensor) -> None:
    if isinstance(input, PackedSequence):
        # OrthogonalFilterRNN.forward takes another path for it, so this call comes from a recorded graph.
        came, expected = "is a PackedSequence", "a tensor, because this graph was recorded for tensors"
        remedy = "Call the module itself, or pad the input: torch.nn.utils.rnn.pad_packed_sequence."
        raise TypeError(describe(_RNN, "input", came, expected, remedy))
    for name, tensor in (("input", input), *([] if hx is None else [("hx", hx)])):
        if not isinstance(tensor, Tensor):
            expected = "a tensor or a PackedSequence" if name == "input" else "a tensor"
            raise TypeError(describe(_RNN, name, f"is a {type(tensor).__name__}", expected))
        if not goes_with(tensor, weight):
            # torch.nn.RNN raises ValueError too.
            raise ValueError(dtype_message(_RNN, name, tensor, weight))
        check_devices(_RNN, weight_ih=weight, **{name: tensor})
