"""Activated gradients (GAF), in place on a list of tensors."""

import operator

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as _gradient_activation
from lcw_ops.reference.gradient_activation import KINDS as _KINDS

_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_REQUIRES_GRAD = operator.attrgetter("requires_grad")


def gradient_activation_(tensors: list[Tensor], kind: str = "arctan", alpha: float = 0.1, beta: float = 20.0) -> None:
    """Activate gradients in place: small ones are enlarged, large ones restricted.

    arctan: ``alpha * atan(beta * g)``, tanh: ``alpha * tanh(beta * g)``, log: ``alpha * sign(g) * log1p(beta * |g|)``.

    Call it once per step, on the accumulated, unscaled and clipped gradients. NaN stays NaN, but +-inf becomes the
    function's limit (log: +-inf, also where beta * g overflows), so check for overflow before the call.

    Args:
        tensors: list or tuple of dense tensors, of any shapes, strides and devices, each float32, float64, bfloat16 or
            float16. 16-bit tensors are computed in float32 and rounded once. Views that torch negates on reading
            (``z.conj().imag``) work too. The list may be empty.
        kind: "arctan", "tanh" or "log".
        alpha, beta: numbers > 0 that are normal in float32; the slope at 0 is alpha * beta.

    Returns:
        None. Autograd does not record the call; the differentiable form is ``lcw_ops.reference.gradient_activation``.

    Raises:
        TypeError: ``tensors`` is not a list or tuple; an entry is not a tensor, not floating point or not dense; alpha
            or beta is not a number.
        ValueError: an unknown kind; alpha or beta out of range; an entry requires a gradient while autograd records,
            has elements that share memory, is given twice, or is an inference tensor outside inference mode; two
            entries share memory. Disjoint slices, columns and interleaved views of one tensor are allowed. Views that
            interleave less regularly are refused even if they are disjoint. Traced code skips the checks of memory.

    After an error no tensor has changed.

    Source: M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", IEEE TNNLS 2021,
    arXiv 2107.04228.
    """
    if _is_plain_list(tensors, kind, alpha, beta) and _gradient_activation.activate_plain_(tensors, kind, alpha, beta):
        # Optimizers pass thousands of gradients per step, so the kernel checks them itself. After a refusal the checks
        # below report the error, or another path takes the tensors.
        return
    # Entries of the list may also have a __torch_function__ that takes over the call.
    given = (*(tensors if isinstance(tensors, (list, tuple)) else (tensors,)), kind, alpha, beta)
    if _torch.is_overridden(*given):
        return torch.overrides.handle_torch_function(gradient_activation_, given, tensors, kind, alpha, beta)
    _check_gradient_activation(tensors, kind, alpha, beta)
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    # Choose for all devices first, so that a choice that raises leaves every tensor unchanged.
    if _torch.is_exporting() and backends.requested() is None:
        chosen = dict.fromkeys(by_device, "reference")
    else:
        chosen = {device: backends.choose(_gradient_activation.NAME, device) for device in by_device}
    for device, on_device in by_device.items():
        _gradient_activation.activate_(chosen[device], on_device, kind, alpha, beta)


def _is_one_given_twice(tensors, traced: bool) -> bool:
    if not (traced and _torch.TRACES_NO_ID):
        return len(set(map(id, tensors))) != len(tensors)
    # Dynamo takes seconds for the pairs of a longer list.
    return len(tensors) <= 64 and any(one is other for place, one in enumerate(tensors) for other in tensors[:place])


def _is_plain_list(tensors, kind, alpha, beta) -> bool:
    """Whether to call the CPU kernel, which takes the list or refuses it before the first write."""
    return (
        isinstance(tensors, (list, tuple))
        and set(map(type, tensors)) <= _PLAIN_TYPES
        and kind in _KINDS
        and type(alpha) is type(beta) is float
        and _checks.LEAST_FLOAT32 <= alpha <= _checks.LARGEST_FLOAT32
        and _checks.LEAST_FLOAT32 <= beta <= _checks.LARGEST_FLOAT32
        and not torch.compiler.is_compiling()
        and not _torch.in_functorch()
        and not _torch.in_forward_mode()
        and not _torch.is_function_mode_active()
        and backends.is_cpp_chosen(_gradient_activation.NAME)
        # Neither the kernel nor the dispatcher checks the next two conditions.
        and not (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)))
        and (torch.is_inference_mode_enabled() or not any(map(Tensor.is_inference, tensors)))
    )


def _check_gradient_activation(tensors, kind, alpha, beta) -> None:
    op = _gradient_activation.NAME
    _checks.check_choice(op, "kind", kind, _KINDS)
    _checks.check_positive_float32(op, "alpha", alpha)
    _checks.check_positive_float32(op, "beta", beta)
    if not isinstance(tensors, (list, tuple)):
        came = f"is a {type(tensors).__name__}"
        raise TypeError(_checks.describe(op, "tensors", came, "a list of tensors", "Wrap it: [tensor]."))
    # Read these once: the loop runs over thousands of gradients per step. For the same reason it calls a check only if
    # the check will raise.
    recording, traced = torch.is_grad_enabled(), torch.compiler.is_compiling()
    inference = traced or torch.is_inference_mode_enabled()
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                _checks.describe(
                    op,
                    f"tensors[{index}]",
                    f"is a {type(tensor).__name__}",
                    "a tensor",
                    "Leave out parameters without a gradient: [p.grad for p in parameters if p.grad is not None].",
                )
            )
        if tensor.dtype not in _checks.FLOATING:
            _checks.accumulation_dtype(op, **{f"tensors[{index}]": tensor})
        if tensor.layout != torch.strided or tensor.is_nested:
            _checks.check_dense(op, **{f"tensors[{index}]": tensor})
        if recording and tensor.requires_grad:
            raise ValueError(
                _checks.describe(
                    op,
                    f"tensors[{index}]",
                    "requires a gradient",
                    "a tensor that does not, because autograd does not record this op",
                    "Call it under torch.no_grad(), or use the differentiable lcw_ops.reference.gradient_activation.",
                )
            )
        # A traced program has neither inference tensors nor writes to memory, and its strides may be symbols.
        if traced:
            continue
        if not inference and tensor.is_inference():
            remedy = "Clone it, or call inside torch.inference_mode()."
            came = "is an inference tensor"
            raise ValueError(_checks.describe(op, f"tensors[{index}]", came, "a normal tensor", remedy))
        if _gradient_activation.may_overlap(tensor):
            raise ValueError(
                _checks.describe(
                    op,
                    f"tensors[{index}]",
                    f"has shape {tuple(tensor.shape)} and strides {tensor.stride()}, so elements share memory",
                    "elements with memory of their own, because a shared one is activated more than once",
                    f"Copy it first: tensors[{index}].contiguous().",
                )
            )
    if _is_one_given_twice(tensors, traced):
        came, expected = "has one tensor in the list twice", "each tensor once, or it would be activated twice"
        raise ValueError(_checks.describe(op, "tensors", came, expected, "Leave one of the two out."))
    shared = None if traced else _gradient_activation.find_shared(tensors)
    if shared is not None:
        raise ValueError(
            _checks.describe(
                op,
                f"tensors[{shared[0]}] and tensors[{shared[1]}]",
                "share memory",
                "separate memory, because shared elements would be activated twice",
                "Give the whole tensor once, or clones.",
            )
        )
