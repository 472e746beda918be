"""Activated gradients over a list of tensors: ours, a loop over the tensors, three foreach calls, and a plain copy.

The work is memory traffic: every element is read once and written once. The copy moves the same bytes and computes
nothing; the loop and the foreach calls go over them three times.
"""

import torch
from torch import Tensor

from lcw_ops import functional as F
from lcw_ops.bench.registry import EAGER, Case, Competitor, Run, ours
from lcw_ops.ops.gradient_activation import NAME

ALPHA, BETA = 0.1, 20.0


def _case(device_type: str, tensors: int, elements: int, dtype: torch.dtype, quick: bool = False) -> Case:
    def make_inputs(device: torch.device) -> dict:
        return {"gradients": [torch.randn(elements, device=device).to(dtype) for _ in range(tensors)]}

    return Case(
        stem="gradient_activation",
        name="arctan in place",
        shape={"tensors": tensors, "elements": elements},
        dtype=dtype,
        make_inputs=make_inputs,
        expected=_expected,
        competitors=(
            *ours(NAME, device_type, _ours),
            Competitor(EAGER, _loop),
            Competitor("three foreach calls", _foreach),
            Competitor("copy", _copy, checked=False),
        ),
        bytes=2 * tensors * elements * dtype.itemsize,
        operations=0,
        quick=quick,
    )


def cases(device_type: str) -> list[Case]:
    if device_type == "cuda":
        # 100 million elements: 400 and 200 MB, more than any second-level cache.
        return [
            _case(device_type, 1000, 10_000, torch.float32, quick=True),
            _case(device_type, 1000, 100_000, torch.float32),
            _case(device_type, 1000, 100_000, torch.bfloat16),
        ]
    return [
        _case(device_type, 200, 10_000, torch.float32, quick=True),
        _case(device_type, 1000, 10_000, torch.float32),
        _case(device_type, 1000, 10_000, torch.bfloat16),
    ]


def _own_copy(inputs: dict) -> list[Tensor]:
    # In place, call after call: the values settle where alpha atan(beta g) = g, at 0.117 and not at 0.
    return [gradient.clone() for gradient in inputs["gradients"]]


def _expected(inputs: dict) -> list[Tensor]:
    return [ALPHA * torch.atan(BETA * gradient.double()) for gradient in inputs["gradients"]]


def _ours(inputs: dict) -> Run:
    gradients = _own_copy(inputs)

    def run() -> list[Tensor]:
        F.gradient_activation_(gradients, "arctan", ALPHA, BETA)
        return gradients

    return run


def _loop(inputs: dict) -> Run:
    gradients = _own_copy(inputs)
    return lambda: [gradient.mul_(BETA).atan_().mul_(ALPHA) for gradient in gradients]


def _foreach(inputs: dict) -> Run:
    gradients = _own_copy(inputs)

    def run() -> list[Tensor]:
        torch._foreach_mul_(gradients, BETA)
        torch._foreach_atan_(gradients)
        torch._foreach_mul_(gradients, ALPHA)
        return gradients

    return run


def _copy(inputs: dict) -> Run:
    source, target = inputs["gradients"], _own_copy(inputs)

    def run() -> list[Tensor]:
        torch._foreach_copy_(target, source)
        return target

    return run
