"""The public functions: one autograd boundary per hot path. Everything is validated here, once."""

import contextlib
import math
import operator

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops import reference as _reference
from lcw_ops.ops import _backends, _library
from lcw_ops.ops import gradient_activation as _gradient_activation
from lcw_ops.ops import hypersphere as _hypersphere
from lcw_ops.ops import lcw_linear as _lcw_linear
from lcw_ops.ops import orthogonal_filter as _orthogonal_filter
from lcw_ops.ops import parallel_depth as _parallel_depth
from lcw_ops.reference import checks as _checks
from lcw_ops.reference.gradient_activation import KINDS as _GRADIENT_ACTIVATION_KINDS
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS as _ACTIVATIONS
from lcw_ops.reference.orthogonal_filter import count_steps as _count_steps
from lcw_ops.reference.orthogonal_filter import scale_tensors as _scale_tensors
from lcw_ops.reference.orthogonal_filter import state_dtype as _state_dtype

__all__ = [
    "activation_shift",
    "gmp_linear",
    "gradient_activation_",
    "hypersphere_angles",
    "hypersphere_direction",
    "lcw_linear",
    "lcw_weight",
    "normalize_scale",
    "orthogonal_filter",
    "weight_norm_linear",
]


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
        if _backends.requested() is None:
            return _export(*tensors, activation, return_states)
        _check_exported_request(*tensors)
        if _backends.requested() == "reference":
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
    output, _ = _library.apply(*functions, *tensors, steps, activation, segment, return_states, backend)
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
    requested = _backends.requested()
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
    backend = _backends.choose(_parallel_depth.SWEEP, h0.device, h0.shape[1], _state_dtype(h0.dtype).itemsize)
    steps = _count_steps(weight, bias, filter, alpha, beta, inputs)
    alpha, beta = _scale_tensors(alpha, beta, steps, h0)
    result_dtype = h0.dtype
    if _state_dtype(result_dtype) != result_dtype:
        h0, bias, inputs = (_to_float32(tensor) for tensor in (h0, bias, inputs))
    tensors = h0, weight, bias, filter, alpha, beta, inputs
    keeps = _may_need_gradient(h0, weight, bias, alpha, beta, inputs)
    functions = _parallel_depth.ParallelOrthogonalFilter, _parallel_depth.ParallelOrthogonalFilterForwardMode
    options = (steps, activation, tolerance or 0.0, window or 0, return_states, keeps, backend)
    output, _ = _library.apply(*functions, *tensors, *options)
    return output.to(result_dtype)


def _to_float32(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else _torch.cast(tensor, torch.float32)


def _may_need_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


_CPU = torch.device("cpu")
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
# A trace holds ten nodes per step: 256 steps load in seconds, 50,000 steps would take minutes.
_MOST_UNROLLED = 256
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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


def lcw_weight(weight: Tensor, basis: bool = False) -> Tensor:
    """Rows of zero sum from an unconstrained parameter: inputs of equal means then cause no activation shift.

    centred: ``w = u - mean(u)`` over everything but dim 0. basis: ``w = B v`` with Householder's orthonormal basis of
    the zero-sum vectors, never stored: with s = sqrt(m) and S = sum(v), ``w_j = v_j - S / (s (s + 1))`` for j < m,
    ``w_m = -S / s``.

    Source: T. Kutsuna, "Linearly Constrained Weights: Reducing Activation Shift for Faster Training of Neural
    Networks", ECML PKDD 2019, arXiv 2403.13833 (the constraint and the basis form; the centred form is ours).

    Args:
        weight: (n, m, *k), or (n, m - 1) with ``basis``; one row, or filter, per unit. float32, float64, bfloat16 or
            float16; sums are taken in float32 or wider and the result is rounded once. A channels-last layout is kept.
        basis: the paper's parametrization.

    Returns:
        (n, m, *k), or (n, m). A fan-in of 1 leaves only the weight 0: (n, 1) zeros, whatever the parameter.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: fewer than 2 dimensions; with ``basis``, other than 2.
    """
    arguments = (weight, basis)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(lcw_weight, *arguments)
    _checks.accumulation_dtype("lcw_weight", weight=weight)
    _checks.check_dense("lcw_weight", weight=weight)
    if basis:
        right, expected, remedy = weight.dim() == 2, "(n, m-1)", "Flatten a filter to one row first."
    else:
        right, expected, remedy = weight.dim() >= 2, "(n, m, *k)", "A unit is one row: add dim 0."
    _checks.check_shape("lcw_weight", "weight", weight, right, expected, remedy)
    backend = _backends.choose(_lcw_linear.NAME, weight.device)
    if backend == "reference":
        return _reference.lcw_weight(weight, basis)
    return _lcw_linear.constrained_weight(weight, basis, backend)


def lcw_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, basis: bool = False) -> Tensor:
    """A linear layer whose rows sum to zero: ``x @ lcw_weight(weight, basis).T + bias``.

    A constant added to all features of a sample changes nothing. Source: as :func:`lcw_weight`. The constraint costs a
    pass over x or over the weight, whichever is smaller: <B v, x> = <v, B^T x>. Rounding errors are therefore relative
    to |w| |x - mean(x)| or to |w - mean(w)| |x|, those of x's gradient to |grad| |w| or to |grad| |w - mean(w)|. Under
    autocast it is laid on the weight, before that is rounded.

    On a CPU our own kernels or torch's matmul multiply, whichever took less time when a layer of such a size was first
    met. The answers are kept in ``~/.cache/lcw_ops`` (or ``LCW_OPS_CACHE_DIR``), so that later runs give the same bits;
    ``LCW_OPS_MATMUL=own`` or ``torch`` is the answer without measuring. Under ``torch.use_deterministic_algorithms``
    nothing is measured: up to 16 samples are ours.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16.
        weight: (n, m), or (n, m - 1) with ``basis``; x's dtype, or under autocast any.
        bias: (n,), or None.
        basis: the paper's parametrization, see :func:`lcw_weight`.

    Returns:
        (..., n), of x's dtype (under autocast: autocast's).

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes that do not fit.
    """
    arguments = (x, weight, bias, basis)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(lcw_linear, *arguments)
    if _is_plain_call(_lcw_linear.NAME, x, weight) and (bias is None or (isinstance(bias, Tensor) and bias.is_cpu)):
        # Small layers take as long as what is asked about them: the kernel checks, and it is asked after a refusal.
        try:
            return _lcw_linear.fused_linear(x, weight, bias, basis, "cpp")
        except (RuntimeError, TypeError, AttributeError, IndexError):
            _check_lcw_linear(x, weight, bias, basis)
            raise
    autocast = _check_lcw_linear(x, weight, bias, basis)
    backend = _backends.choose(_lcw_linear.NAME, x.device)
    if backend == "reference" and not autocast:
        return _reference.lcw_linear(x, weight, bias, basis)
    if not autocast and _lcw_linear.is_fused(x, backend):
        return _lcw_linear.fused_linear(x, weight, bias, basis, backend)
    rows = x.numel() // max(x.shape[-1], 1)
    if autocast or rows > weight.shape[0]:
        return torch.nn.functional.linear(x, lcw_weight(weight, basis), bias)
    return torch.nn.functional.linear(_lcw_linear.project(x, basis, backend), weight, bias)


def _is_plain_call(op, *tensors) -> bool:
    """Whether the CPU's kernel is called and nothing stands between: no autocast, transform, compiler or request."""
    for tensor in tensors:
        if not (isinstance(tensor, Tensor) and tensor.is_cpu):
            return False
    return (
        not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and _backends.choose(op, _CPU) == "cpp"
    )


def _check_lcw_linear(x, weight, bias, basis) -> bool:
    """Whether autocast, which takes tensors of any dtypes, is on."""
    op = "lcw_linear"
    # Autocast does not know the meta device.
    autocast = isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if autocast:
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None or name != "bias":
                _checks.accumulation_dtype(op, **{name: tensor})
    else:
        if weight is None:
            _checks.accumulation_dtype(op, weight=weight)
        _checks.accumulation_dtype(op, x=x, weight=weight, bias=bias)
    _checks.check_dense(op, x=x, weight=weight, bias=bias)
    if not isinstance(basis, int):
        raise TypeError(f"{op}: basis is a {type(basis).__name__}; expected True or False.")
    _checks.check_devices(op, x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        expected = "(n, m-1)" if basis else "(n, m)"
        _checks.check_shape(op, "weight", weight, False, expected, "Flatten a filter to one row first.")
    units, fan_in = weight.shape[0], weight.shape[1] + bool(basis)
    if x.dim() < 1 or x.shape[-1] != fan_in:
        _checks.check_shape(op, "x", x, False, f"(..., {fan_in}), the weight's fan-in")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != units):
        _checks.check_shape(op, "bias", bias, False, f"({units},), one value per unit")
    return autocast


def activation_shift(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The activation shift of every unit: its mean pre-activation, and the angle between weight and mean activation.

    With mu the mean sample: ``shift = w.mu + b = ||w|| ||mu|| cos(angle) + b``, angle in [0, pi]; the angle to a zero
    vector is pi / 2: no shift. Source: as :func:`lcw_weight`. Differentiable, in plain torch on every device.

    Args:
        x: (..., m), the samples; at least one.
        weight: (n, m), the weight the layer applies; for an LCW layer ``lcw_weight(...)``.
        bias: (n,), or None.

    Returns:
        (shift (n,), angle (n,)) in x's dtype; angles in radians.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices.
        ValueError: shapes that do not fit, or no samples.
    """
    arguments = (x, weight, bias)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(activation_shift, *arguments)
    for name, tensor in (("x", x), ("weight", weight)):
        _checks.accumulation_dtype("activation_shift", **{name: tensor})
    _checks.check_devices("activation_shift", x=x, weight=weight, bias=bias)
    # A diagnosis in the tensors' own digits. Autocast does not know the meta device.
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return _reference.activation_shift(x, weight, bias)


def hypersphere_direction(angles: Tensor) -> Tensor:
    """Unit rows from angles: ``u_k = cos t_k prod_{i<k} sin t_i`` for k < m, ``u_m = prod_{i<m} sin t_i``.

    Any real angle is valid; nothing is wrapped or clamped, and derivatives are products, so finite and right at the
    poles (sin t_k = 0) too. A pole hides all later angles: their gradients are 0 there.

    Source: W. Chen, H. Ge, "Neural Characteristic Activation Analysis and Geometric Parameterization for ReLU
    Networks", NeurIPS 2024, arXiv 2305.15912; the division-free derivatives are ours.

    Args:
        angles: (n, m - 1), in radians, one row per unit; a filter is flattened to one row. float32, float64, bfloat16
            or float16; computed in float32 or wider and rounded once. Of any size; in Triton those of 2^52 and more,
            next to which floats are whole turns apart, give NaN.

    Returns:
        (n, m), of the angles' dtype. Without angles (m = 1) nothing can carry a sign: (n, 1) ones.

    Raises:
        TypeError: a dtype that is not floating, or a sparse or nested tensor.
        ValueError: other than 2 dimensions.
    """
    arguments = (angles,)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(hypersphere_direction, *arguments)
    op = "hypersphere_direction"
    _checks.accumulation_dtype(op, angles=angles)
    _checks.check_dense(op, angles=angles)
    _check_rows(op, "angles", angles, "(n, m-1)")
    backend = _backends.choose(_hypersphere.NAME, angles.device)
    if backend == "reference":
        return _reference.hypersphere_direction(angles)
    return _hypersphere.direction(angles, backend)


def hypersphere_angles(weight: Tensor) -> Tensor:
    """The angles of the rows' directions: the inverse of :func:`hypersphere_direction`, up to the rows' lengths.

    ``t_k = atan2(||w_{k+1:m}||, w_k)`` for k <= m - 2, ``t_{m-1} = atan2(w_m, w_{m-1})``: the sign of every component
    is kept (m = 1: it cannot be). A zero row gets angles 0, the direction (1, 0, ..). Made once, when a layer begins,
    so in plain torch on every device; derived by us, for the paper's authors' code loses the sign of w_m.

    Args:
        weight: (n, m), m >= 1. float32, float64, bfloat16 or float16; rows of any length but 0, infinity and NaN.

    Returns:
        (n, m - 1), in radians: in [0, pi], the last in [-pi, pi]. Where an angle has no derivative, 0 is used for it.

    Raises:
        TypeError: a dtype that is not floating, or a sparse or nested tensor.
        ValueError: other than 2 dimensions, or m = 0.
    """
    arguments = (weight,)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(hypersphere_angles, *arguments)
    op = "hypersphere_angles"
    _checks.accumulation_dtype(op, weight=weight)
    _checks.check_dense(op, weight=weight)
    return _reference.hypersphere_angles(weight)


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight normalization: ``scale * weight / ||weight||`` by rows.

    Source: T. Salimans, D. P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868.

    Args:
        weight: (n, m), one row per unit; a filter is flattened to one row. float32, float64, bfloat16 or float16;
            computed in float32 or wider and rounded once. Rows of any finite length; a zero row, which has no
            direction, stays zero, with zero derivatives.
        scale: (n,), of any sign, of the weight's dtype.

    Returns:
        (n, m), of the weight's dtype.

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes that do not fit, or m = 0.
    """
    arguments = (weight, scale)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(normalize_scale, *arguments)
    op = "normalize_scale"
    _checks.accumulation_dtype(op, scale=scale)
    _checks.accumulation_dtype(op, weight=weight, scale=scale)
    _checks.check_dense(op, weight=weight, scale=scale)
    _checks.check_devices(op, weight=weight, scale=scale)
    _check_rows(op, "weight", weight, "(n, m)")
    _checks.check_shape(op, "weight", weight, weight.shape[1] >= 1, "(n, m) with m >= 1")
    _check_per_unit(op, "scale", scale, weight.shape[0])
    backend = _backends.choose(_hypersphere.NAME, weight.device)
    if backend == "reference":
        return _reference.normalize_scale(weight, scale)
    return _hypersphere.normalize_scale(weight, scale, backend)


def gmp_linear(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, activation: str | None = None) -> Tensor:
    """A layer of units on the hypersphere: ``radius * act(x @ u.T + location)``, u = hypersphere_direction(angles).

    The unit's boundary, where it begins to fire, lies at the point -location * u; its direction turns by at most the
    length of a step of the angles. For radius > 0 this is the plain layer of weight radius * u and bias
    radius * location, with as many parameters. Source: as :func:`hypersphere_direction`.

    Who multiplies on a CPU is measured, or decided, as in :func:`lcw_linear`. Up to some dozens of samples directions
    are never written to memory.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16. 16 bits are computed in float32; where directions are kept,
            from 33 samples on, they and ``x @ u.T + location`` are rounded to x's dtype, as torch's own layers would.
        angles: (n, m - 1), in radians.
        radius: (n,), of any sign; it acts after the activation.
        location: (n,).
        activation: None or "relu".

        All of x's dtype; under autocast of any but float64, which goes with itself alone: directions are made in the
        angles' own digits, then rounded.

    Returns:
        (..., n), of x's dtype (under autocast: autocast's).

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: an unknown activation, or shapes that do not fit.
    """
    arguments = (x, angles, radius, location, activation)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(gmp_linear, *arguments)
    is_plain = activation in (None, "relu") and _is_plain_call(_hypersphere.NAME, x, angles, radius, location)
    if is_plain and _hypersphere.is_fused():
        # As in lcw_linear.
        try:
            return _hypersphere.gmp_linear(x, angles, radius, location, activation == "relu", "cpp")
        except (RuntimeError, TypeError, AttributeError, IndexError):
            _check_gmp_linear(x, angles, radius, location, activation)
            raise
    autocast = _check_gmp_linear(x, angles, radius, location, activation)
    backend = _backends.choose(_hypersphere.NAME, x.device)
    if not autocast and backend == "reference":
        return _reference.gmp_linear(x, angles, radius, location, activation)
    if not autocast and _hypersphere.is_fused():
        return _hypersphere.gmp_linear(x, angles, radius, location, activation == "relu", backend)
    pre_activation = torch.nn.functional.linear(x, hypersphere_direction(angles), location)
    activated = pre_activation.relu() if activation == "relu" else pre_activation
    return radius.to(activated.dtype) * activated


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with weight normalization: ``x @ normalize_scale(weight, scale).T + bias``.

    Source: as :func:`normalize_scale`. On a CPU the normalised weight is never made while there are at most 64 samples,
    or a quarter as many as inputs: the products are with the rows as they are, then scaled. (Not where a row is longer
    than 2**16, or shorter than its 2**-16 or scale * 2**-16; with one input; nor in float16 with many samples. Numbers
    that near the least of x's dtype lose digits.) Who multiplies: as in :func:`gmp_linear`.

    Args:
        x: (..., m). float32, float64, bfloat16 or float16. 16 bits are computed in float32; beyond few samples
            products, or the normalised weight, are rounded to x's dtype, as torch's own layers would.
        weight: (n, m), m >= 1; a zero row is a unit of weight zero.
        scale: (n,), of any sign.
        bias: (n,), or None.

        All of x's dtype; under autocast of any but float64, which goes with itself alone: the weight is normalised in
        its own digits, then rounded.

    Returns:
        (..., n), of x's dtype (under autocast: autocast's).

    Raises:
        TypeError: dtypes that are not floating or differ; tensors on different devices, sparse or nested.
        ValueError: shapes that do not fit, or m = 0.
    """
    arguments = (x, weight, scale, bias)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(weight_norm_linear, *arguments)
    given = (x, weight, scale) if bias is None else (x, weight, scale, bias)
    if _is_plain_call(_hypersphere.NAME, *given) and _hypersphere.is_fused():
        # As in lcw_linear.
        try:
            return _hypersphere.weight_norm_linear(x, weight, scale, bias, "cpp")
        except (RuntimeError, TypeError, AttributeError, IndexError):
            _check_weight_norm_linear(x, weight, scale, bias)
            raise
    autocast = _check_weight_norm_linear(x, weight, scale, bias)
    backend = _backends.choose(_hypersphere.NAME, x.device)
    if not autocast and backend != "reference" and _hypersphere.is_fused():
        return _hypersphere.weight_norm_linear(x, weight, scale, bias, backend)
    return torch.nn.functional.linear(x, normalize_scale(weight, scale), bias)


def _check_gmp_linear(x, angles, radius, location, activation) -> bool:
    """Whether autocast, which takes tensors of any dtypes, is on."""
    op = "gmp_linear"
    autocast = _check_layer(op, x=x, angles=angles, radius=radius, location=location)
    _checks.check_choice(op, "activation", activation, (None, "relu"))
    _check_rows(op, "angles", angles, "(n, m-1)")
    units, fan_in = angles.shape[0], angles.shape[1] + 1
    _check_features(op, x, fan_in, "one more than angles'")
    _check_per_unit(op, "radius", radius, units)
    _check_per_unit(op, "location", location, units)
    return autocast


def _check_weight_norm_linear(x, weight, scale, bias) -> bool:
    """Whether autocast, which takes tensors of any dtypes, is on."""
    op = "weight_norm_linear"
    autocast = _check_layer(op, x=x, weight=weight, scale=scale, **({} if bias is None else {"bias": bias}))
    _check_rows(op, "weight", weight, "(n, m)")
    units, fan_in = weight.shape
    _checks.check_shape(op, "weight", weight, fan_in >= 1, "(n, m) with m >= 1")
    _check_features(op, x, fan_in, "the weight's fan-in")
    _check_per_unit(op, "scale", scale, units)
    if bias is not None:
        _check_per_unit(op, "bias", bias, units)
    return autocast


def _check_layer(op: str, **tensors: Tensor) -> bool:
    """Dtypes, layouts and devices; x comes first. Returns whether autocast, which takes any dtypes, is on."""
    x = tensors["x"]
    # Autocast does not know the meta device.
    autocast = isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for name, tensor in tensors.items():
        _checks.accumulation_dtype(op, **{name: tensor})
    # Autocast leaves float64 as it is.
    if not autocast or any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        _checks.accumulation_dtype(op, **tensors)
    _checks.check_dense(op, **tensors)
    _checks.check_devices(op, **tensors)
    return autocast


def _check_rows(op: str, name: str, rows: Tensor, expected: str) -> None:
    _checks.check_shape(op, name, rows, rows.dim() == 2, expected, "Flatten a filter to one row first.")


def _check_features(op: str, x: Tensor, fan_in: int, which: str) -> None:
    # A size put into words would compile anew for every size: only a wrong one is.
    if x.dim() < 1 or x.shape[-1] != fan_in:
        _checks.check_shape(op, "x", x, False, f"(..., {fan_in}), {which}")


def _check_per_unit(op: str, name: str, values: Tensor, units: int) -> None:
    if values.dim() != 1 or values.shape[0] != units:
        _checks.check_shape(op, name, values, False, f"({units},), one value per unit")


def gradient_activation_(tensors: list[Tensor], kind: str = "arctan", alpha: float = 0.1, beta: float = 20.0) -> None:
    """Activate gradients in place: tiny ones are enlarged, large ones restricted.

    arctan: ``alpha * atan(beta * g)``, tanh: ``alpha * tanh(beta * g)``, log: ``alpha * sign(g) * log1p(beta * |g|)``.

    Source: M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", IEEE TNNLS 2021,
    arXiv 2107.04228. Call it once per step on the accumulated, unscaled and clipped gradients: NaN stays NaN, but
    +-inf becomes +-the bound (log: +-inf, as does a g of which beta * g overflows), so an overflow must be looked for
    before.

    Args:
        tensors: list or tuple of dense tensors, of any shapes, strides and devices, each float32, float64, bfloat16 or
            float16; 16-bit tensors are computed in float32 and rounded once. Views that torch negates when it reads
            them (``z.conj().imag``) are right too. May be empty.
        kind: "arctan", "tanh" or "log".
        alpha, beta: numbers > 0 that are normal in float32; the slope at 0 is alpha * beta.

    Returns:
        None. Not recorded by autograd; the differentiable form is
        ``lcw_ops.reference.gradient_activation``.

    Raises:
        TypeError: ``tensors`` is no list or tuple; an entry is no tensor, not floating point or not dense; alpha or
            beta is no number.
        ValueError: unknown kind; alpha or beta out of range; an entry requires a gradient while autograd records, has
            elements that share memory, is given twice, or is an inference tensor outside of inference mode; two entries
            share memory. Disjoint slices, columns and interleaved views of one tensor are fine; views that lie within
            each other in a less regular way are refused even where they are disjoint. Not looked for in traced code.
        On an error no tensor has been changed.
    """
    if _is_plain_list(tensors, kind, alpha, beta) and _gradient_activation.activate_plain_(tensors, kind, alpha, beta):
        # Thousands of gradients before every step: the kernel checks, and what is wrong is asked after a refusal.
        return
    # The entries of the list may take the call over too.
    given = (*(tensors if isinstance(tensors, (list, tuple)) else (tensors,)), kind, alpha, beta)
    if _torch.is_overridden(*given):
        return torch.overrides.handle_torch_function(gradient_activation_, given, tensors, kind, alpha, beta)
    _check_gradient_activation(tensors, kind, alpha, beta)
    by_device = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    # All choices first: one that raises must find every tensor unchanged.
    if _torch.is_exporting() and _backends.requested() is None:
        backends = dict.fromkeys(by_device, "reference")
    else:
        backends = {device: _backends.choose(_gradient_activation.NAME, device) for device in by_device}
    for device, on_device in by_device.items():
        _gradient_activation.activate_(backends[device], on_device, kind, alpha, beta)


def _is_plain_list(tensors, kind, alpha, beta) -> bool:
    """Whether the CPU's kernel may be asked to take the list, or to refuse it before the first write."""
    return (
        isinstance(tensors, (list, tuple))
        and set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}
        and kind in _GRADIENT_ACTIVATION_KINDS
        and type(alpha) is type(beta) is float
        and _checks.LEAST_FLOAT32 <= alpha <= _checks.LARGEST_FLOAT32
        and _checks.LEAST_FLOAT32 <= beta <= _checks.LARGEST_FLOAT32
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not _torch.is_function_mode_active()
        and _backends.choose(_gradient_activation.NAME, _CPU) == "cpp"
        # What neither the kernel nor the dispatcher sees.
        and not (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)))
        and (torch.is_inference_mode_enabled() or not any(map(Tensor.is_inference, tensors)))
    )


def _check_gradient_activation(tensors, kind, alpha, beta) -> None:
    op = _gradient_activation.NAME
    _checks.check_choice(op, "kind", kind, _GRADIENT_ACTIVATION_KINDS)
    _checks.check_positive_float32(op, "alpha", alpha)
    _checks.check_positive_float32(op, "beta", beta)
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: tensors is a {type(tensors).__name__}; expected a list of tensors. Wrap it: [tensor].")
    # Asked once: this loop runs over thousands of gradients before every step.
    recording, traced = torch.is_grad_enabled(), torch.compiler.is_compiling()
    inference = traced or torch.is_inference_mode_enabled()
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{op}: tensors[{index}] is a {type(tensor).__name__}; expected a tensor. "
                "Leave out parameters without a gradient: [p.grad for p in parameters if p.grad is not None]."
            )
        if tensor.dtype not in _checks.FLOATING:
            raise TypeError(
                f"{op}: tensors[{index}] is {tensor.dtype}; expected float32, float64, bfloat16 or float16."
            )
        if tensor.is_nested:
            _checks.check_dense(op, **{f"tensors[{index}]": tensor})
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{op}: tensors[{index}] has layout {tensor.layout}; expected a dense tensor: "
                f"tensors[{index}].to_dense()."
            )
        if recording and tensor.requires_grad:
            raise ValueError(
                f"{op}: tensors[{index}] requires a gradient, and autograd does not record this op. Call it under "
                "torch.no_grad(), or use the differentiable lcw_ops.reference.gradient_activation."
            )
        # A traced program has neither inference tensors nor writes to memory, and its strides may be symbols.
        if traced:
            continue
        if not inference and tensor.is_inference():
            raise ValueError(
                f"{op}: tensors[{index}] is an inference tensor; clone it, or call inside torch.inference_mode()."
            )
        if _gradient_activation.may_overlap(tensor):
            raise ValueError(
                f"{op}: tensors[{index}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}, so elements "
                f"share memory and would be activated more than once. Copy it first: tensors[{index}].contiguous()."
            )
    if len(set(map(id, tensors))) != len(tensors):
        raise ValueError(f"{op}: a tensor is in the list twice and would be activated twice. Leave one of the two out.")
    shared = None if traced else _gradient_activation.find_shared(tensors)
    if shared is not None:
        raise ValueError(
            f"{op}: tensors[{shared[0]}] and tensors[{shared[1]}] lie in the same memory, and what they share would be "
            "activated twice. Give the whole tensor once, or clones."
        )
