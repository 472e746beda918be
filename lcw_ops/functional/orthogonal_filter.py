"""The deep orthogonal-filter recurrence: checked once here, then one op."""

import contextlib
import math

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops import reference as _reference
from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter import op as _orthogonal_filter
from lcw_ops.ops.parallel_depth import op as _parallel_depth
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS as _ACTIVATIONS
from lcw_ops.reference.orthogonal_filter import count_steps as _count_steps
from lcw_ops.reference.orthogonal_filter import scale_tensors as _scale_tensors
from lcw_ops.reference.orthogonal_filter import state_dtype as _state_dtype

# A trace holds ten nodes per step: 256 steps load in seconds, 50,000 steps would take minutes.
_MOST_UNROLLED = 256
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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

    ``h <- alpha * (h @ O.T) + beta * act(h @ W.T + bias + inputs[t])``, for every one of L layers (or T time steps).

    Source: A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245.

    Args:
        h0: (M, N), the first state; rows are samples. float32, float64, bfloat16 or float16. In 16 bits the state and
            every accumulator are float32, and the result is rounded once.
        weight: (L, N, N), one matrix per layer, (out, in) like ``nn.Linear``'s; or (N, N), shared over all steps.
        bias: (L, N), (N,) or None.
        filter: O, the fixed orthogonal filter, never trained: (N, N), (L, N, N), in float32 (float64 when h0 is), or an
            (N,) int64 permutation p with (O h)_i = h[p_i], which costs no arithmetic. That a matrix is orthogonal is
            not checked here; the modules check it once, at construction.
        alpha, beta: number or (L,) tensor. Default beta = 1/L and alpha = 1 - beta.
        inputs: (T, M, N), added to the pre-activation of step t, or None.
        activation: "tanh", "relu", "sigmoid" or "identity".
        return_states: give all states (L+1, M, N), h0 first, instead of the last one (M, N). On a CPU, with one weight
            for all steps, backward reads them: like ``nn.RNN``'s output on a GPU, they must not be changed in place
            before it (torch raises an error).
        segment: keep one state in so many for the backward pass and recompute the others; default 128.
        solver: "sequential", one layer after the other; "parallel", all layers of a window at once by Picard sweeps
            until they have converged (the filter must be shared by all layers); "auto", the one that measurements of
            this machine's kind committed with the package found faster, sequential where there are none.
        tolerance: of the parallel solver, the error of a state relative to its largest unit, as estimated from the last
            two sweeps (which nets made to deceive it can); default eps sqrt(L) / 8 of the state's dtype, about what
            rounding leaves anyway.
        window: of the parallel solver, layers at a time; between windows only the last state is kept for backward, and
            the others are solved for once more. Default: as many as suit the device, with all states kept: (L+1, M, N).
            Fewer than 8 layers are solved one after the other.

    The parallel solver halves a window that does not converge, for the rest of the call, goes on sequentially in the
    end, and then warns (RuntimeWarning). It decides on the host, so CUDA graphs cannot capture it. Derivatives of
    second order and in forward mode are computed layer by layer in plain torch. See docs/parallel_depth.md.

    Returns:
        (M, N), or (L+1, M, N) with ``return_states``, in h0's dtype.

    Raises:
        ValueError: shapes that do not fit each other, an unknown activation or solver, a filter that is not a
            permutation, a number alpha or beta that is not finite, segment or window < 1, tolerance <= 0; one filter
            per layer with the parallel solver; tolerance or window without it; while exporting, a requested kernel and
            arguments that require gradients, which the exported program would not have.
        TypeError: dtypes or devices that do not fit each other. Nothing is cast silently, except under autocast, where
            16-bit arguments become float32, and tensors alpha and beta, which take the state's dtype.
    """
    tensors = h0, weight, bias, filter, alpha, beta, inputs
    arguments = (*tensors, activation, return_states, segment, solver, tolerance, window)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(orthogonal_filter, *arguments)
    optional = ((name, tensor) for name, tensor in (("bias", bias), ("inputs", inputs)) if tensor is not None)
    for name, tensor in (("h0", h0), ("weight", weight), ("filter", filter), *optional):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"orthogonal_filter: {name} is {type(tensor).__name__}, expected a tensor")
    # Autocast does not know the meta device.
    if not h0.is_meta and torch.is_autocast_enabled(h0.device.type):
        h0, weight, bias, inputs = (_to_float32(tensor) for tensor in (h0, weight, bias, inputs))
    tensors = h0, weight, bias, filter, alpha, beta, inputs
    _torch.unrecorded(_check_orthogonal_filter, *tensors, activation, segment, solver, tolerance, window)
    if _torch.is_exporting():
        if backends.requested() is None:
            return _export(*tensors, activation, return_states)
        _check_exported_request(*tensors)
        if backends.requested() == "reference":
            # The sweeps of the parallel solver record no gradients.
            solver = "sequential"
    if solver == "auto":
        solver = _parallel_depth.choose_solver(h0, weight, bias, filter, alpha, beta, inputs)
    if solver == "parallel":
        return _solve_in_parallel(
            h0, weight, bias, filter, alpha, beta, inputs, activation, return_states, tolerance, window
        )
    dtype = _state_dtype(h0.dtype)
    backend = _orthogonal_filter.choose_kernel(h0.device, h0.shape[1], dtype.itemsize)
    if backend == "reference":
        with _without_autocast(h0.device):
            return _reference.orthogonal_filter(
                h0, weight, bias, filter, alpha, beta, inputs, activation, return_states
            )
    steps = _count_steps(weight, bias, filter, alpha, beta, inputs)
    alpha, beta = _scale_tensors(alpha, beta, steps, h0)
    result_dtype = h0.dtype
    if dtype != result_dtype:
        # Nearly all of the memory is the weight: every op reads it as it is, without a copy.
        h0, bias, inputs = (_to_float32(tensor) for tensor in (h0, bias, inputs))
    if not _may_need_gradient(h0, weight, bias, alpha, beta, inputs):
        segment = 0
    elif segment is None:
        segment = _orthogonal_filter.DEFAULT_SEGMENT
    functions = _orthogonal_filter.OrthogonalFilter, _orthogonal_filter.OrthogonalFilterForwardMode
    tensors = h0, weight, bias, filter, alpha, beta, inputs
    output, _ = library.apply(*functions, *tensors, steps, activation, segment, return_states, backend)
    return output.to(result_dtype)


def _export(h0, weight, bias, filter, alpha, beta, inputs, activation, return_states) -> Tensor:
    """The recurrence in torch's own operators: one scan, or every step in torch.jit.trace, which has no scan."""
    tensors = (h0, weight, bias, filter, alpha, beta, inputs)
    if _torch.is_in_onnx_export():
        # The exporter would decompose the scan with its autograd formula, which fails for some symbolic sizes.
        tensors = (tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in tensors)
    arguments = (*tensors, activation, return_states)
    with _without_autocast(h0.device):
        if not torch.jit.is_tracing():
            return _reference.orthogonal_filter_scan(*arguments)
        steps = _torch.unrecorded(_count_steps, weight, bias, filter, alpha, beta, inputs)
        if steps > _MOST_UNROLLED:
            raise ValueError(
                f"orthogonal_filter: torch.jit.trace records every step, and {steps} steps are more than "
                f"{_MOST_UNROLLED}; use torch.export.export, or torch.onnx.export(..., dynamo=True), which record "
                "one scan of any length"
            )
        return _reference.orthogonal_filter(*arguments)


def _check_exported_request(h0, weight, bias, filter, alpha, beta, inputs) -> None:
    """ValueError where the exported program would lose gradients: it has none for the op of a requested kernel."""
    requested = backends.requested()
    tensors = (tensor for tensor in (h0, weight, bias, alpha, beta, inputs) if isinstance(tensor, Tensor))
    if requested != "reference" and _may_need_gradient(*tensors):
        raise ValueError(
            f"orthogonal_filter: backend {requested!r} was requested while exporting, and an exported call of its "
            "kernel has no gradients, but gradients are recorded and arguments require them; export without the "
            "request (use_backend or LCW_OPS_BACKEND), or, for a program that only infers, under torch.no_grad()"
        )


def _without_autocast(device: torch.device):
    """A context without autocast, which would round the state to 16 bits in every step."""
    # Autocast does not know the meta device.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _solve_in_parallel(
    h0, weight, bias, filter, alpha, beta, inputs, activation, return_states, tolerance, window
) -> Tensor:
    backend = backends.choose(_parallel_depth.SWEEP, h0.device, h0.shape[1], _state_dtype(h0.dtype).itemsize)
    steps = _count_steps(weight, bias, filter, alpha, beta, inputs)
    alpha, beta = _scale_tensors(alpha, beta, steps, h0)
    result_dtype = h0.dtype
    if _state_dtype(result_dtype) != result_dtype:
        h0, bias, inputs = (_to_float32(tensor) for tensor in (h0, bias, inputs))
    tensors = h0, weight, bias, filter, alpha, beta, inputs
    keeps = _may_need_gradient(h0, weight, bias, alpha, beta, inputs)
    functions = _parallel_depth.ParallelOrthogonalFilter, _parallel_depth.ParallelOrthogonalFilterForwardMode
    options = (steps, activation, tolerance or 0.0, window or 0, return_states, keeps, backend)
    output, _ = library.apply(*functions, *tensors, *options)
    return output.to(result_dtype)


def _to_float32(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else _torch.cast(tensor, torch.float32)


def _may_need_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_orthogonal_filter(
    h0, weight, bias, filter, alpha, beta, inputs, activation, segment, solver, tolerance, window
) -> None:
    op = "orthogonal_filter"
    if h0.dtype not in _FLOATING:
        raise TypeError(f"{op}: h0 is {h0.dtype}, expected float32, float64, bfloat16 or float16")
    if h0.dim() != 2:
        raise ValueError(f"{op}: h0 has shape {tuple(h0.shape)}, expected (M, N): samples x width")
    rows, width = h0.shape
    _check_shape(op, "weight", weight, h0, [("L", width, width), (width, width)])
    if bias is not None:
        _check_shape(op, "bias", bias, h0, [("L", width), (width,)])
    if inputs is not None:
        _check_shape(op, "inputs", inputs, h0, [("T", rows, width)])
    _check_filter(op, filter, h0)
    for name, scale in (("alpha", alpha), ("beta", beta)):
        if isinstance(scale, Tensor):
            if scale.dim() > 1 or not scale.is_floating_point() or scale.device != h0.device:
                raise ValueError(
                    f"{op}: {name} is a {scale.dtype} tensor of shape {tuple(scale.shape)} on {scale.device}, expected "
                    f"a number, or one floating-point number per step, (L,), on {h0.device}"
                )
        # Compared, not asked by math.isfinite, for torch.compile may have made a symbol of the number.
        elif scale is not None and not -math.inf < scale < math.inf:
            raise ValueError(f"{op}: {name} is {scale}, expected a finite number")
    _checks.check_choice(op, "activation", activation, _ACTIVATIONS)
    if segment is not None:
        _checks.check_count(op, "segment", segment)
    _check_solver(solver, filter, tolerance, window)


def _check_solver(solver: str, filter: Tensor, tolerance: float | None, window: int | None) -> None:
    op = "orthogonal_filter"
    _checks.check_solver(op, solver, tolerance, window)
    if solver == "parallel" and filter.dim() == 3:
        raise ValueError(
            f"{op}: filter has shape {tuple(filter.shape)}, one per layer, but the parallel solver needs one filter "
            "that all layers share; use solver='sequential'"
        )


def _check_shape(op: str, name: str, tensor: Tensor, h0: Tensor, expected: list[tuple]) -> None:
    """``expected`` lists the shapes that fit; a string stands for any length."""
    fits = any(
        len(shape) == tensor.dim()
        and all(isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape, strict=True))
        for shape in expected
    )
    if not fits:
        shapes = " or ".join(str(shape).replace("'", "") for shape in expected)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shapes} for h0 {tuple(h0.shape)}")
    if tensor.dtype != h0.dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype} and h0 is {h0.dtype}; give both the same dtype")
    if tensor.device != h0.device:
        raise TypeError(f"{op}: {name} is on {tensor.device} and h0 on {h0.device}; move one of them")


def _check_filter(op: str, filter: Tensor, h0: Tensor) -> None:
    width = h0.shape[1]
    if filter.requires_grad:
        raise ValueError(f"{op}: filter requires a gradient, but the filter is fixed; pass filter.detach()")
    if filter.device != h0.device:
        raise TypeError(f"{op}: filter is on {filter.device} and h0 on {h0.device}; move one of them")
    if filter.dtype == torch.int64:
        if filter.shape != (width,):
            raise ValueError(f"{op}: the permutation has shape {tuple(filter.shape)}, expected ({width},)")
        _check_permutation(op, filter)
        return
    dtype = _state_dtype(h0.dtype)
    if filter.dtype != dtype:
        raise TypeError(
            f"{op}: filter is {filter.dtype}, expected {dtype} for a {h0.dtype} state, or an int64 permutation: "
            "a filter in fewer bits is not orthogonal over thousands of layers"
        )
    if filter.dim() not in (2, 3) or filter.shape[-2:] != (width, width):
        raise ValueError(
            f"{op}: filter has shape {tuple(filter.shape)}, expected ({width}, {width}), (L, {width}, {width}) or an "
            f"int64 permutation ({width},)"
        )


def _check_permutation(op: str, permutation: Tensor) -> None:
    """Every index once. The answer is remembered on the tensor, so that a training loop pays for it once.

    Under torch.compile and torch.func the values are not there to look at: the CPU kernel checks them itself. Meta and
    fake tensors have no values.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(permutation):
        return
    # An inference tensor counts no versions: it is checked every time.
    version = None if permutation.is_inference() else permutation._version
    if version is not None and getattr(permutation, "_lcw_ops_checked", None) == version:
        return
    if not _torch.has_values(permutation):
        return
    if not torch.equal(permutation.sort().values, torch.arange(permutation.numel(), device=permutation.device)):
        raise ValueError(
            f"{op}: filter is an int64 tensor but not a permutation: it must hold every index from 0 to "
            f"{permutation.numel() - 1} once; torch.randperm({permutation.numel()}) makes one"
        )
    permutation._lcw_ops_checked = version
