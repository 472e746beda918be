"""Activated gradients (GAF), in place on a list of tensors."""

import operator

import torch
from torch import Tensor

from lcw_ops import _checks, _torch
from lcw_ops.functional._call import CPU
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as _gradient_activation
from lcw_ops.reference.gradient_activation import KINDS as _GRADIENT_ACTIVATION_KINDS

_REQUIRES_GRAD = operator.attrgetter("requires_grad")


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
    if _torch.is_exporting() and backends.requested() is None:
        chosen = dict.fromkeys(by_device, "reference")
    else:
        chosen = {device: backends.choose(_gradient_activation.NAME, device) for device in by_device}
    for device, on_device in by_device.items():
        _gradient_activation.activate_(chosen[device], on_device, kind, alpha, beta)


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
        and backends.choose(_gradient_activation.NAME, CPU) == "cpp"
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
