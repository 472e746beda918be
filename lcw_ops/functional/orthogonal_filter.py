"""The deep orthogonal-filter recurrence: the arguments are checked here, once, and then one op runs.

    h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l),   l = 1..L

O_l is the fixed filter, u_l an input. A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245.
"""

import contextlib
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.functional import parallel_depth as _parallel_depth
from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter import in_backward as _in_backward
from lcw_ops.ops.orthogonal_filter import op as _op
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS, Recurrence, count_steps, state_dtype

_NAME = "orthogonal_filter"
_REQUIRED = ("h0", "weight", "filter")
_TENSORS = (*_REQUIRED, "bias", "inputs")

# torch.jit.trace records ten nodes per step: a trace of 256 steps loads in seconds, one of 50,000 would take minutes.
_MOST_UNROLLED = 256


def orthogonal_filter(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filter: Tensor,
    alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    inputs: Tensor | None = None,
    activation: str = "tanh",
    return_states: bool = False,
    segment: int | None = None,
    solver: str = "sequential",
    tolerance: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The whole deep recurrence, over depth or time, as one op.

    ``h <- alpha * (h @ O.T) + beta * act(h @ W.T + bias + inputs[t])``, for each of L layers (or T time steps).

    Shapes:
        h0 (M, N), weight (L, N, N) or (N, N), filter (N, N), (L, N, N) or (N,) -> (M, N), or (L+1, M, N) with
        ``return_states``.

    Args:
        h0: (M, N), the first state. Rows are samples. float32, float64, bfloat16 or float16. If h0 is 16-bit, the
            state and every accumulator are float32, and the result is rounded once.
        weight: (L, N, N), one matrix per layer, (out, in) like ``nn.Linear``'s; or (N, N), shared by all steps.
        bias: (L, N), (N,) or None.
        filter: O, the fixed orthogonal filter, never trained: (N, N) or (L, N, N), in float32 (float64 if h0 is), or an
            (N,) int64 permutation p with (O h)_i = h[p_i], which costs no arithmetic. This function does not check
            that a matrix is orthogonal; the modules check it once, at construction.
        alpha, beta: number or (L,) tensor. Default beta = 1/L and alpha = 1 - beta.
        inputs: (T, M, N), added to the pre-activation of step t, or None.
        activation: "tanh", "relu", "sigmoid" or "identity".
        return_states: return all states (L+1, M, N), h0 first, instead of the last one (M, N). On a CPU, with one
            weight for all steps, backward reads the returned states, and as many numbers more that forward keeps unless
            alpha or beta needs a gradient. If the states are changed in place before backward, torch raises an error,
            as for ``nn.RNN``'s output on a GPU.
        segment: keep every ``segment``-th state for the backward pass and recompute the others; default 128.
        solver: "sequential", layer by layer; "parallel", all layers of a window at once by Picard sweeps until they
            converge (all layers must share the filter); "auto", whichever was faster on this kind of machine in the
            measurements committed with the package, or sequential if there are none.
        tolerance: for the parallel solver, the largest error of a state, relative to its largest entry. It is
            estimated from the last two sweeps (a net can be constructed to deceive the estimate). Default
            eps sqrt(L) / 8 with the state dtype's eps, about the size of rounding errors.
        window: for the parallel solver, the number of layers to solve at once. Only one state per window is then kept
            for backward, which solves for the others again. By default the window suits the device, and all states
            (L+1, M, N) are kept. Fewer than 8 layers are solved layer by layer.

    If a window does not converge, the parallel solver halves it and all later windows of the pass. Once they have fewer
    than 8 layers, it continues sequentially. Either way it warns (RuntimeWarning). The host tests for convergence, so
    CUDA graphs cannot capture this solver. Second-order and forward-mode derivatives are computed layer by layer in
    plain torch. See docs/parallel_depth.md.

    Returns:
        (M, N), or (L+1, M, N) with ``return_states``, in h0's dtype.

    Raises:
        ValueError: shapes that do not fit each other, an unknown activation or solver, a filter that is not a
            permutation, a number alpha or beta that is not finite, segment or window < 1, tolerance <= 0; one filter
            per layer with the parallel solver; tolerance or window without it; exporting with a requested kernel while
            arguments require gradients, because the exported program would have none.
        TypeError: dtypes or devices that do not fit each other. Nothing is cast silently, with two exceptions: tensors
            alpha and beta take the state's dtype, and under autocast 16-bit arguments become float32.

    Source:
        A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245.
    """
    arguments = (
        h0, weight, bias, filter, alpha, beta, inputs, activation, return_states, segment, solver, tolerance, window
    )  # fmt: skip
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(orthogonal_filter, *arguments)
    for name, tensor in zip(_TENSORS, (h0, weight, filter, bias, inputs), strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in _REQUIRED):
            raise TypeError(_checks.describe(_NAME, name, f"is a {type(tensor).__name__}", "a torch.Tensor"))
    recurrence = Recurrence(h0, weight, bias, filter, alpha, beta, inputs)
    if _torch.is_autocast_enabled(h0):
        recurrence = recurrence.in_float32("h0", "weight", "bias", "inputs")
    options = activation, segment, solver, tolerance, window
    if not _torch.is_exporting():
        _check(recurrence, *options)
    else:
        _torch.unrecorded(_check, recurrence, *options)
        requested = backends.requested()
        if requested is None:
            return _export(recurrence, activation, return_states)
        if requested == "reference":
            # The sweeps of the parallel solver record no gradients.
            solver = "sequential"
        else:
            _check_exported_request(recurrence, requested)
    if solver == "auto":
        solver = _parallel_depth.choose_solver(*recurrence)
    if solver == "parallel":
        return _parallel_depth.solve(recurrence, activation, return_states, tolerance, window)
    return _solve(recurrence, activation, return_states, segment)


def _solve(recurrence: Recurrence, activation: str, return_states: bool, segment: int | None) -> Tensor:
    """Solve layer by layer, on the backend of the tensors' device."""
    h0 = recurrence.h0
    width, itemsize = h0.shape[1], 8 if h0.dtype == torch.float64 else 4
    fastest = None if h0.is_cpu else _op.fastest_on(h0.device, width, itemsize)
    backend = backends.choose(_op.NAME, h0.device, width, itemsize, fastest)
    if backend == "reference":
        with _without_autocast(h0.device):
            return _reference.orthogonal_filter(*recurrence, activation, return_states)
    recurrence, steps = recurrence.as_tensors()
    if not (torch.is_grad_enabled() and recurrence.needs_gradient()):
        segment = 0
    elif segment is None:
        segment = _op.DEFAULT_SEGMENT
    options = _op.Options(steps, activation, segment, return_states, backend)
    use = None
    # torch.compile would guard the entries of the dictionary.
    if not torch.compiler.is_compiling() and _in_backward.owners:
        use = _in_backward.find_use(recurrence)
    if use is not None:
        output = _in_backward.orthogonal_filter(use, recurrence, options)
    else:
        output, _ = library.apply(_op.OrthogonalFilter, _op.OrthogonalFilterForwardMode, *recurrence, *options)
    return output if output.dtype == h0.dtype else output.to(h0.dtype)


def _export(recurrence: Recurrence, activation: str, return_states: bool) -> Tensor:
    """The recurrence in torch's own operators: one scan, or every step in torch.jit.trace, which has no scan."""
    device = recurrence.h0.device
    if _torch.is_in_onnx_export():
        # The exporter would decompose the scan with its autograd formula, which fails for some symbolic sizes.
        recurrence = recurrence.detach()
    with _without_autocast(device):
        if not torch.jit.is_tracing():
            return _reference.orthogonal_filter_scan(*recurrence, activation, return_states)
        steps = _torch.unrecorded(count_steps, *recurrence[1:])
        if steps > _MOST_UNROLLED:
            came = f"has one entry for each of {steps} steps, and torch.jit.trace records every step"
            remedy = (
                "Use torch.export.export, or torch.onnx.export(..., dynamo=True), which record one scan of any length."
            )
            raise ValueError(_checks.describe(_NAME, "an argument", came, f"at most {_MOST_UNROLLED} steps", remedy))
        return _reference.orthogonal_filter(*recurrence, activation, return_states)


def _check_exported_request(recurrence: Recurrence, requested: str) -> None:
    """Raise ValueError if the exported program would lose gradients: an exported call of a kernel has none."""
    if torch.is_grad_enabled() and recurrence.needs_gradient():
        came = f"{requested!r} was requested while exporting, and an exported call of its kernel has no gradients"
        remedy = (
            "Export without the request (use_backend or LCW_OPS_BACKEND), or, for inference only, under "
            "torch.no_grad()."
        )
        expected = "no request, because grad mode is on and arguments require gradients"
        raise ValueError(_checks.describe(_NAME, "backend", came, expected, remedy))


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, which would round the state to 16 bits in every step."""
    # Autocast does not know the meta device.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _check(
    recurrence: Recurrence,
    activation: str,
    segment: int | None,
    solver: str,
    tolerance: float | None,
    window: int | None,
) -> None:
    h0, weight, bias, filter, alpha, beta, inputs = recurrence
    if h0.dtype not in _checks.FLOATING:
        _checks.accumulation_dtype(_NAME, h0=h0)
    if h0.dim() != 2:
        _checks.check_shape(_NAME, "h0", h0, False, "(M, N), samples x width")
    rows, width = h0.shape
    like_state = h0.dtype, h0.device
    # Compare shapes before a message is formatted: torch.compile recompiles for every size in a formatted string.
    if weight.dim() not in (2, 3) or weight.shape[-2] != width or weight.shape[-1] != width:
        expected = f"(L, {width}, {width}) or ({width}, {width}), as h0 is {tuple(h0.shape)}"
        _checks.check_shape(_NAME, "weight", weight, False, expected)
    if (weight.dtype, weight.device) != like_state:
        _refuse_unlike("weight", weight, h0)
    if bias is not None:
        if bias.dim() not in (1, 2) or bias.shape[-1] != width:
            expected = f"(L, {width}) or ({width},), as h0 is {tuple(h0.shape)}"
            _checks.check_shape(_NAME, "bias", bias, False, expected)
        if (bias.dtype, bias.device) != like_state:
            _refuse_unlike("bias", bias, h0)
    if inputs is not None:
        if inputs.dim() != 3 or inputs.shape[1] != rows or inputs.shape[2] != width:
            expected = f"(T, {rows}, {width}), as h0 is {tuple(h0.shape)}"
            _checks.check_shape(_NAME, "inputs", inputs, False, expected)
        if (inputs.dtype, inputs.device) != like_state:
            _refuse_unlike("inputs", inputs, h0)
    _check_filter(filter, h0)
    for name, scale in (("alpha", alpha), ("beta", beta)):
        if isinstance(scale, Tensor):
            if scale.dim() > 1 or not scale.is_floating_point() or scale.device != h0.device:
                came = f"is a {scale.dtype} tensor of shape {tuple(scale.shape)} on {scale.device}"
                expected = f"a number, or one floating-point number per step, (L,), on {h0.device}"
                raise ValueError(_checks.describe(_NAME, name, came, expected))
        # Compare instead of calling math.isfinite: under torch.compile the number may be a symbol.
        elif scale is not None and not -math.inf < scale < math.inf:
            raise ValueError(_checks.describe(_NAME, name, f"is {scale}", "a finite number"))
    if activation not in tuple(ACTIVATIONS):
        _checks.check_choice(_NAME, "activation", activation, ACTIVATIONS)
    if segment is not None:
        _checks.check_count(_NAME, "segment", segment)
    if solver != "sequential" or tolerance is not None or window is not None:
        _checks.check_solver(_NAME, solver, tolerance, window)
    if solver == "parallel" and filter.dim() == 3:
        expected = "one filter that all layers share, for the parallel solver"
        _checks.check_shape(_NAME, "filter", filter, False, expected, "Use solver='sequential'.")


def _refuse_unlike(name: str, tensor: Tensor, h0: Tensor) -> None:
    if tensor.dtype != h0.dtype:
        expected = f"{h0.dtype}, as h0 is"
        raise TypeError(_checks.describe(_NAME, name, f"is {tensor.dtype}", expected, "Convert one of the two."))
    _checks.check_devices(_NAME, h0=h0, **{name: tensor})


def _check_filter(filter: Tensor, h0: Tensor) -> None:
    width = h0.shape[1]
    if filter.requires_grad:
        came, expected = "requires a gradient", "a fixed filter"
        raise ValueError(_checks.describe(_NAME, "filter", came, expected, "Pass filter.detach()."))
    if filter.device != h0.device:
        _checks.check_devices(_NAME, h0=h0, filter=filter)
    if filter.dtype == torch.int64:
        if filter.dim() != 1 or filter.shape[0] != width:
            _checks.check_shape(_NAME, "filter", filter, False, f"({width},) for a permutation")
        _check_permutation(filter)
        return
    if filter.dtype != (torch.float64 if h0.dtype == torch.float64 else torch.float32):
        expected = f"{state_dtype(h0.dtype)} for a {h0.dtype} state, or an int64 permutation"
        remedy = "A filter in fewer bits is too far from orthogonal for thousands of layers."
        raise TypeError(_checks.describe(_NAME, "filter", f"is {filter.dtype}", expected, remedy))
    if filter.dim() not in (2, 3) or filter.shape[-2] != width or filter.shape[-1] != width:
        expected = f"({width}, {width}), (L, {width}, {width}) or an int64 permutation ({width},)"
        _checks.check_shape(_NAME, "filter", filter, False, expected)


def _check_permutation(permutation: Tensor) -> None:
    """Raise ValueError unless every index occurs once. The tensor is marked, so that a training loop checks it once.

    Under torch.compile and torch.func the values cannot be read here; the CPU kernel checks them. Meta and fake tensors
    have no values.
    """
    if torch.compiler.is_compiling() or _torch.is_functorch_wrapped(permutation):
        return
    # An inference tensor has no version counter, so it is checked every time.
    version = None if permutation.is_inference() else permutation._version
    if version is not None and getattr(permutation, "_lcw_ops_checked", None) == version:
        return
    if not _torch.has_values(permutation):
        return
    size = permutation.numel()
    if not torch.equal(permutation.sort().values, torch.arange(size, device=permutation.device)):
        came, expected = "is int64 but not a permutation", f"every index from 0 to {size - 1} once"
        raise ValueError(_checks.describe(_NAME, "filter", came, expected, f"torch.randperm({size}) makes one."))
    permutation._lcw_ops_checked = version  # type: ignore[attr-defined]
