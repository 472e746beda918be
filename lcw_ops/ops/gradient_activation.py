"""Activated gradients (GAF) in place over a list of tensors, as a registered op.

f(g) = alpha atan(beta g), alpha tanh(beta g) or alpha sign(g) ln(1 + beta |g|), elementwise. M. Liu, L. Chen, X. Du,
L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lcw_ops import _checks, _torch, reference
from lcw_ops.ops import backends, library

NAME = "gradient_activation_"
SGD_STEP, ADAMW_STEP = "activated_sgd_step_", "activated_adamw_step_"

# An op of a compiled backend with this prefix returns whether it accepted the tensors. It inspects their layout in
# memory before the first write. It does not raise, so that a refusal does not look like a failure.
TRY = "try_"

_PLAIN_TYPES = {Tensor, torch.nn.Parameter}

# The number of tensors in one foreach call, or copied into one dtype at a time. It is large because a foreach call
# costs about as much as a call for one tensor. It is limited because the copies take memory.
FOREACH_TENSORS = 32


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may share memory. Exact for torch's views; some uses of as_strided get a false yes."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def find_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two tensors that may share memory, or None if no two do.

    The answer is exact if no two ranges of addresses overlap, and for slices and interleaved views of one tensor
    (columns, channels, every second element). Any other tensors with overlapping ranges count as shared.
    """
    spans = []
    for index, tensor in enumerate(tensors):
        start = _address(tensor)
        if start:
            spans.append((start, start + _span(tensor), index))
    spans.sort()
    # For the thousands of gradients of a step, the search nearly always ends here.
    if all(first[1] <= second[0] for first, second in pairwise(spans)):
        return None
    by_device: dict[torch.device, list[tuple[int, int, int]]] = {}
    for span in spans:
        by_device.setdefault(tensors[span[2]].device, []).append(span)
    clusters = (cluster for on_device in by_device.values() for cluster in _clusters(on_device))
    found = (_find_shared_in_cluster([(start, index, tensors[index]) for start, _, index in one]) for one in clusters)
    return next((pair for pair in found if pair is not None), None)


def _address(tensor: Tensor) -> int:
    """The address of the first element, or 0 for a tensor without memory: empty, meta, fake, or batched by vmap."""
    if _torch.is_fake(tensor):
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _span(tensor: Tensor, period: int = 0) -> int:
    """Bytes from the first element to the end of the last. Strides that are multiples of ``period`` do not count."""
    if not period and tensor.is_contiguous():
        return tensor.nbytes
    itemsize = tensor.itemsize
    steps = ((size - 1, stride * itemsize) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return itemsize + sum(count * step for count, step in steps if not period or step % period)


def _clusters(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Split the sorted spans (start, end, index) into clusters. No span reaches into another cluster."""
    clusters, end = [], 0
    for span in spans:
        if span[0] >= end:
            clusters.append([])
        clusters[-1].append(span)
        end = max(end, span[1])
    return clusters


def _find_shared_in_cluster(cluster: list[tuple[int, int, Tensor]]) -> tuple[int, int] | None:
    """The indices of two tensors of the cluster, or None if a period shows that none of its tensors share memory.

    A period shows this if the tensors' addresses modulo the period lie in ranges that do not overlap. The periods that
    are tried are the strides of the first two tensors.
    """
    if len(cluster) == 1:
        return None
    (origin, first, one), (_, second, other) = cluster[:2]
    for period in sorted({step * tensor.itemsize for tensor in (one, other) for step in tensor.stride() if step}):
        ranges = sorted(
            (offset, offset + _span(tensor, period))
            for offset, tensor in (((start - origin) % period, tensor) for start, _, tensor in cluster)
        )
        # The first range starts at 0 and again at the period, so a range that ends after the period would overlap it.
        if ranges[-1][1] <= period and all(left[1] <= right[0] for left, right in pairwise(ranges)):
            return None
    return first, second


def _fake(tensors, kind, alpha, beta):
    # If one tensor is on meta, this runs instead of the kernels, and the other tensors would silently stay unchanged.
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"{NAME}: tensors on different devices; call lcw_ops.functional.{NAME}")


def _step_fake(*arguments):
    return None


def _vmap(overload, info, in_dims, tensors, kind, alpha, beta):
    """The op is elementwise, so a batch dimension is like any other."""
    _activate_dense_(overload, tensors, kind, alpha, beta)
    return None, None


def _triton_activate(*arguments):
    library.launch("gradient_activation", "gradient_activation_many", *arguments)


def _triton_sgd_step(*arguments):
    library.launch("gradient_activation", "sgd_step", *arguments)


def _triton_adamw_step(*arguments):
    library.launch("gradient_activation", "adamw_step", *arguments)


def activate_(backend: str, tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    """Run the op on ``backend``. The tensors are on one device, and the caller has checked the arguments."""
    if _torch.in_forward_mode():
        # A kernel writes the values and would leave the tangents of dual tensors as they were.
        backend = "reference"
    if backend != "reference" and _torch.in_functorch():
        # Only _vmap, below the transforms, sees the layout in memory.
        library.get_overload(NAME, backend)(tensors, kind, alpha, beta)
        return
    if _can_ask(backend, tensors) and library.get_overload(TRY + NAME, backend)(tensors, kind, alpha, beta):
        _count_writes(tensors)
        return
    # f(0) is 0, so zeros without memory stay as they are: they cannot be written to.
    tensors = [
        tensor for tensor in tensors if torch.compiler.is_compiling() or not _torch.is_zeros_without_memory(tensor)
    ]
    if backend == "reference":
        _reference_activate_(tensors, kind, alpha, beta)
    elif tensors:
        _activate_dense_(library.get_overload(NAME, backend), tensors, kind, alpha, beta)
        _count_writes(tensors)


def activate_plain_(tensors: list[Tensor], kind: str, alpha: float, beta: float) -> bool:
    """Call the C++ kernel on tensors checked only for their type. False if the kernel refused and wrote nothing."""
    if _torch.is_traced() or not library.get_overload(TRY + NAME, "cpp")(tensors, kind, alpha, beta):
        return False
    _count_writes(tensors)
    return True


def _can_ask(backend: str, tensors: list[Tensor]) -> bool:
    """Whether the kernel can be asked to check the tensors itself, so that Python need not inspect them first.

    A subclass that turns one call into several would get several answers.
    """
    return (
        backend in ("cpp", "cuda")
        and not _torch.is_traced()
        and (
            (kinds := set(map(type, tensors))) <= _PLAIN_TYPES
            or all(kind.__torch_dispatch__ is Tensor.__torch_dispatch__ for kind in kinds)
        )
    )


def _refuse(*arguments) -> bool:
    return False


def _activate_dense_(overload, tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    dense = [_to_dense(tensor) for tensor in tensors]
    overload(dense, kind, alpha, beta)
    _write_back(tensors, dense)


def _to_dense(tensor: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # Strides may be symbols here, and symbols cannot be sorted.
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    tensor = tensor.resolve_neg()
    return tensor if is_dense(tensor) else tensor.contiguous()


def _is_virtual(tensor: Tensor) -> bool:
    """Whether memory does not hold the values: a view that torch negates on reading, or zeros without memory.

    Compilers resolve both themselves.
    """
    return not torch.compiler.is_compiling() and (tensor.is_neg() or _torch.is_zeros_without_memory(tensor))


def _write_back(tensors: list[Tensor], copies: list[Tensor]) -> None:
    # Dynamo of torch 2.10 cannot compare lists.
    if torch.compiler.is_compiling() or copies is not tensors:
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _count_writes(tensors: list[Tensor]) -> None:
    """Tell autograd, which may have saved the tensors, that the kernels have written to their memory."""
    if torch.compiler.is_compiling():
        return
    if torch.is_inference_mode_enabled():
        tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def sgd_step_(
    backend: str,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    is_first: bool,
    activate: str,
    kind: str,
    alpha: float,
    beta: float,
) -> None:
    """One step of SGD on ``backend``, with f applied to the gradient or to the result of momentum (``activate``).

    It computes ``lcw_ops.reference.sgd_step`` in place. The tensors are on one device, in any layout; grads are only
    read. A parameter, its gradient and its buffer may differ in dtype: the step is computed in float64 if one of them
    is float64, otherwise in float32, and rounded once. ``momentum_buffers`` is empty without momentum, and its values
    are not read if ``is_first``. The caller has checked the arguments.
    """
    numbers = (lr, momentum, dampening, weight_decay, nesterov, maximize, is_first)
    if backend == "reference":
        _by_dtype(_foreach_sgd_step_, [params, momentum_buffers], grads, None, *numbers, activate, kind, alpha, beta)
        return

    def step(overload, params, momentum_buffers, grads, _):
        return overload(params, grads, momentum_buffers, *numbers, activate == "momentum", kind, alpha, beta)

    _step_in_place(SGD_STEP, backend, step, [params, momentum_buffers], grads, [])


def adamw_step_(
    backend: str,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    kind: str,
    alpha: float,
    beta: float,
) -> None:
    """One step of AdamW on ``backend``, with f applied to the raw gradient.

    It computes ``lcw_ops.reference.adamw_step`` in place. Devices, layouts and dtypes are as in `sgd_step_`; grads are
    only read. ``max_exp_avg_sqs`` is empty without ``amsgrad``; ``state_steps`` are 0-dim float32 and already count
    this step. The caller has checked the arguments.

    Raises:
        RuntimeError: a CUDA graph is captured, and a step count is on the CPU.
    """
    check_recorded_counts(params, state_steps)
    written = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    numbers = (lr, beta1, beta2, weight_decay, eps, amsgrad, maximize, kind, alpha, beta)
    if backend == "reference":
        _by_dtype(_foreach_adamw_step_, written, grads, state_steps, *numbers)
        return

    def step(overload, params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grads, state_steps):
        return overload(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, *numbers)

    _step_in_place(ADAMW_STEP, backend, step, written, grads, state_steps)


def check_recorded_counts(params: list[Tensor], state_steps: list[Tensor]) -> None:
    """Refuse step counts on the CPU while a CUDA graph is captured. Every replay would repeat the captured count."""
    if torch.compiler.is_compiling() or not (params and params[0].is_cuda):
        return
    if torch.cuda.is_current_stream_capturing() and not all(step.is_cuda for step in state_steps):
        raise RuntimeError(
            _checks.describe(
                ADAMW_STEP,
                "state_steps",
                "has a count on the CPU while a CUDA graph is captured",
                f"all counts on {params[0].device}",
                "Use capturable=True, and load states by load_state_dict, which moves the counts",
            )
        )


def _step_in_place(
    name: str, backend: str, step, written: list[list[Tensor]], grads: list[Tensor], state_steps: list[Tensor]
) -> None:
    """Call ``step(overload, *written, grads, state_steps)``. Tensors that the op does not take are copied."""
    # With empty lists the dispatcher could not tell the device.
    if not grads:
        return
    ask = getattr(getattr(torch.ops.lcw_ops, TRY + name), backend) if _can_ask(backend, written[0]) else None
    if ask is None or not step(ask, *written, grads, state_steps):
        _check_forms(name, written, grads)
        length = _length_of_pieces(written, grads)
        for start in range(0, len(grads), length):
            *piece, counts = (tensors[start : start + length] for tensors in (*written, grads, state_steps))
            _step_on_copies(library.get_overload(name, backend), step, piece[:-1], piece[-1], counts)
    _count_writes([tensor for tensors in written for tensor in tensors])


def _check_forms(name: str, written: list[list[Tensor]], grads: list[Tensor]) -> None:
    """Raise ValueError if a gradient or a state has another shape or device than its parameter.

    A copy in the parameter's form would hide it by crossing devices or by broadcasting, and could not be written back.
    """
    if torch.compiler.is_compiling():
        return
    for own in zip(*(tensors for tensors in (*written, grads) if tensors), strict=True):
        for tensor in own[1:]:
            if tensor.shape != own[0].shape or tensor.device != own[0].device:
                raise ValueError(
                    _checks.describe(
                        name,
                        "a gradient or a state",
                        f"has shape {tuple(tensor.shape)} on {tensor.device}",
                        f"its parameter's {tuple(own[0].shape)} on {own[0].device}",
                        "Convert it with the parameter, or delete it to start with a new one.",
                    )
                )


def _length_of_pieces(written: list[list[Tensor]], grads: list[Tensor]) -> int:
    """The number of parameters to step at once."""
    if len(grads) > 1 and not torch.compiler.is_compiling() and find_shared(written[0]) is not None:
        # Parameters that share memory are stepped one at a time.
        return 1
    return FOREACH_TENSORS if _common_dtypes(written, grads)[1] else len(grads)


def _step_on_copies(
    overload, step, written: list[list[Tensor]], grads: list[Tensor], state_steps: list[Tensor]
) -> None:
    """Call ``step``, with copies of the tensors that differ from their parameter's dense layout and common dtype."""
    dtypes, _ = _common_dtypes(written, grads)
    params = [_to_dense(_widen(param, dtype)) for param, dtype in zip(written[0], dtypes, strict=True)]
    laid_out = [params, *([_lay_out_as(params, tensors) for tensors in written[1:]])]
    step(overload, *laid_out, _lay_out_as(params, grads), state_steps)
    for tensors, copies in zip(written, laid_out, strict=True):
        _write_back(tensors, copies)


def _common_dtypes(written: list[list[Tensor]], grads: list[Tensor]) -> tuple[list[torch.dtype], bool]:
    """For each parameter, one dtype for it, its gradient and its states; and whether any tensor has another dtype."""
    columns = [[tensor.dtype for tensor in tensors] for tensors in (*written, grads) if tensors]
    if all(column == columns[0] for column in columns):
        return columns[0], False
    return [
        own[0] if len(set(own)) == 1 else torch.float64 if torch.float64 in own else torch.float32
        for own in zip(*columns, strict=True)
    ], True


def _lay_out_as(params: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, with copies of those whose layout or dtype is not the parameter's. An empty list stays empty."""
    return [
        tensor
        if tensor.stride() == param.stride() and tensor.dtype is param.dtype and not _is_virtual(tensor)
        else torch.empty_like(param).copy_(tensor)
        for param, tensor in zip(params, tensors, strict=len(tensors) > 0)
    ]


def _reference_activate_(tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    if torch.compiler.is_compiling() or _torch.is_exporting() or _torch.in_functorch():
        # Compilers fuse by themselves, torch.jit.trace records no foreach calls, and foreach has no vmap rules.
        for tensor in tensors:
            tensor.copy_(reference.gradient_activation(tensor, kind, alpha, beta))
        return
    resolved = _resolve_negations(tensors)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in resolved:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype, same in by_dtype.items():
        for start in range(0, len(same), FOREACH_TENSORS):
            group = same[start : start + FOREACH_TENSORS]
            wide = [_widen(tensor, torch.promote_types(dtype, torch.float32)) for tensor in group]
            _foreach_activate_(wide, kind, alpha, beta)
            _round_into(group, wide)
    _write_back(tensors, resolved)


def _foreach_activate_(tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    """lcw_ops.reference.gradient_activation in place, in one foreach call per operation."""
    if kind == "log":
        signs = torch._foreach_sign(tensors)
        torch._foreach_abs_(tensors)
    torch._foreach_mul_(tensors, beta)
    {"arctan": torch._foreach_atan_, "tanh": torch._foreach_tanh_, "log": torch._foreach_log1p_}[kind](tensors)
    if kind == "log":
        torch._foreach_mul_(tensors, signs)
    torch._foreach_mul_(tensors, alpha)


def _resolve_negations(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, with copies of views that torch negates on reading, to which foreach calls cannot write."""
    if torch.compiler.is_compiling() or not any(map(Tensor.is_neg, tensors)):
        return tensors
    return [tensor.resolve_neg() for tensor in tensors]


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _round_into(tensors: list[Tensor], wide: list[Tensor]) -> None:
    copied = [(tensor, copy) for tensor, copy in zip(tensors, wide, strict=True) if copy is not tensor]
    if copied:
        torch._foreach_copy_([tensor for tensor, _ in copied], [copy for _, copy in copied])


def _by_dtype(step, written: list[list[Tensor]], grads, state_steps, *options) -> None:
    """Call ``step(*written, grads, counts, *options)`` on groups of parameters, each in one dtype, float32 or wider."""
    if not grads:
        return
    resolved = [_resolve_negations(tensors) for tensors in written]
    dtypes, is_mixed = _common_dtypes(written, grads)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, dtype in enumerate(dtypes):
        by_dtype.setdefault(dtype, []).append(index)
    # Read all counts together, so that the host waits for the device only once.
    counts = torch.stack(state_steps).reshape(len(grads)).tolist() if state_steps else []
    for own_dtype, indices in by_dtype.items():
        dtype = torch.promote_types(own_dtype, torch.float32)
        for start in range(0, len(indices), FOREACH_TENSORS):
            chosen = indices[start : start + FOREACH_TENSORS]
            narrow = [[tensors[index] for index in chosen] if tensors else [] for tensors in resolved]
            wide = narrow
            if is_mixed or dtype is not own_dtype:
                wide = [[_widen(tensor, dtype) for tensor in tensors] for tensors in narrow]
            # Always a copy, because the step overwrites it.
            gradients = [grads[index].to(dtype, copy=True) for index in chosen]
            step(*wide, gradients, [counts[index] for index in chosen] if counts else [], *options)
            if wide is not narrow:
                for tensors, results in zip(narrow, wide, strict=True):
                    _round_into(tensors, results)
    for tensors, results in zip(written, resolved, strict=True):
        _write_back(tensors, results)


def _foreach_sgd_step_(
    params,
    momentum_buffers,
    gradients,
    counts,
    lr,
    momentum,
    dampening,
    weight_decay,
    nesterov,
    maximize,
    is_first,
    activate,
    kind,
    alpha,
    beta,
) -> None:
    if maximize:
        torch._foreach_neg_(gradients)
    if activate == "gradient":
        _foreach_activate_(gradients, kind, alpha, beta)
    if weight_decay != 0:
        torch._foreach_add_(gradients, params, alpha=weight_decay)
    if momentum != 0:
        if is_first:
            torch._foreach_copy_(momentum_buffers, gradients)
        else:
            torch._foreach_mul_(momentum_buffers, momentum)
            torch._foreach_add_(momentum_buffers, gradients, alpha=1 - dampening)
        if nesterov:
            torch._foreach_add_(gradients, momentum_buffers, alpha=momentum)
        else:
            torch._foreach_copy_(gradients, momentum_buffers)
    if activate == "momentum":
        _foreach_activate_(gradients, kind, alpha, beta)
    torch._foreach_add_(params, gradients, alpha=-lr)


def _foreach_adamw_step_(
    params,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    gradients,
    counts,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    amsgrad,
    maximize,
    kind,
    alpha,
    beta,
) -> None:
    if maximize:
        torch._foreach_neg_(gradients)
    _foreach_activate_(gradients, kind, alpha, beta)
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    if amsgrad:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
    denominators = torch._foreach_sqrt(max_exp_avg_sqs if amsgrad else exp_avg_sqs)
    torch._foreach_div_(denominators, [(1 - beta2**count) ** 0.5 for count in counts])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, [-lr / (1 - beta1**count) for count in counts])


# The tensors of a list are on one device, without gaps or overlap. A parameter's gradient and states have its shape,
# dtype and strides. The momentum buffers are not read if `is_first`. `state_steps` already count this step.
_ARGUMENTS = {
    NAME: "(Tensor(a!)[] tensors, str kind, float alpha, float beta)",
    SGD_STEP: (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, "
        "float dampening, float weight_decay, bool nesterov, bool maximize, bool is_first, bool on_momentum, str kind, "
        "float alpha, float beta)"
    ),
    ADAMW_STEP: (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor[] state_steps, float lr, float beta1, float beta2, float weight_decay, "
        "float eps, bool amsgrad, bool maximize, str kind, float alpha, float beta)"
    ),
}
# The dispatch keys of tensors that the kernels do not take: views that torch negates on reading, zeros without memory,
# nested tensors.
_NOT_PLAIN = ("Negative", "ZeroTensor", "AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA")

library.declare(NAME, f"{_ARGUMENTS[NAME]} -> ()", backends=("cpp", "cuda", "triton"), fake=_fake, vmap=_vmap)
for _op in (SGD_STEP, ADAMW_STEP):
    library.declare(_op, f"{_ARGUMENTS[_op]} -> ()", backends=("cpp", "cuda", "triton"), fake=_step_fake)
for _op, _arguments in _ARGUMENTS.items():
    backends.IMPLEMENTED[_op] = ("cpp", "cuda", "triton")
    # For every tensor Triton's launcher makes a row of a table in Python. With a thousand tensors this takes
    # milliseconds, longer than the kernel. The cuda launcher does the same work in C++.
    backends.PREFERENCE_OF_OP[_op, "cuda"] = ("cuda", "triton")
    library.declare(TRY + _op, f"{_arguments} -> bool", backends=("cpp", "cuda"))
    for _backend in ("cpp", "cuda"):
        for _key in _NOT_PLAIN:
            library.implement(TRY + _op, _backend, _refuse, _key)
for _backend in ("cpp", "cuda", "triton"):
    # A transform of torch.func may unwrap a view that torch negates on reading.
    library.implement(
        NAME, _backend, functools.partial(_activate_dense_, library.get_overload(NAME, _backend)), "Negative"
    )
library.implement(NAME, "triton", _triton_activate)
library.implement(SGD_STEP, "triton", _triton_sgd_step)
library.implement(ADAMW_STEP, "triton", _triton_adamw_step)
